"""Patching on pairs of random prompts, against plain passes and TransformerLens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from allostasis.analysis.curves import UndefinedError
from allostasis.engines.verify import Oracle
from allostasis.experiments.heads.lab import Engine, Verify
from allostasis.experiments.heads.patch import HeadsPatch
from allostasis.experiments.heads.patch_plan import Plan, places, windows_of
from allostasis.interventions.ablate import Unit
from allostasis.models.lens import pretrained
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.probes.encoded import Encoded, Example, Tokens
from allostasis.tasks.probes.rows import Probe
from allostasis.tasks.probes.task import Probes

EXACT = 1e-5
DIRECTIONS = ("noise", "denoise")


class FakeTask(Probes):
    """Pairs of random prompts of two lengths that differ in two tokens.

    Answers are what the model itself prefers, so that it is competent in one cell.

    Args:
        model: Whose preferences.
        mirrored: Whether each pair is there the other way round too.
    """

    def __init__(self, model: LanguageModel, *, mirrored: bool = False) -> None:
        super().__init__(seed=0, corpus="facts")
        self.model, self.mirrored = model, mirrored

    @torch.no_grad()
    def build(self, encode: Any, tokenizer: Any) -> Any:
        del encode, tokenizer
        rng, examples = np.random.default_rng(5), []
        for number in range(24):
            length = (6, 8)[number % 2]
            answers: tuple[int, ...] = (0, 0)
            while answers[0] == answers[1]:
                clean = rng.integers(50, 90, length)
                corrupt = clean.copy()
                corrupt[[1, length - 2]] = rng.integers(20, 50, 2)
                pair = torch.tensor(np.stack([clean, corrupt]))
                answers = tuple(self.model.hf(pair).logits[:, -1].argmax(1).tolist())
            split: Any = ("test", "val", "train")[number % 3]
            sides = [(clean, corrupt, answers)]
            sides += [(corrupt, clean, answers[::-1])] if self.mirrored else []
            for side, (first, second, (target, foil)) in enumerate(sides):
                row = Probe(
                    id=f"{number}-{side}", corpus="facts", family="f", template="t", cell="all",
                    group=f"g{number}", clean="?", corrupt="?", target=" a", foil=" b",
                )  # fmt: skip
                tokens = Tokens(tuple(map(int, first)), tuple(map(int, second)), (target,), (foil,))
                examples.append(Example(2 * number + side, row, split, tokens))
        return Encoded(
            corpus="facts", examples=tuple(examples), sha256="fake", requested=len(examples),
            dropped={"length_mismatch": 3}, n_extra=0, seed=0, frac=1.0, n_reference=8,
        )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return pretrained(arch="gemma3_text")


def _module(model: LanguageModel, *, mirrored: bool = False, **settings: Any) -> HeadsPatch:
    given = {"verify": Verify(units=0), "engine": Engine(max_tokens=64)} | settings
    return HeadsPatch(model=model, task=FakeTask(model, mirrored=mirrored), **given)


def _run(module: HeadsPatch, folder: Path) -> dict[str, pd.DataFrame]:
    module.workspace = folder
    return module.test_step(module.task, 0)["tables"]


def _shares(table: pd.DataFrame, metric: str = "recovery") -> pd.DataFrame:
    return table[table["metric"] == metric].set_index("intervention")


@pytest.mark.slow
def test_recovery_is_the_ratio_of_sums_of_what_transformer_lens_gives(
    model: LanguageModel, tmp_path: Path
) -> None:
    """Both directions, from one hook at a time on one prompt at a time; every granularity."""
    module = _module(
        model, granularity=["layer_resid", "mlp_out", "head_out", "mlp_post"], positions="last",
        layers=[1], heads=["1.2"], neurons=["1.7"], windows=[(0, 1)], sham=False,
    )  # fmt: skip
    tables = _run(module, tmp_path)
    found, oracle = _shares(tables["metrics"]), Oracle(model)
    units = [
        Unit(site="resid_post", op="patch", members=((1, None),), positions="last"),
        Unit(site="mlp_out", op="patch", members=((1, None),), positions="last"),
        Unit(site="z", op="patch", members=((1, 2),), positions="last"),
        Unit(site="mlp_post", op="patch", members=((1, 7),), positions="last"),
        Unit(site="mlp_out", op="patch", members=((0, None), (1, None)), positions="last"),
        Unit(site="attn_out", op="patch", members=((0, None), (1, None)), positions="last"),
    ]
    assert {f"denoise:{unit.what}" for unit in units} <= {*found.index}
    for unit in units:
        sums = {"denoise": 0.0, "noise": 0.0, "apart": 0.0}
        for each in module.asked.examples:

            def ld(prompt: Any, *given: Any, each: Any = each) -> float:
                logits = oracle.logits(prompt, *given)
                return float(logits[each.target_id] - logits[each.foil_id])

            clean, corrupt = ld(each.clean_ids), ld(each.corrupt_ids)
            sums["apart"] += clean - corrupt
            sums["denoise"] += ld(each.corrupt_ids, unit, [each.clean_ids]) - corrupt
            sums["noise"] += clean - ld(each.clean_ids, unit, [each.corrupt_ids])
        for direction in DIRECTIONS:
            want = sums[direction] / sums["apart"]
            key = f"{direction}:{unit.what}"
            assert found.loc[key, "value"] == pytest.approx(want, abs=EXACT), key
            assert found.loc[key, "ci_low"] <= want <= found.loc[key, "ci_high"]
        asymmetry = _shares(tables["metrics"], "asymmetry").loc[f"asymmetry:{unit.what}", "value"]
        want = (sums["denoise"] - sums["noise"]) / sums["apart"]
        assert asymmetry == pytest.approx(want, abs=2 * EXACT)


def test_an_interrupted_run_goes_on_to_the_same_tables(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"granularity": "mlp_out", "positions": "each", "windows": []}
    whole = _run(_module(model, **settings), tmp_path / "whole")

    class Stop:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __call__(self, done: int, planned: int) -> None:
            if 0 < done < planned:
                raise KeyboardInterrupt

    stopped = _module(model, **settings)
    with monkeypatch.context() as patched:
        patched.setattr("allostasis.experiments.heads.lab.Ticker", Stop)
        with pytest.raises(KeyboardInterrupt):
            _run(stopped, tmp_path / "again")
    part = stopped.partial()
    assert 0 < len(part["interventions"]) < len(whole["interventions"])
    assert {*part["interventions"]["intervention"]} < {*whole["interventions"]["intervention"]}
    resumed = _run(_module(model, **settings), tmp_path / "again")
    for name, table in whole.items():
        pd.testing.assert_frame_equal(resumed[name], table, check_exact=True)


def test_full_overwrite_is_flagged_degenerate(model: LanguageModel, tmp_path: Path) -> None:
    """Trap 2: the stream at all positions of any layer is the other run, and is never ranked."""
    module = _module(model, granularity="layer_resid", positions="all", windows=[])
    tables = _run(module, tmp_path)
    assert tables["interventions"]["degenerate"].eq("full_overwrite").all()
    found = _shares(tables["metrics"])
    np.testing.assert_allclose(found["value"], 1, atol=EXACT)
    assert "largest_denoise" not in module.summary()
    assert {"logit_diff", "logit_diff_corrupt"} <= module.summary().keys()
    closeness = tables["metrics"][tables["metrics"]["metric"] == "kl_divergence.source"]
    assert closeness[closeness["intervention"].notna()]["value"].max() <= EXACT


def test_positions_count_back_from_the_end_and_those_before_a_difference_do_nothing(
    model: LanguageModel, tmp_path: Path
) -> None:
    module = _module(model, granularity="layer_resid", positions="each", windows=[])
    tables = _run(module, tmp_path)
    found = _shares(tables["metrics"])
    rows = found[found.index.str.startswith("denoise:")]
    assert sorted(rows["position"].unique()) == [*range(-7, 0)]  # 8 tokens, the second differs
    last = rows[rows["layer"] == model.decoder.n_layers - 1].set_index("position")["value"]
    assert last[-1] == pytest.approx(1, abs=EXACT)
    assert (last.drop(-1) == 0).all()
    kinds = tables["interventions"].set_index("intervention")["degenerate"]
    assert kinds["denoise:resid_post@2[last]"] == "full_overwrite"
    assert kinds["denoise:resid_post@2[aligned:-2]"] == "not_read"
    assert pd.isna(kinds["denoise:resid_post@1[last]"])
    assert module.facts["sham"]["largest_change"] <= EXACT


def test_a_run_patched_with_itself_that_changes_is_refused(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allostasis.experiments.heads.patch.SHAM", -1.0)
    with pytest.raises(RuntimeError, match="a run that is patched with itself moves by"):
        _run(_module(model, layers=[0], windows=[]), tmp_path)


def test_mirrored_pairs_make_asymmetry_0_and_oriented_pairs_do_not(
    model: LanguageModel, tmp_path: Path
) -> None:
    """Denoising a pair is noising its mirror image, whatever the model does."""
    module = _module(model, mirrored=True, granularity="mlp_out", windows=[(0, 1)])
    tables = _run(module, tmp_path)
    assert module.facts["pairs"]["mirrored"] == 1
    found = _shares(tables["metrics"])
    both = [found[found.index.str.startswith(f"{name}:")]["value"] for name in DIRECTIONS]
    np.testing.assert_allclose(*both, atol=EXACT)
    assert not len(_shares(tables["metrics"], "asymmetry"))
    oriented = _shares(tables["metrics"], "asymmetry.oriented")
    assert module.facts["pairs"]["oriented"] == len(module.asked) // 2
    assert oriented["value"].abs().max() > 0.01
    # the columns that claims read are the same ratio
    rows = tables["examples"]
    key = "mlp_out@0-1[last]"
    rows = rows[rows["intervention"].isin({f"{name}:{key}" for name in DIRECTIONS})]
    ratio = rows["asymmetry"].sum() / rows["asymmetry_of"].sum()
    assert ratio == pytest.approx(oriented.loc[f"asymmetry:{key}", "value"], rel=1e-6)


@pytest.mark.slow
def test_one_direction_gives_the_same_as_both(model: LanguageModel, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"granularity": "head_out", "layers": [1], "windows": []}
    both = _shares(_run(_module(model, **settings), tmp_path / "both")["metrics"])
    ways = {"denoise": "clean->corrupt", "noise": "corrupt->clean"}
    for name, way in ways.items():
        tables = _run(_module(model, direction=way, **settings), tmp_path / name)
        found = _shares(tables["metrics"])["value"]
        assert {key.partition(":")[0] for key in found.index} == {name}
        np.testing.assert_allclose(found, both.loc[found.index, "value"], atol=EXACT)
        assert tables["baseline"].query("split == 'test'")["ld_corrupt"].notna().all()


def test_neurons_are_chosen_where_the_runs_of_the_train_split_differ(
    model: LanguageModel, tmp_path: Path
) -> None:
    module = _module(model, granularity="mlp_post", layers=[1], neurons=3, windows=[])
    tables = _run(module, tmp_path)
    decoder, corpus = model.decoder, module.corpus
    total = torch.zeros(decoder.W_down(1).shape[0])
    for each in corpus.drawn("train"):
        ids = torch.tensor([each.clean_ids, each.corrupt_ids])
        found = decoder.capture(ids)
        post = decoder.mlp_post(1, found.resid_pre[1] + found.attn_write[1])
        total += (post[0] - post[1]).square().sum(0).sqrt() * decoder.W_down(1).norm(dim=1)
    want = {f"mlp_post@1:{neuron}[last]" for neuron in total.topk(3).indices.tolist()}
    kinds = tables["interventions"]
    assert {key.partition(":")[2] for key in kinds["intervention"]} == want
    assert _shares(tables["metrics"])["head"].isna().all()


def test_what_does_not_fit_is_refused(model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of layer_resid it is the patch of the window's last"):
        _module(model, granularity="layer_resid", windows=[(0, 1)])
    with pytest.raises(
        ValueError, match=r"\[2, 3\] is no window of two or more layers among 0 to 2"
    ):
        _module(model, granularity="mlp_out", windows=[(2, 3)])
    with pytest.raises(ValueError, match="are 2 for 1 granularities"):
        _module(model, granularity="mlp_out", positions=["last", "all"])
    with pytest.raises(ValueError, match="prompts of this corpus have the roles changed"):
        _run(_module(model, positions="aligned:subject", windows=[]), tmp_path)


def test_windows_are_thirds_and_positions_are_of_each_granularity() -> None:
    assert windows_of("thirds", ["mlp_out"], 12) == [
        ("early", 0, 3), ("middle", 4, 7), ("late", 8, 11),
    ]  # fmt: skip
    assert places([3, 4], ["mlp_out", "head_out"]) == ((3, 4), (3, 4))
    assert places(["each", "last"], ["mlp_out", "head_out"]) == ("each", "last")
    plan = Plan(
        n_layers=3, granularity=("head_out",), positions=("each",), layers=[0], heads=[(0, 1)],
        neurons=[], windows=[("early", 0, 1)], reach=2,
    )  # fmt: skip
    keys = [each.unit.key for each in plan.planned()]
    assert keys == ["patch:0.1[last]", "patch:0.1[aligned:-2]", "patch:attn_out@0-1"]


def test_a_share_of_no_distance_is_not_told() -> None:
    from allostasis.analysis import patching, prompts

    rng = np.random.default_rng(0)
    names = [f"g{i}" for i in range(30)]
    assert "does not tell the two prompts" in patching.gate(rng.normal(0, 1, 30), names)
    assert patching.gate(rng.normal(3, 1, 30), names) == ""
    assert "no prompt of a competent cell" in patching.gate(np.array([]), [])
    with pytest.raises(UndefinedError, match="recovery was not recorded"):
        prompts.patch_recovery(pd.DataFrame({"ld": [0.0]}))


def test_recovery_is_a_ratio_of_sums_and_not_a_mean_of_ratios() -> None:
    """Trap 15: a planted mixture in which the two have opposite signs."""
    from allostasis.analysis import patching

    apart = np.array([10.0, 10.0, 0.1, 0.1])
    moved = np.array([[-2.0, -1.8, 0.1, 0.09]])
    found = patching.recovery(moved, apart, list("abcd"))
    assert found.value[0] == pytest.approx(moved.sum() / apart.sum())
    assert found.value[0] < 0 < (moved / apart).mean()
