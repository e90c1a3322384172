"""Verdicts: from arms and claims to supported, refuted, equivalent or undecided."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import allostasis
from allostasis.analysis import claim_files, estimands, families, studies
from allostasis.analysis.aggregate import Arm, IdenticalArmsError, arms
from allostasis.analysis.claims import Claim
from allostasis.analysis.confounds import confounds
from allostasis.analysis.curves import RunView
from allostasis.analysis.summaries import final
from allostasis.analysis.text import number
from allostasis.analysis.verdicts import Result, Verdict, conjunction, judge, rule
from allostasis.analysis.wording import blocks
from allostasis.core.records import read_runs

Writer = Callable[..., Path]
GROKKING = Path(allostasis.__path__[0]) / "experiments/grokking"


def claim(**changes: object) -> Claim:
    content: dict[str, object] = {
        "id": "X", "source": "own", "text": "x", "estimand": {"summary": "final", "of": "mean"},
        "arms": {"treatment": "high_wd"}, "select": {"metric": "amplitude_param.published"},
        "direction": "greater", "bound": 0.0, "test": "t", "family": "x", "status": "own",
    }  # fmt: skip
    return Claim.model_validate(content | changes)


def arms_of(root: Path) -> list[Arm]:
    return arms([RunView(record) for record in read_runs(root)])


def registered() -> list[Claim]:
    return claim_files.load(GROKKING, "grokking")


def by_id(results: list[Result]) -> dict[str, Result]:
    return {result.claim.id: result for result in results}


@pytest.fixture(scope="module")
def results(study: Path) -> dict[str, Result]:
    return by_id(judge(registered(), arms_of(study)))


def test_the_synthetic_study_is_judged_as_it_was_made(results: dict[str, Result]) -> None:
    words = {name: result.verdict.word for name, result in results.items()}
    made_true = ["C1", "C1.time", "C1.groks", "C1.width", "C2.c", "C3", "C3.flat", "C.memorises",
                 "C.restricted", "C4.adamw.peak", "C4.adamw.falls", "C4.adamw.rises"]  # fmt: skip
    assert {words[name] for name in made_true} == {"supported"}
    assert words["C.conserve"] == "refuted"  # alignment gains more than the logit scale loses
    assert words["C4"] == "undecided"


def test_an_arm_that_was_not_run_leaves_its_claim_undecided(results: dict[str, Result]) -> None:
    for arm in ("muon", "sgdm", "mse"):
        verdict = results[f"C4.{arm}"].verdict
        assert verdict == Verdict("undecided", f"not run (no finished run of condition '{arm}')")


def test_a_share_of_80_percent_needs_25_seeds_in_a_family_of_six(
    results: dict[str, Result],
) -> None:
    result = results["C4.adamw.share"]
    assert result.verdict.word == "undecided"
    assert result.verdict.reason == "8 seeds cannot reach the level in its family, 25 can"
    assert 2 * 6 * 0.8**25 <= 0.05 < 2 * 6 * 0.8**24


def test_a_failed_run_is_listed_and_its_seed_does_not_count(results: dict[str, Result]) -> None:
    sample = results["C1.groks"].treatment
    assert sample is not None
    assert sample.units == tuple(range(8))
    assert list(sample.arm.left_out.values()) == [
        "seed 8 failed: RuntimeError: <script>alert(1)</script> | & boom"
    ]


def test_three_seeds_cannot_support_anything(tmp_path: Path, write_run: Writer) -> None:
    for seed in range(3):
        write_run(tmp_path, "high_wd", seed)
        write_run(tmp_path, "no_wd", seed)
    for result in judge(registered(), arms_of(tmp_path)):
        assert result.verdict.word == "undecided"
        if result.inference is not None:
            assert result.verdict.reason == f"3 of {result.claim.min_seeds} seeds"


def test_one_seed_has_an_estimate_no_interval_and_no_verdict(
    tmp_path: Path, write_run: Writer
) -> None:
    write_run(tmp_path)
    for result in judge(registered(), arms_of(tmp_path)):
        assert result.verdict.word == "undecided"
        if result.claim.id == "C1.width":
            assert result.inference is not None
            assert result.inference.estimate == pytest.approx(0.117, abs=1e-3)
            assert result.interval is None
            assert result.verdict.reason == "1 of 5 seeds"


def test_a_claim_changed_after_the_run_cannot_be_supported(study: Path) -> None:
    changed = [
        c.model_copy(update={"bound": 0.4}) if c.id == "C1.groks" else c for c in registered()
    ]
    result = by_id(judge(changed, arms_of(study)))
    assert result["C1.groks"].verdict == Verdict(
        "undecided", "CHANGED AFTER RUN: exploratory (supported as it stands now)"
    )
    assert len(result["C1.groks"].changed) == 8
    assert result["C1"].verdict.word == "undecided"
    assert result["C2"].verdict.reason.startswith("requires C1.groks, which is undecided")
    assert result["C3"].verdict.word == "supported"


def test_a_claim_that_runs_never_froze_cannot_be_supported(study: Path) -> None:
    late = claim(id="C9", bound=-1.0)
    assert "CHANGED AFTER RUN" in judge([late], arms_of(study))[0].verdict.reason


def test_altered_bounds_alter_verdicts_and_nothing_else(study: Path) -> None:
    arms_there = arms_of(study)
    original = by_id(judge(registered(), arms_there))
    for name, bound in (("C1.width", 0.05), ("C3.amplitude", 2.0), ("C2.c.scale", -5.0)):
        moved = [c.model_copy(update={"bound": bound}) if c.id == name else c for c in registered()]
        for run in (run for arm in arms_there for run in arm.runs):
            run.run["claims"] = claim_files.freeze(moved)["hashes"]
        after = by_id(judge(moved, arms_there))
        assert original[name].verdict.word == "supported"
        assert after[name].verdict.word == "refuted"
        for other, result in after.items():
            before = original[other]
            if before.inference is not None:
                assert result.inference is not None
                assert result.inference.estimate == before.inference.estimate
                assert result.interval == before.interval
            if other.partition(".")[0] != name.partition(".")[0]:
                assert result.verdict.word == before.verdict.word


def test_a_claim_is_not_decided_at_other_settings_than_registered(
    tmp_path: Path, write_run: Writer
) -> None:
    for seed in range(8):
        write_run(tmp_path, "high_wd", seed, config={"task.train_frac": 0.6})
    result = by_id(judge(registered(), arms_of(tmp_path)))["C1.time"]
    assert result.verdict == Verdict(
        "undecided", "not run at the registered settings: task.train_frac=0.3, here 0.6"
    )
    assert result.inference is not None
    assert result.inference.estimate is not None  # printed all the same


def test_the_registered_arm_is_read_even_where_another_has_more_seeds(
    tmp_path: Path, write_run: Writer
) -> None:
    for seed in range(8):
        write_run(tmp_path, "high_wd", seed)
    for seed in range(9):
        write_run(tmp_path, seed=seed, config={"task.train_frac": 0.6}, config_hash="quick")
    all_arms = arms_of(tmp_path)
    assert [(arm.hash, len(arm.runs)) for arm in all_arms] == [("quick", 9), ("abc", 8)]
    sample = by_id(judge(registered(), all_arms))["C1.time"].treatment
    assert sample is not None
    assert sample.arm.hash == "abc"


def test_devices_are_never_pooled(tmp_path: Path, write_run: Writer) -> None:
    for seed in range(4):
        write_run(tmp_path, seed=seed)
        write_run(tmp_path, seed=seed + 4, device_resolved="cuda:0", config_hash="abc ")
    sizes = {(arm.device, len(arm.runs)) for arm in arms_of(tmp_path)}
    assert sizes == {("cpu", 4), ("cuda", 4)}


def test_inert_seeds_do_not_replicate(tmp_path: Path, write_run: Writer) -> None:
    source = write_run(tmp_path)
    table = (source / "metrics.parquet").read_bytes()
    for seed in range(1, 8):
        folder = write_run(tmp_path, seed=seed)
        (folder / "metrics.parquet").write_bytes(table)
    result = by_id(judge(registered(), arms_of(tmp_path)))["C1.groks"]
    assert result.verdict.word == "undecided"
    assert result.verdict.reason.startswith("seeds_inert: all 8 seeds of high_wd")


def test_identical_arms_raise(tmp_path: Path, write_run: Writer) -> None:
    for name, extra in (
        ("settings", {"config": {"module.weight_decay": 1.0}}),
        ("weights", {"checkpoints": {"20000": "sha256:high_wd-0"}}),
    ):
        root = tmp_path / name
        write_run(root, "high_wd", 0)
        write_run(root, "no_wd", 0, **extra)
        with pytest.raises(IdenticalArmsError, match=f"equal {name}"):
            judge([], arms_of(root))
        shutil.rmtree(root)


def test_arms_that_took_the_same_size_from_others_are_one_and_the_report_goes_on(
    tmp_path: Path, write_run: Writer
) -> None:
    """Two flat autoencoders at the L0 of two arms: it rounds to one number, and they are one."""
    for seed in range(8):
        weights = {"20000": "sha256:same"} if seed < 3 else {"20000": f"sha256:{seed}"}
        for condition in ("high_wd", "no_wd"):
            write_run(tmp_path, condition, seed, checkpoints=weights, matched={"l0": 4.0})
    beside = claim(
        id="Y", arms={"treatment": "high_wd", "control": "no_wd"},
        estimand={"summary": "final", "of": "paired_difference"},
    )  # fmt: skip
    results = by_id(judge([claim(), beside], arms_of(tmp_path)))
    assert results["X"].inference is not None
    compared = results["Y"].verdict
    assert compared.word == "undecided"
    assert "ended with equal weights at seeds 0, 1, 2" in compared.reason
    assert "another arm's run" in compared.reason
    # with only one of them matched, something is wrong
    write_run(tmp_path, "no_wd", 0, checkpoints={"20000": "sha256:same"})
    with pytest.raises(IdenticalArmsError, match="changed nothing"):
        judge([], arms_of(tmp_path))


# ---------------------------------------------------------------- the rule


def verdict_on(values: np.ndarray, judged: Claim) -> str:
    """What the rule says of a family of one."""
    rng = np.random.default_rng(0)
    inference = estimands.mean(values, 0.0, rng)
    low, high = judged.bound if isinstance(judged.bound, tuple) else (judged.bound, judged.bound)
    assert low is not None
    assert high is not None
    above, below = inference.above, inference.below
    match judged.direction:
        case "greater":
            support, refute = 2 * above(low), 2 * below(low)
        case "less":
            support, refute = 2 * below(low), 2 * above(low)
        case _:
            support = max(above(low), below(high))
            refute = 2 * min(below(low), above(high))
    return rule(
        judged, q_support=support, q_refute=refute,
        interval=inference.interval(0.95), inner=inference.interval(0.9),
    ).word  # fmt: skip


def spread(mean: float, sd: float = 0.1, n: int = 8) -> np.ndarray:
    """Units with exactly this mean and standard deviation."""
    values = np.linspace(-1, 1, n)
    return mean + sd * values / values.std(ddof=1)


@pytest.mark.parametrize(
    ("mean", "changes", "word"),
    [
        (1.0, {}, "supported"),
        (-1.0, {}, "refuted"),
        (0.05, {}, "undecided"),
        (0.02, {"negligible": 0.2}, "equivalent"),
        (0.02, {"negligible": 0.05}, "undecided"),
        (-1.0, {"direction": "less"}, "supported"),
        (1.0, {"direction": "less"}, "refuted"),
        (1.0, {"direction": "inside", "bound": [0.9, 1.1], "test": "tost"}, "equivalent"),
        (1.0, {"direction": "inside", "bound": [0.9, 1.1]}, "supported"),
        (1.08, {"direction": "inside", "bound": [0.9, 1.1], "test": "tost"}, "undecided"),
        (1.5, {"direction": "inside", "bound": [0.9, 1.1], "test": "tost"}, "refuted"),
        (0.5, {"direction": "inside", "bound": [0.9, 1.1]}, "refuted"),
    ],
)
def test_the_rule(mean: float, changes: dict[str, object], word: str) -> None:
    assert verdict_on(spread(mean), claim(**changes)) == word


def test_for_a_family_of_one_the_verdict_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(3)
    judged = claim()
    for _ in range(100):
        values = rng.normal(0.6, 1.0, 6)
        interval = estimands.mean(values, 0.0, rng).interval(0.95)
        assert interval.low is not None
        assert interval.high is not None
        word = verdict_on(values, judged)
        assert (word == "supported") == (interval.low > 0)
        assert (word == "refuted") == (interval.high < 0)


def test_at_the_bound_a_claim_is_seldom_supported_and_never_both() -> None:
    rng = np.random.default_rng(4)
    words = [verdict_on(rng.normal(0.0, 1.0, 8), claim()) for _ in range(500)]
    # 2.5 % nominal, 3.5 % allowed, and two standard errors of 500 sets
    assert words.count("supported") / 500 <= 0.035 + 2 * 0.007
    assert words.count("refuted") / 500 <= 0.035 + 2 * 0.007


@pytest.mark.slow
def test_at_the_bound_the_rate_of_support_is_at_most_3_5_percent() -> None:
    rng = np.random.default_rng(5)
    words = [verdict_on(rng.normal(0.0, 1.0, 8), claim()) for _ in range(4_000)]
    assert words.count("supported") / 4_000 <= 0.035


def test_a_conjunction_needs_all_and_falls_with_one() -> None:
    def atom(name: str, word: str) -> Result:
        return Result(claim(id=name), "", Verdict(word, "why"))  # type: ignore[arg-type]

    assert conjunction([atom("A", "supported"), atom("B", "equivalent")]).word == "supported"
    assert conjunction([atom("A", "supported"), atom("B", "undecided")]).word == "undecided"
    assert conjunction([atom("A", "refuted"), atom("B", "undecided")]).word == "refuted"


# ---------------------------------------------------------------- families


def family(*names: str, **compounds: tuple[str, ...]) -> list[Claim]:
    atoms = [claim(id=name) for name in names]
    return atoms + [
        Claim(id=k, source="own", text="x", all_of=v, family="x", status="own")
        for k, v in compounds.items()
    ]


def test_a_family_counts_compounds_once_and_their_atoms_not() -> None:
    made = family("A", "B", "C", "D", E=("A", "B"), F=("E", "C"))
    assert families.family_sizes(made) == {"x": 2}
    assert [a.id for a in families.members(made, "x")["F"]] == ["A", "B", "C"]


def test_an_atom_is_adjusted_in_its_compounds_place() -> None:
    made = family("A", "B", "C", E=("A", "B"))
    levels = families.adjusted(made, {"A": 0.01, "B": 0.04, "C": 0.02}, max)
    # the family is E (0.04) and C: Holm doubles the smaller
    assert levels == pytest.approx({"A": 0.02, "B": 0.04, "C": 0.04})


def test_family_wise_support_under_the_null_stays_at_the_level() -> None:
    rng = np.random.default_rng(6)
    made = family("A", "B", "C", "D", E=("A", "B"))
    found = 0
    sets = 1_000
    for _ in range(sets):
        # a two-sided level q = min(1, 2 p) for support, at the bound
        q = {name: min(1.0, 2 * p) for name, p in zip("ABCD", rng.random(4), strict=True)}
        levels = families.adjusted(made, q, max)
        tops = [max(levels["A"], levels["B"]), levels["C"], levels["D"]]
        found += min(tops) < 0.05
    assert found / sets <= 0.065 + 0.007


def test_warnings_before_a_sweep_name_the_claim_and_the_seeds() -> None:
    warnings = families.seed_warnings(registered(), 3)
    assert "C1.groks needs at least 8 seeds to be supported; there are 3" in warnings
    assert all("C4" in line for line in families.seed_warnings(registered(), 8))


def test_the_report_says_stable_only_after_500_steps_above_the_bound(study: Path) -> None:
    every = arms_of(study)
    selects = {"metric": "accuracy"}
    final = {"summary": "final", "of": "mean", "split": "test"}
    for condition, word in (("high_wd", "stable"), ("no_wd", "not to be called stable")):
        asked = claim(estimand=final, select=selects, bound=0.9, arms={"treatment": condition})
        (block,) = blocks(judge([asked], every), every)
        assert dict(block.lines)["dwell"].endswith(f" of 8 seeds; {word}")


def models(root: Path, write_run: Writer, n: int) -> list[Arm]:
    """Two seeds of each of several models, and one model again in another quantisation."""
    for k in range(n):
        for seed in (2 * k, 2 * k + 1):
            facts = {"name": f"maker/model-{k}", "revision": None, "title": f"model-{k}"}
            write_run(root, "high_wd", seed, config_hash=f"h{k}", model=facts)
    again = {"name": "maker/model-0", "revision": None, "title": "model-0 (Q4_1)"}
    write_run(root, "high_wd", 99, config_hash="quantised", model=again)
    return arms_of(root)


GENERAL = {"estimand": {"summary": "final", "of": "mean", "unit": "model"}}


def test_a_claim_about_models_counts_models(tmp_path: Path, write_run: Writer) -> None:
    every = models(tmp_path, write_run, 5)
    asked = claim(**GENERAL)
    (result,) = judge([asked], every)
    assert result.treatment is not None
    assert result.inference is not None
    assert result.treatment.units == tuple(f"maker/model-{k}" for k in range(5))
    arm = next(arm for arm in every if arm.hash == "h3")
    curves = [run.curve("amplitude_param.published", split=None) for run in arm.runs]
    assert result.treatment.values[3] == pytest.approx(np.mean([final(curve) for curve in curves]))
    assert result.inference.n == 5
    (block,) = blocks([result], every)
    assert "5 models in high_wd, a unit is one model" in dict(block.lines)["units"]
    # nothing froze the claim before these runs
    assert result.verdict.reason == ("CHANGED AFTER RUN: exploratory (supported as it stands now)")


def test_four_models_say_nothing_about_models_in_general(tmp_path: Path, write_run: Writer) -> None:
    (result,) = judge([claim(**GENERAL)], models(tmp_path, write_run, 4))
    assert result.verdict == Verdict("undecided", "4 of 5 models")


def test_runs_that_train_their_own_model_say_nothing_about_pretrained_ones(study: Path) -> None:
    (result,) = judge([claim(**GENERAL)], arms_of(study))
    assert result.verdict.reason == "not run (no pretrained model has finished runs of it)"


def test_claims_about_models_are_judged_in_a_study_of_their_own(
    tmp_path: Path, write_run: Writer
) -> None:
    models(tmp_path, write_run, 3)
    views = [RunView(record) for record in read_runs(tmp_path)]
    asked = [claim(), claim(id="Y", family="y", **GENERAL)]
    rest, general = studies.across_models("grokking", views, studies.Extension(tmp_path, asked))
    assert [c.id for c in rest.claims] == ["X"]
    assert general is not None
    assert general.title == "grokking: all models"
    assert [r.verdict.reason for r in general.results] == ["3 of 5 models"]


def test_seeds_added_after_a_look_split_alpha_where_the_claim_allows_it(study: Path) -> None:
    every = arms_of(study)
    patient = claim(lookup=True)
    assert patient.model_dump(exclude_none=True) == claim().model_dump(exclude_none=True) | {
        "lookup": True
    }
    (first,) = judge([patient], every)
    assert (first.looks, first.claim.alpha) == ((8,), 0.05)
    (again,) = judge([patient], every, {"X": [5, 6, 8]})  # the same seeds twice are one look
    assert (again.looks, again.claim.alpha) == ((5, 6, 8), pytest.approx(0.05 / 3))
    assert again.hash == first.hash
    assert again.interval is not None
    assert again.interval.level == pytest.approx(1 - 0.05 / 3)
    (block,) = blocks([again], every)
    assert dict(block.lines)["looks"] == ("judged at 5, 6, 8 seeds: alpha is split over 3 looks")
    (bare,) = judge([claim()], every, {"X": [5]})
    assert bare.claim.alpha == 0.05
    (block,) = blocks([bare], every)
    assert "since the claim has no `lookup: true`" in dict(block.lines)["looks"]


def test_the_end_of_a_run_is_never_taken_for_the_time_of_an_event(study: Path) -> None:
    time = {"estimand": {"summary": "time_to(t_grok)", "of": "mean"}, "select": None}
    for condition, reason in (("high_wd", "adjusted p"), ("no_wd", "8 times are censored")):
        (result,) = judge([claim(**time, arms={"treatment": condition})], arms_of(study))
        assert reason in result.verdict.reason or result.verdict.reason.startswith("CHANGED")
        assert (result.inference is None) == (condition == "no_wd")
    asked = claim(
        estimand={"summary": "time_to(t_grok)", "of": "rmst"}, select=None,
        arms={"treatment": "high_wd", "control": "no_wd"}, direction="less", test="permutation",
    )  # fmt: skip
    (result,) = judge([asked], arms_of(study))
    assert result.inference is not None
    assert result.inference.beside["restricted to"] == "20000"
    assert result.p_support == pytest.approx(1 / 12_870)


def test_a_confound_is_excluded_by_a_claim_and_not_by_an_arm_that_was_run(
    tmp_path: Path, write_run: Writer
) -> None:
    for condition in ("high_wd", "no_wd"):
        for seed in range(3):
            write_run(tmp_path, condition, seed, every=1000)
    there = arms_of(tmp_path)
    plain = claim(confounds={"weight_decay": "no_wd", "other": None, "third": "mse"})
    asked = claim(
        id="Y", arms={"treatment": "high_wd", "control": "no_wd"},
        estimand={"summary": "final", "of": "paired_difference"},
    )  # fmt: skip
    (result,) = judge([plain], there)

    def told(*deciding: Result) -> dict[str, tuple[str, bool]]:
        found = confounds(result, [result, *deciding], there)
        return {c.name: (c.told, c.is_excluded) for c in found}

    means = {
        arm.condition: number(
            float(np.mean([final(run.curve("amplitude_param.published")) for run in arm.runs]))
        )
        for arm in there
    }
    beside = f"measured by no_wd: {means['no_wd']}, against {means['high_wd']} in high_wd"
    assert told() == {
        "weight decay": (f"{beside}; no claim decides on it", False),
        "other": ("not excluded", False),
        "third": ("not excluded (arm 'mse' was not run)", False),
    }
    for word in ("undecided", "refuted"):
        judged = Result(asked, "", Verdict(word, ""))
        assert told(judged)["weight decay"] == (f"{beside}; Y is {word}", False)
    judged = Result(asked, "", Verdict("equivalent", ""))
    assert told(judged)["weight decay"] == ("excluded by no_wd (Y is equivalent)", True)


def test_leakage_is_compared_over_what_both_arms_can_steer(
    tmp_path: Path, write_run: Writer
) -> None:
    """The taught arm leaks half on each shared concept, and reaches one more, which leaks a lot."""
    rng = np.random.default_rng(0)
    for seed in range(6):
        base = np.exp(rng.normal(0, 1, 5))
        half = 0.5 * np.exp(rng.normal(0, 0.02, 5))
        both = {
            "high_wd": [*(base * half), 100.0, None],
            "no_wd": [*base, None, None],
        }
        for arm, leakage in both.items():
            folder = write_run(tmp_path, arm, seed)
            rows = pd.DataFrame({
                "cluster": [f"c{at}" for at in range(7)], "leakage": leakage,
                "reached": [one is not None for one in leakage], "intervention": "sae:parent:1",
            }).astype({"leakage": "float64"})  # fmt: skip
            other = rows.assign(intervention="means:parent:1", leakage=7.0)
            pd.concat([rows, other]).to_parquet(folder / "examples.parquet")
    leaks = {"of": "log_ratio", "summary": "geometric_mean_of_shared(leakage, sae:parent:1)"}
    reached = {"of": "paired_difference", "summary": "mean_of_clusters(reached, sae:parent:1)"}
    own = {"select": None, "arms": {"treatment": "high_wd", "control": "no_wd"}}
    found = by_id(
        judge(
            [
                claim(**own, id="L", estimand=leaks, direction="less", bound=0.8),
                claim(**own, id="R", estimand=reached, bound=0.0),
            ],
            arms_of(tmp_path),
        )
    )
    assert found["L"].inference is not None
    assert found["L"].inference.estimate == pytest.approx(0.5, rel=0.02)
    assert found["L"].p_support is not None
    assert found["L"].p_support < 1e-6
    assert found["R"].inference is not None
    assert found["R"].inference.estimate == pytest.approx(1 / 7)
    with pytest.raises(ValueError, match="needs `arms"):
        claim(select=None, estimand=leaks, direction="less", bound=0.8)
