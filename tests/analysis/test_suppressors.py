"""From single sequences to a verdict on the ratio of variances; what does not agree is open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from allostasis.analysis import claim_files, claims, suppressors
from allostasis.analysis.aggregate import arms
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.verdicts import Result, judge
from allostasis.core.records import read_run, write_json
from allostasis.experiments import superposition

VALUES = ("resample", "mean", "zero")
Write = Callable[..., RunView]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes a run of the language model with ratios of our choice."""
    registered = claim_files.freeze(
        claim_files.load(Path(superposition.__path__[0]), "superposition")
    )

    def make(ratios: dict[str, float], *, stream: float = 0.9, n: int = 192) -> RunView:
        rng = np.random.default_rng(0)
        frames = []
        for value, ratio in ratios.items():
            at = {"split": "measure", "ablation": value, "set": "all",
                  "intervention": f"{value}:suppressors", "example": range(n),
                  "cluster": [f"sequence:{i:03d}" for i in range(n)]}  # fmt: skip
            for layer, tilt in ((3, 1.25), (7, 0.8)):  # the geometric mean undoes the tilt
                noise = rng.lognormal(0, 0.3, size=(2, n))
                frames.append(pd.DataFrame({**at, "layer": layer, "energy": ratio * tilt * noise[0],
                                            "energy_clean": noise[1]}))  # fmt: skip
            noise = rng.lognormal(0, 0.3, size=n)
            frames.append(pd.DataFrame({**at, "stream": stream * noise * rng.lognormal(0, 0.01, n),
                                        "stream_clean": noise}))  # fmt: skip
        identity = {"run_id": "superposition-suppressors_lm-0-cpu-x", "exp": "superposition",
                    "condition": "suppressors_lm", "seed": 0, "device": "cpu"}  # fmt: skip
        folder = tmp_path / "run"
        folder.mkdir()
        examples = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(
            {"ablation": [], "set": [], "intervention": [], "cluster": [], "example": []}
        )  # fmt: skip
        examples.astype({"layer": "Int64"} if frames else {}).assign(**identity).to_parquet(
            folder / "examples.parquet"
        )
        none = {v: "none found: 0 of 270 heads selected" for v in VALUES if v not in ratios}
        write_json(folder / "run.json", {
            **identity, "status": "done", "config_hash": "x", "device_resolved": "cpu",
            "claims": registered["hashes"], "checkpoints": {}, "model": {"title": "Small"},
            "summary": {"no_ratio": none},
        })  # fmt: skip
        write_json(folder / "config.yaml", {
            "task": {"_target_": "allostasis.tasks.text.Text", "n_sequences": 512, "n_tokens": 64},
            "module": {"layers": None}, "model": {},
        })  # fmt: skip
        return RunView(read_run(folder))

    return make


def _judged(view: RunView) -> dict[str, Result]:
    registered = claim_files.load(Path(superposition.__path__[0]), "superposition")
    return {result.claim.id: result for result in judge(registered, arms([view]))}


def test_three_ablations_that_say_more_than_two_support_it(write: Write) -> None:
    results = _judged(write(dict.fromkeys(VALUES, 3.0)))
    one = results["D1.lm.resample"]
    assert one.verdict.word == "supported"
    assert one.inference is not None
    assert one.inference.estimate == pytest.approx(3.0, rel=0.1)
    assert one.interval is not None
    assert "BCa" in one.interval.method
    assert one.interval.low is not None
    assert 2 < one.interval.low < 3
    assert "Small on Text only" in one.verdict.reason
    assert results["D1.lm"].verdict.word == "supported"
    assert results["D2.lm"].verdict.word == "supported"
    assert results["D3.ratio.lm"].verdict.word == "refuted"  # the stream varies less without them
    assert results["D3.ci.lm"].verdict.word == "supported"
    assert results["D1"].verdict.word == "undecided"  # no toy transformer was run


def test_three_ablations_that_say_less_than_two_refute_it(write: Write) -> None:
    results = _judged(write(dict.fromkeys(VALUES, 1.0)))
    assert results["D1.lm"].verdict.word == "refuted"
    assert results["D1"].verdict.word == "refuted"
    assert results["D2.lm"].verdict.word == "undecided"


