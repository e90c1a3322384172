"""Claims files: what they may say, what is told when they do not, and how they are frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import allostasis
from allostasis.analysis import claim_files, claims, summaries
from allostasis.analysis.claims import ClaimError

PACKAGE = Path(allostasis.__path__[0])
FILES = sorted(PACKAGE.glob("experiments/*/claims.yaml"))

ATOM = """
- id: X1
  source: own
  text: "it rises"
  estimand: {summary: final, of: mean, split: test}
  arms: {treatment: high_wd}
  select: {metric: logit_scale}
  direction: greater
  bound: 0.5
  test: t
  family: x
  status: own
"""


def read(text: str) -> list[claims.Claim]:
    return claim_files.read(text, origin="claims.yaml")


def test_every_claims_file_loads_and_no_id_is_used_twice_in_the_package() -> None:
    assert FILES
    ids = [c.id for file in FILES for c in claim_files.read(file.read_text(), origin=str(file))]
    assert len(ids) == len(set(ids))


def test_the_grokking_claims_cover_the_source_and_say_where_they_come_from() -> None:
    loaded = claim_files.load(PACKAGE / "experiments/grokking", "grokking")
    assert {"C1", "C2", "C3", "C4"} <= {claim.id for claim in loaded}
    assert all(claim.source and claim.text for claim in loaded)
    assert {claim.status for claim in loaded} == {"published", "corrected", "own"}


def test_a_claim_of_stability_asks_for_500_steps_above_the_level() -> None:
    said = ATOM.replace("it rises", "it rises and is stable there")
    with pytest.raises(ClaimError, match="takes 500 steps above the level; ask `summary: stable"):
        read(said)
    (asked,) = read(said.replace("final, of: mean", "stable(0.5), of: proportion")
                    .replace("test: t", "test: binomial"))  # fmt: skip
    assert asked.estimand is not None
    assert asked.estimand.summary == "stable(0.5)"


def test_claims_about_models_share_neither_family_nor_precondition_with_others() -> None:
    general = ATOM.replace("X1", "X2").replace("of: mean", "of: mean, unit: model")
    with pytest.raises(ClaimError, match="X1: shares its family with X2, whose unit is a model"):
        read(ATOM + general)
    apart = general.replace("family: x", "family: y")
    assert [c.min_seeds for c in read(ATOM + apart)] == [5, 5]
    with pytest.raises(ClaimError, match="X2: names X1, but `unit: model` stands apart"):
        read(ATOM + apart + "  requires: [X1]\n")
    with pytest.raises(ClaimError, match="of: kappa does not fit unit: model; allowed: mean"):
        read(apart.replace("of: mean", "of: kappa"))


def test_a_folder_without_claims_has_none(tmp_path: Path) -> None:
    assert claim_files.load(tmp_path, "grokking") == []


def test_a_file_of_several_experiments_gives_each_its_own(tmp_path: Path) -> None:
    other = ATOM.replace("X1", "X2").replace("  source:", "  exp: ov\n  source:", 1)
    (tmp_path / "claims.yaml").write_text(ATOM + other)
    assert [claim.id for claim in claim_files.load(tmp_path, "ov")] == ["X1", "X2"]
    assert [claim.id for claim in claim_files.load(tmp_path, "zero")] == ["X1"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bound: 0.5", "bond: 0.5", "X1: bond: no such key; did you mean 'bound'?"),
        ("split: test", "slit: test", "X1: estimand.slit: no such key; did you mean 'split'?"),
        ("of: mean", "of: meen", "X1: estimand.of='meen': Input should be 'mean'"),
        ("summary: final", "summary: finl", "no summary is called 'finl'; there are final, end"),
        ("summary: final", "summary: at_step", "'at_step' takes 1: when"),
        ("bound: 0.5", "bound: [0, 1]", "bound (0.0, 1.0) does not fit 'greater': give a number"),
        ("direction: greater", "direction: inside", "does not fit 'inside': give [low, high]"),
        ("test: t", "test: tost", "test 'tost' asks whether a value lies inside, not 'greater'"),
        ("test: t", "test: binomial", "test 'binomial' does not fit of: mean; allowed: t, tost"),
        ("  select: {metric: logit_scale}\n", "", "summary 'final' needs `select: {metric: ...}`"),
        ("  direction: greater\n", "", "a claim needs direction, or `all_of`"),
        ("  status: own", "  status: own\n  all_of: [X1]", "a compound (`all_of`) has no estimand"),
        ("  status: own", "  status: own\n  requires: [X2]", "names 'X2', which is no claim"),
        ("test: t", "test: sign_flip", "min_seeds 5: no fewer than 6 flipped signs"),
        ("of: mean", "of: difference", "of: difference needs `arms: {treatment: ..., control:"),
    ],
)
def test_a_wrong_claim_is_refused_with_what_to_do(old: str, new: str, message: str) -> None:
    with pytest.raises(ClaimError) as caught:
        read(ATOM.replace(old, new))
    assert message in str(caught.value)


def test_a_ratio_is_not_written_as_its_logarithm() -> None:
    text = ATOM.replace("of: mean", "of: log_ratio").replace("bound: 0.5", "bound: -0.2231")
    with pytest.raises(ClaimError, match="told as a ratio, not as its logarithm"):
        read(text)


def test_all_problems_of_a_file_are_told_at_once() -> None:
    wrong = ATOM.replace("bound", "bond") + ATOM.replace("X1", "X2").replace("family", "famly")
    with pytest.raises(ClaimError, match=r"claims.yaml has 3 problems") as caught:
        read(wrong)
    for part in ("X1: bond: no such key", "X2: famly: no such key", "X2: family: Field required"):
        assert part in str(caught.value)


def test_a_claim_stands_after_what_it_names_and_each_id_once() -> None:
    compound = "- {id: X, source: own, text: all, all_of: [X1], family: x, status: own}\n"
    assert [claim.id for claim in read(ATOM + compound)] == ["X1", "X"]
    with pytest.raises(ClaimError, match="'X1' stands after it"):
        read(compound + ATOM)
    with pytest.raises(ClaimError, match="X1: this id is used twice"):
        read(ATOM + ATOM)


@pytest.mark.parametrize("text", ["a: 1", "- - :", "[]:\n  -"])
def test_a_file_that_is_no_list_of_claims_is_refused(text: str) -> None:
    with pytest.raises(ClaimError, match="claims.yaml"):
        read(text)


def test_a_summary_of_both_arms_needs_both() -> None:
    text = ATOM.replace("summary: final", "summary: shared_scale_and_alignment")
    text = text.replace("  select: {metric: logit_scale}\n", "")
    with pytest.raises(ClaimError, match="reads both arms and needs"):
        read(text)


def test_confounds_are_names_with_or_without_the_arm_that_excludes_them() -> None:
    (claim,) = read(ATOM + "  confounds: [decay, {loss: mse}]\n")
    assert claim.confounds == {"decay": None, "loss": "mse"}


def test_freezing_gives_canonical_json_and_a_hash_of_each_claim() -> None:
    frozen = claim_files.freeze(read(ATOM + ATOM.replace("X1", "X2")))
    content: list[dict[str, Any]] = json.loads(frozen["text"])
    assert [claim["id"] for claim in content] == ["X1", "X2"]
    assert list(content[0]) == sorted(content[0])
    assert frozen["text"].endswith("\n")
    assert "\r" not in frozen["text"]
    assert set(frozen["hashes"]) == {"X1", "X2"}
    assert all(len(digest) == 64 for digest in frozen["hashes"].values())


def test_the_order_of_keys_and_the_spelling_of_numbers_do_not_change_a_hash() -> None:
    lines = ATOM.strip().splitlines()
    turned = "\n".join([lines[0], *reversed(lines[1:])]).replace("0.5", "5.0e-1")
    assert claim_files.freeze(read(turned)) == claim_files.freeze(read(ATOM))


def test_a_claim_added_later_leaves_the_others_hashes_and_an_edit_changes_its_own() -> None:
    before = claim_files.freeze(read(ATOM))["hashes"]
    after = claim_files.freeze(read(ATOM + ATOM.replace("X1", "X2")))["hashes"]
    edited = claim_files.freeze(read(ATOM.replace("0.5", "0.4")))["hashes"]
    assert after["X1"] == before["X1"] != edited["X1"]


def test_every_summary_says_what_it_is() -> None:
    for function in summaries.functions().values():
        assert (function.__doc__ or "").strip()