def test_ablations_that_do_not_agree_decide_nothing(write: Write) -> None:
    results = _judged(write({"resample": 3.0, "mean": 1.0, "zero": 3.0}))
    assert results["D1.lm.resample"].verdict.word == "supported"
    assert results["D1.lm.mean"].verdict.word == "refuted"
    assert results["D1.lm"].verdict.word == "undecided"
    assert "do not agree" in results["D1.lm"].verdict.reason


def test_what_was_not_found_has_a_reason(write: Write) -> None:
    results = _judged(write({"resample": 3.0}))
    assert results["D1.lm.zero"].verdict.word == "undecided"
    assert "none found: 0 of 270 heads selected" in results["D1.lm.zero"].verdict.reason
    assert results["D1.lm"].verdict.word == "undecided"


def test_bounds_alone_alter_a_verdict(write: Write) -> None:
    view = write(dict.fromkeys(VALUES, 3.0))
    registered = claim_files.load(Path(superposition.__path__[0]), "superposition")
    moved = [
        claim.model_copy(update={"bound": 4.0}) if claim.id == "D1.lm.mean" else claim
        for claim in registered
    ]
    digest = claim_files.freeze(moved)["hashes"]
    view.run["claims"] = digest
    results = {result.claim.id: result for result in judge(moved, arms([view]))}
    assert results["D1.lm.mean"].verdict.word == "refuted"
    assert results["D1.lm.resample"].verdict.word == "supported"


def test_agree_belongs_to_compounds() -> None:
    with pytest.raises(claims.ClaimError, match="`agree` is about the atoms of a compound"):
        claim_files.read(
            "- {id: A, source: own, text: t, family: f, status: own, agree: true, "
            "estimand: {summary: final, of: mean}, arms: {treatment: a}, select: {metric: m}, "
            "direction: greater, bound: 0.0, test: t}",
            origin="here",
        )


def test_the_detector_corrects_over_every_head() -> None:
    rng = np.random.default_rng(0)
    effects = rng.normal(0, 0.05, size=(60, 1))
    effects += 0.0125 - effects.mean()
    alone = suppressors.detect(effects, np.random.default_rng(1))
    among = suppressors.detect(
        np.hstack([effects, rng.normal(-0.02, 0.05, size=(60, 269))]), np.random.default_rng(1)
    )
    assert alone.selected[0]
    assert not among.selected[0]
    assert bool((among.q >= among.p).all())


def test_selection_repeated_tells_how_often_anything_is_found() -> None:
    rng = np.random.default_rng(3)
    energies = suppressors.simulated_energies(rng, n_heads=4)
    effects = rng.normal(0, 0.05, size=(80, 4))
    effects[:, 1] += 0.1
    again = suppressors.reselected(effects, energies, rng, draws=20)
    assert again.found == 1.0
    assert again.low < again.high
    with pytest.raises(UndefinedError, match="none found in any of 5"):
        suppressors.reselected(effects - 1.0, energies, rng, draws=5)


def test_a_variance_of_zero_is_no_ratio() -> None:
    silent: dict[str, Any] = {"generator": np.random.default_rng(0)}
    with pytest.raises(UndefinedError, match="variance of 0"):
        suppressors.GeometricRatio(np.ones((5, 1)), np.zeros((5, 1)), **silent)
    with pytest.raises(UndefinedError, match="one sequence"):
        suppressors.GeometricRatio(np.ones((1, 1)), np.ones((1, 1)), **silent)


def test_variances_are_drawn_once_for_ablations_that_found_no_head() -> None:
    """The heads and their variances are the same whatever an ablation selects of them."""
    from pathlib import Path

    from allostasis.analysis import aggregate, suppressor_figures
    from allostasis.analysis.curves import RunView
    from allostasis.core.records import read_runs

    study = Path(__file__).parents[2] / "experiments" / "2026-11-27_superposition_smollm2_fewer"
    (run,) = (RunView(record) for record in read_runs(study / "runs"))

    def titles() -> list[str]:
        drawn = suppressor_figures.variances(aggregate.arms([run]))
        return [axis.get_title("left").rpartition(", ")[2] for axis in drawn.axes]

    assert titles() == ["mean", "zero"]
    for scan in run.run["suppressors"].values():
        scan["selected"] = []
    assert titles() == ["resample"]
