"""Superposition: what is found where something is, and that nothing is where nothing is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from allostasis.analysis import suppressors
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.polysemanticity import within_slope
from allostasis.analysis.suppressors import Energies
from allostasis.metrics.feature_capacity import feature_capacity
from allostasis.metrics.feature_dimensionality import feature_dimensionality
from allostasis.metrics.head_write_variance import class_variances, deviations
from allostasis.models.toy_model import ToyModel

N_SETS = 400


def two_se(rate: float, n: int) -> float:
    return 2 * float(np.sqrt(rate * (1 - rate) / n))


# ---- finding


def _clustered_null(rng: np.random.Generator, n: int = 96, heads: int = 8) -> np.ndarray:
    """Effects without a mean: heavy tails, and half of each is shared by all heads."""
    shared = rng.standard_t(4, size=(n, 1))
    return 0.05 * (shared + rng.standard_t(4, size=(n, heads)))


def test_detector_null_rate() -> None:
    rng = np.random.default_rng(0)
    found = [
        suppressors.detect(_clustered_null(rng), rng, min_effect=0.0, flips=999).count > 0
        for _ in range(N_SETS)
    ]
    assert np.mean(found) <= 0.05 + two_se(0.05, N_SETS)
    effects = _clustered_null(rng) - 0.03  # heads that help, whatever their signs
    rate = suppressors.null_selection_rate(effects, rng, min_effect=0.0)
    assert rate <= 0.05 + two_se(0.05, 200)


def test_the_circular_detector_fires_where_there_is_nothing() -> None:
    """The source's way: the heads with most variance are suppressors, and their variance is read
    on the samples that chose them. Ours reads it on others."""
    rng = np.random.default_rng(1)
    circular = split = chosen = 0
    for _ in range(N_SETS):
        seen, fresh = rng.lognormal(0, 1.1, size=(2, 32, 8))
        means = seen.mean(axis=0)
        selected = means > 1.5 * np.median(means)
        if not selected.any() or selected.all():
            continue
        chosen += 1
        for sample, where in ((seen, "circular"), (fresh, "split")):
            energies = Energies(sample, np.ones(32), np.zeros(8, dtype=int))
            interval = energies.compared(selected).interval(rng, draws=400)
            assert interval.low is not None
            outside = interval.low > 1
            circular += outside and where == "circular"
            split += outside and where == "split"
    assert chosen / N_SETS > 0.3
    assert circular / N_SETS > 0.15
    assert split / N_SETS <= 0.05 + two_se(0.05, N_SETS)


def test_a_real_suppressor_is_found_among_many_heads() -> None:
    rng = np.random.default_rng(2)
    effects = _clustered_null(rng, heads=40)
    effects[:, 7] += 0.05
    effects[:, 9] += 0.002  # real, and too small to matter
    found = suppressors.detect(effects, rng, flips=4_999)
    assert found.selected[7]
    assert not found.selected[9]
    assert found.count == 1


# ---- measuring


@pytest.mark.slow
def test_ratio_interval_coverage() -> None:
    coverage = suppressors.relabelled_coverage(np.random.default_rng(0), n_sets=N_SETS)
    assert 0.93 - two_se(0.95, N_SETS) <= coverage <= 0.97 + two_se(0.95, N_SETS)


@given(factor=st.floats(0.01, 100), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_ratio_and_its_interval_follow_the_scale(factor: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    plain = suppressors.simulated_energies(rng, n_sequences=30, n_heads=6)
    layers = np.array([0, 0, 0, 1, 1, 1])
    chosen = np.array([True, False, False, False, False, True])
    before = Energies(plain.values, plain.tokens, layers).compared(chosen)
    scaled = np.where(chosen, factor, 1.0) * plain.values
    after = Energies(scaled, plain.tokens, layers).compared(chosen)
    assert after.ratio == pytest.approx(factor * before.ratio)
    assert before.ratio == pytest.approx(float(np.exp(np.log(before.by_layer).mean())))
    low, high = (part.interval(np.random.default_rng(0), draws=200) for part in (before, after))
    assert low.low is not None
    assert high.low is not None
    assert high.low == pytest.approx(factor * low.low, rel=1e-6)


def test_variances_between_and_within_classes_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(60, 2, 3, generator=generator, dtype=torch.float64)
    W_O = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)  # noqa: N806
    classes = torch.arange(60) % 7
    parts = class_variances(z, W_O, classes)
    writes = torch.einsum("thk,hkd->thd", z, W_O)
    total = writes.var(dim=0, correction=0).sum(dim=-1) / 5
    assert_close(parts["between"] + parts["within"], total)
    assert_close(deviations(z[None], W_O).mean(dim=(0, 1)), total)


def test_no_layer_of_both_kinds_is_no_ratio() -> None:
    energies = suppressors.simulated_energies(np.random.default_rng(0), n_heads=3)
    with pytest.raises(UndefinedError, match="0 of 3 heads selected"):
        energies.compared(np.zeros(3, dtype=bool))
    with pytest.raises(UndefinedError, match="none is clean"):
        energies.compared(np.ones(3, dtype=bool))


@torch.no_grad()
def test_a_sink_at_position_0_is_in_no_variance_of_a_language_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every sequence begins with a token whose embedding is 1,000 times as long as others."""
    from allostasis.engines.subjects import DecoderSubject
    from allostasis.experiments.superposition.collected import Collected
    from allostasis.experiments.superposition.survey import Rule, Survey
    from allostasis.models.lens import pretrained
    from allostasis.tasks.splits import next_tokens

    model = pretrained(arch="llama")
    weights = model.hf.get_input_embeddings().weight
    planted = weights.clone()
    planted[3] *= 1_000
    monkeypatch.setattr(weights, "data", planted)

    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split in ("calibrate", "select", "measure"):
        tokens = torch.randint(4, 100, (12, 9), generator=generator)
        tokens[:, 0] = 3
        splits[split] = next_tokens(tokens)
    subject = DecoderSubject(model.decoder)
    heads = [(layer, head) for layer in range(subject.n_layers) for head in range(subject.n_heads)]
    survey = Survey(subject, splits, heads, seed=0, rule=Rule(draws=100, outer=2))  # type: ignore[arg-type]
    monkeypatch.setattr(  # three heads are found, whatever their effects
        survey, "detect", lambda effects: suppressors.Detection(
            effects.mean(axis=0), np.ones(len(heads)), np.ones(len(heads)),
            np.isin(np.arange(len(heads)), chosen),
        ),
    )  # fmt: skip
    chosen = [0, 1, len(heads) - 1]
    found = Collected()
    survey.record(["zero"], found)
    rows = {(r["metric"], r.get("layer"), r.get("head")): r for r in found.readings}

    hidden: dict[str, torch.Tensor] = {}
    layers = model.hf.model.layers

    def run(silent: list[tuple[int, int]]) -> torch.Tensor:
        """What the last block gives; heads' values are kept, some are silenced before."""

        def hook(layer: int):  # noqa: ANN202
            def read(module: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
                del module
                z = args[0].unflatten(-1, (subject.n_heads, -1)).clone()
                for at, head in silent:
                    if at == layer:
                        z[:, :, head] = 0
                hidden[f"z{layer}"] = z
                return (z.flatten(-2),)

            return read

        def keep(module: object, args: object, out: torch.Tensor | tuple[torch.Tensor]) -> None:
            del module, args
            hidden["end"] = out if isinstance(out, torch.Tensor) else out[0]

        handles = [
            block.self_attn.o_proj.register_forward_pre_hook(hook(i))
            for i, block in enumerate(layers)
        ]
        handles.append(layers[-1].register_forward_hook(keep))
        model.hf(splits["measure"].tokens)
        for handle in handles:
            handle.remove()
        return hidden["end"].double()

    def spread(vectors: torch.Tensor, first: int) -> float:
        flat = vectors[:, first:].flatten(0, 1).numpy()
        return float(flat.var(axis=0).mean())

    intact = run([])
    for layer, head in heads:
        d_head = hidden[f"z{layer}"].shape[-1]
        columns = layers[layer].self_attn.o_proj.weight[:, head * d_head : (head + 1) * d_head]
        writes = hidden[f"z{layer}"][:, :, head].double() @ columns.double().T
        for name, first in (("", 1), (".with_first", 0)):
            row = rows[f"head_write_variance{name}", layer, head]
            assert row["value"] == pytest.approx(spread(writes, first), rel=1e-4)
            assert row["n"] == 12 * (8 - first)
    assert spread(intact, 0) > 100 * spread(intact, 1)
    ablated = run([heads[index] for index in chosen])
    for name, first in (("", 1), ("_with_first", 0)):
        e2 = rows[f"residual_variance.ratio_zero{name}", None, None]["value"]
        assert e2 == pytest.approx(spread(ablated, first) / spread(intact, first), rel=1e-4)
    assert abs(rows["residual_variance.ratio_zero_with_first", None, None]["value"] - 1) < 0.01
    assert abs(rows["residual_variance.ratio_zero", None, None]["value"] - 1) > 0.01
    for part, end in (("", ""), (".with_first", "_with_first")):
        variances = [rows[f"head_write_variance{part}", *head]["value"] for head in heads]
        logs = []
        for layer in {heads[index][0] for index in chosen}:
            here = [index for index, head in enumerate(heads) if head[0] == layer]
            above = [variances[index] for index in here if index in chosen]
            below = [variances[index] for index in here if index not in chosen]
            logs.append(np.log(np.mean(above) / np.mean(below)))
        e1 = rows[f"head_write_variance.ratio_zero{end}", None, None]["value"]
        assert e1 == pytest.approx(np.exp(np.mean(logs)))
    streams = pd.concat(found.examples)["stream_clean"].dropna()
    assert streams.sum() / (12 * 7) == pytest.approx(spread(intact, 1), rel=1e-4)


# ---- controls on a trained model


@pytest.fixture(scope="module")
def run_arm(tmp_path_factory: pytest.TempPathFactory):  # noqa: ANN201
    """A function that runs one arm, small."""
    from hydra import compose, initialize_config_dir

    from allostasis.core.config import conf_dir, register, run_folder
    from allostasis.run import run

    register()
    root = tmp_path_factory.mktemp("superposition")

    def do(condition: str, *words: str) -> Path:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            cfg = compose("config", [
                "exp=superposition", "preset=quick", f"condition='{condition}'", "threads=1",
                "device=cpu", "module.draws=400", "module.outer=5", *words,
            ])  # fmt: skip
        folder = root / run_folder(cfg)
        run(cfg, folder)
        return folder

    return do


def _planted(*plants: tuple[float, float, float, float, bool]) -> dict[str, Any]:
    """What is told of plants: (ratio planted, lower end, upper end, cost, whether it is found)."""
    from allostasis.experiments.superposition.collected import Collected
    from allostasis.experiments.superposition.planted import _told

    rows = [
        {"plant": number, "planted_ratio": ratio, "ratio": (low * high) ** 0.5, "ratio_low": low,
         "ratio_high": high, "cost": cost, "is_found": is_found}
        for number, (ratio, low, high, cost, is_found) in enumerate(plants)
        for _ in ("resample", "zero")
    ]  # fmt: skip
    return _told(rows, Collected())


STRONG, EVEN = (3.0, 2.2, 3.9, 0.4, True), (1.0, 0.8, 1.2, 0.2, True)


@pytest.mark.parametrize(
    ("plants", "failed"),
    [
        ([STRONG, EVEN], set()),
        ([STRONG, (3.0, 1.9, 3.9, 0.4, True), EVEN], {"plant_3_is_above_2"}),
        ([STRONG, (1.0, 1.1, 1.4, 0.2, True)], {"plant_1_covers_1"}),
        ([STRONG, *[EVEN] * 4, (1.0, 1.1, 1.4, 0.2, True)], set()),
        ([STRONG, *[EVEN] * 3, *[(1.0, 1.1, 1.4, 0.2, True)] * 2], {"plant_1_covers_1"}),
        ([STRONG, (3.0, 2.2, 3.9, 0.1, False), EVEN], {"every_costly_plant_is_found"}),
        ([STRONG, (3.0, 2.2, 3.9, 0.05, False), EVEN], set()),
    ],
)
def test_a_plant_that_comes_out_wrong_fails_its_check(
    plants: list[tuple[float, float, float, float, bool]], failed: set[str]
) -> None:
    from allostasis.experiments.superposition.planted import checks

    made, undefined = checks(_planted(*plants))
    assert {name for name, is_right in made.items() if not is_right} == failed
    assert len(made) == 3
    assert not undefined


def test_plants_of_which_none_is_costly_prove_nothing(tmp_path: Path) -> None:
    from allostasis.analysis.curves import RunView
    from allostasis.analysis.summaries import holds
    from allostasis.core.records import read_run, write_json
    from allostasis.experiments.superposition.planted import checks

    cheap = [(3.0, 2.2, 3.9, 0.03, False), (1.0, 0.8, 1.2, 0.01, False)]
    made, undefined = checks(_planted(*cheap))
    assert "every_costly_plant_is_found" not in made
    write_json(tmp_path / "run.json", {
        "run_id": "r", "exp": "superposition", "condition": "planted", "seed": 0, "device": "cpu",
        "status": "done", "config_hash": "x", "summary": {"checks": made, "no_check": undefined},
    })  # fmt: skip
    write_json(tmp_path / "config.yaml", {})
    view = RunView(read_run(tmp_path))
    with pytest.raises(
        UndefinedError, match=r"no plant costs 0.1 nats a token \(the costliest 0.030"
    ):
        holds(view, "every_costly_plant_is_found")
    assert holds(view, "plant_3_is_above_2") == 1.0


@pytest.mark.slow
def test_planted_ratio_is_recovered(run_arm) -> None:  # noqa: ANN001
    folder = run_arm("planted", "module.n_plants=2", "module.n_steps=200")
    facts = json.loads((folder / "run.json").read_text())
    plants = facts["plants"]
    assert facts["status"] == "done"
    assert plants["n_costly"] > 0
    assert plants["n_costly_found"] == plants["n_costly"]
    assert plants["ratio_3"]["mean"] == pytest.approx(3.0, rel=0.1)
    assert plants["ratio_1"]["mean"] == pytest.approx(1.0, rel=0.1)
    assert plants["ratio_3"]["above_2"] == 1.0
    assert all(facts["summary"]["checks"].values())
    assert facts["summary"]["no_check"] == {}


@pytest.mark.slow
def test_all_small_arms_together_make_a_report(run_arm) -> None:  # noqa: ANN001
    from allostasis import report
    from allostasis.analysis.curves import RunView
    from allostasis.analysis.summaries import mean_of_clusters
    from allostasis.core.records import read_run

    words = ["module.n_steps=20", "module.n_sequences=32", "module.n_plants=1", "module.n_sets=4",
             "module.grid.n_steps=20"]  # fmt: skip
    arms = ("suppressors_toy", "planted", "null", "toy_models")
    folders = {condition: run_arm(condition, *words) for condition in arms}
    root = folders["planted"].parents[2]
    assert report.main([str(root)]) == 0
    drawn = {path.stem for path in (root / "report" / "figures").glob("*.png")}
    assert {"effects", "plants", "dimensionality", "capacity"} <= drawn
    # plants are single examples, and no cluster's
    planted = RunView(read_run(folders["planted"]))
    kind = str(planted.prompts("examples")["intervention"].iloc[0])
    with pytest.raises(UndefinedError, match="was not recorded, by cluster"):
        mean_of_clusters(planted, "cost", kind)


@pytest.fixture
def nulls() -> Callable[[], tuple[dict[str, Any], dict[str, bool]]]:
    """A function that runs the negative controls on a small model; its facts and checks."""
    from allostasis.experiments.superposition import null
    from allostasis.experiments.superposition.collected import Collected
    from allostasis.experiments.superposition.survey import Rule
    from allostasis.experiments.superposition.training import held_out
    from allostasis.models.toy_transformer import ToyTransformer
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns

    def run() -> tuple[dict[str, Any], dict[str, bool]]:
        toy = ToyTransformer(seed=0, vocab_size=64, seq_len=16, d_model=32, n_layers=2, n_heads=4)
        splits = held_out(InterleavedPatterns(seed=0, seq_len=16, vocab_size=64), 64)
        facts = null.check_nulls(
            toy.requires_grad_(False), splits, n_sets=30, values=["resample"], seed=0, rule=Rule(),
            found=Collected(),
        )  # fmt: skip
        return facts, null.checks(facts, ["resample"])

    return run


Nulls = Callable[[], tuple[dict[str, Any], dict[str, bool]]]
FOUND = ("nothing_where_there_is_nothing", "nothing_false_in_untrained_models",
         "random_signs_find_none")  # fmt: skip


@pytest.mark.slow
def test_negative_controls_pass_for_the_detector(nulls: Nulls) -> None:
    facts, checks = nulls()
    assert all(checks[name] for name in (*FOUND, "a_silent_head_has_no_effect")), facts
    assert len(checks) == 5


def _uncorrected(effects: np.ndarray, rng: np.random.Generator, **options: Any) -> Any:
    """Each head by its own p, as if it were the only one."""
    flips = options.get("flips", 999)
    p = suppressors.sign_flip_above(effects, rng, flips=flips)
    return suppressors.Detection(effects.mean(axis=0), p, p, p <= 0.05)


def _largest(effects: np.ndarray, rng: np.random.Generator, **options: Any) -> Any:
    """The head with the largest effect, whatever it is."""
    del rng, options
    ones = np.ones(effects.shape[1])
    selected = np.arange(effects.shape[1]) == effects.mean(axis=0).argmax()
    return suppressors.Detection(effects.mean(axis=0), ones, ones, selected)


@pytest.mark.parametrize("eager", [pytest.param(_uncorrected, marks=pytest.mark.slow), _largest])
def test_a_detector_that_finds_too_much_fails_the_negative_controls(
    eager: Any, nulls: Nulls, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allostasis.experiments.superposition import survey

    monkeypatch.setattr(suppressors, "detect", eager)
    monkeypatch.setattr(survey, "detect", eager)
    facts, checks = nulls()
    assert not any(checks[name] for name in FOUND), facts


def test_a_true_head_hides_no_false_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One head of two has an effect on fresh sequences; their mean is above 0."""
    from allostasis.experiments.superposition import null
    from allostasis.experiments.superposition.collected import Collected
    from allostasis.experiments.superposition.survey import Rule, Survey
    from allostasis.models.toy_transformer import ToyTransformer

    def effects(self: Survey, value: str, split: str, heads: Any = None) -> np.ndarray:
        del self, value, heads
        return np.tile([0.3, 0.1] if split == "select" else [0.3, -0.1], (40, 1))

    monkeypatch.setattr(Survey, "effects", effects)
    told = null._untrained(
        ToyTransformer(seed=0, vocab_size=16, seq_len=8, d_model=8, n_layers=1, n_heads=2),
        [(0, 0), (0, 1)], 4, ["zero"], 0, Rule(), Collected(),
    )  # fmt: skip
    assert told["zero"]["mean_effect_again"] == pytest.approx(0.1)
    assert told["zero"]["selected"] == 1.0
    assert told["zero"]["false"] == 1.0  # twice the half that is not there again


@pytest.mark.slow
def test_no_suppressor_gives_a_reason_and_no_ratio(run_arm) -> None:  # noqa: ANN001
    from allostasis.analysis import claim_files
    from allostasis.analysis.aggregate import arms
    from allostasis.analysis.curves import RunView
    from allostasis.analysis.verdicts import judge
    from allostasis.core.records import read_run
    from allostasis.experiments import superposition

    quiet = ("module.n_steps=20", "module.n_sequences=32", "module.min_effect=10.0")
    lm = ("model=tiny", "model.arch=llama", "task.n_sequences=16", "task.n_tokens=16")
    folders = [run_arm("suppressors_toy", *quiet), run_arm("suppressors_lm", *quiet, *lm)]
    for folder in folders:
        metrics = pd.read_parquet(folder / "metrics.parquet")
        assert not metrics["metric"].str.contains("ratio").any()
        assert json.loads((folder / "suppressors.json").read_text())["resample"]["n_selected"] == 0
    views = [RunView(read_run(folder)) for folder in folders]
    registered = claim_files.load(Path(superposition.__path__[0]), "superposition")
    results = {result.claim.id: result for result in judge(registered, arms(views))}
    for name in ("D1.toy.resample", "D1.lm.resample", "D2.toy.resample", "D3.ratio.lm.resample"):
        assert results[name].verdict.word == "undecided"
        assert results[name].inference is None
        alike = results[name].claim.model_copy(update={"settings": {}})
        (again,) = judge([alike], arms(views))
        assert "none found: 0 of" in again.verdict.reason
    assert results["D1"].verdict.word == "undecided"


def test_the_toys_training_can_be_set_and_recorded_runs_keep_their_hash() -> None:
    from hydra import compose, initialize_config_dir

    from allostasis.core.config import conf_dir, config_hash, register

    register()
    words = ["exp=superposition", "device=cpu", "threads=1"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        plain = compose("config", words)
        other = compose("config", [
            *words, "module.schedule=sqrt_decay", "module.patterns.batch_size=16",
        ])  # fmt: skip
    assert config_hash(plain) == "d43232895278"  # of experiments/2026-11-26_superposition_toy
    assert config_hash(other) != config_hash(plain)


def test_the_rate_of_the_toys_training_can_fall(tmp_path: Path) -> None:
    from allostasis.engines.sequence_training import Schedule
    from allostasis.experiments.superposition.collected import Collected
    from allostasis.experiments.superposition.training import held_out, train
    from allostasis.models.toy_transformer import ToyTransformer
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns

    task = InterleavedPatterns(seed=0, seq_len=16, vocab_size=32, batch_size=4)
    watch = held_out(task, 16)["measure"]
    schedules: tuple[Schedule, ...] = ("constant", "sqrt_decay")
    ends = {}
    for schedule in schedules:
        model = ToyTransformer(seed=0, vocab_size=32, seq_len=16, d_model=16)
        before = model.W_E.detach().clone()
        train(
            model, task, n_steps=30, lr=1e-2, schedule=schedule, watch=watch, found=Collected(),
            keep=tmp_path / f"{schedule}.safetensors", name="test",
        )  # fmt: skip
        ends[schedule] = float((model.W_E.detach() - before).norm())
    assert ends["sqrt_decay"] < 0.95 * ends["constant"]


@pytest.mark.parametrize(("accuracy", "word"), [(0.69, "undecided"), (0.95, "refuted")])
def test_a_model_that_did_not_learn_decides_nothing(
    accuracy: float, word: str, tmp_path: Path
) -> None:
    from allostasis.analysis import claim_files
    from allostasis.analysis.aggregate import arms
    from allostasis.analysis.curves import RunView
    from allostasis.analysis.verdicts import judge
    from allostasis.core.records import METRICS_SCHEMA, read_run, write_json, write_table
    from allostasis.experiments import superposition

    registered = claim_files.load(Path(superposition.__path__[0]), "superposition")
    values = ("resample", "mean", "zero")
    views = []
    for seed in range(8):
        identity = {"run_id": f"r{seed}", "exp": "superposition", "condition": "suppressors_toy",
                    "seed": seed, "device": "cpu"}  # fmt: skip
        off = 1 + 0.01 * seed
        readings = [("accuracy.predictable", accuracy + 0.001 * seed, "Psi")]
        for value in values:
            readings += [(f"head_write_variance.ratio_{value}", 1.3 * off, "sigma2"),
                         (f"residual_variance.ratio_{value}", 0.9 * off, "sigma2")]  # fmt: skip
        table: list[dict[str, Any]] = [
            {**identity, "step": 20_000, "split": "measure", "metric": metric, "symbol": symbol,
             "unit": "1", "value": number, "n": 1}
            for metric, number, symbol in readings
        ]  # fmt: skip
        folder = tmp_path / f"seed={seed}"
        folder.mkdir()
        write_json(folder / "run.json", {
            **identity, "status": "done", "config_hash": "x", "device_resolved": "cpu",
            "claims": claim_files.freeze(registered)["hashes"], "summary": {}, "checkpoints": {},
        })  # fmt: skip
        write_json(folder / "config.yaml", {
            "task": {}, "model": {}, "module": {"n_steps": 20_000, "n_sequences": 1024},
        })  # fmt: skip
        write_table(folder / "metrics.parquet", table, METRICS_SCHEMA)
        views.append(RunView(read_run(folder)))
    results = {result.claim.id: result for result in judge(registered, arms(views))}
    for name in ("D1.toy.learned", *(f"D1.toy.learned.{value}" for value in values),
                 "D3.ratio.toy.learned"):  # fmt: skip
        assert results[name].verdict.word == word, results[name].verdict
    learned = results["D.toy.learned"].verdict.word
    assert learned == ("supported" if accuracy > 0.9 else "refuted")
    if word == "undecided":
        reason = results["D1.toy.learned.zero"].verdict.reason
        assert reason == "requires D.toy.learned, which is refuted (on its own: refuted)"
    assert results["D1.toy.zero"].verdict.word == "undecided"  # 3,000 updates are registered


def test_a_run_that_was_cut_short_does_not_train_again(tmp_path: Path) -> None:
    from allostasis.experiments.superposition.collected import Collected
    from allostasis.experiments.superposition.training import held_out, train
    from allostasis.models.toy_transformer import ToyTransformer
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns

    task = InterleavedPatterns(seed=0, seq_len=16, vocab_size=32)
    watch = held_out(task, 16)["measure"]
    made = []
    for _ in range(2):
        model, found = ToyTransformer(seed=0, vocab_size=32, seq_len=16, d_model=16), Collected()
        train(
            model, task, n_steps=4, lr=1e-3, watch=watch, found=found,
            keep=tmp_path / "trained.safetensors", name="test",
        )  # fmt: skip
        made.append((model, found))
    (first, rows), (again, same) = made
    assert rows.readings == same.readings
    assert all(map(torch.equal, first.parameters(), again.parameters()))


# ---- toy models of superposition


@given(
    m=st.integers(1, 6), n=st.integers(1, 9), seed=st.integers(0, 10_000),
    factor=st.floats(0.01, 50),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_capacity_and_dimensionality_keep_to_their_bounds(
    m: int, n: int, seed: int, factor: float
) -> None:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).double()  # noqa: N806
    capacity, size = feature_capacity(W), feature_dimensionality(W)
    assert bool(((capacity >= 0) & (capacity <= 1 + 1e-12)).all())
    assert capacity.sum() <= m + 1e-9
    assert bool(((size >= 0) & (size <= 1 + 1e-12)).all())
    assert_close(feature_capacity(factor * W), capacity)
    assert_close(feature_dimensionality(factor * W), size)


def test_an_antipodal_pair_shares_a_dimension() -> None:
    pair = torch.tensor([[0.7, -0.7, 0.0], [0.0, 0.0, 1.3]]).double()
    assert feature_dimensionality(pair).tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert feature_capacity(pair).tolist() == pytest.approx([0.5, 0.5, 1.0])


def test_models_side_by_side_train_as_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(20, 3, 32, 5, generator=generator)
    importance = torch.tensor([1.0, 0.9, 0.5])[:, None] ** torch.arange(5)

    def train(which: list[int]) -> torch.Tensor:
        model = ToyModel(seed=0, n_models=len(which), d_hidden=2, n_features=5)
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for x in shown:
            optimiser.zero_grad()
            model.losses(x[which], importance[which]).sum().backward()
            optimiser.step()
        return model.W.detach()

    together = train([0, 1, 2])
    for which in range(3):
        assert_close(train([which])[0], together[which], rtol=1e-5, atol=1e-6)


def test_dense_features_of_unlike_importance_get_a_dimension_each() -> None:
    from allostasis.experiments.superposition.features import Grid, train

    grid = Grid(
        hidden=[3], ratios=[2], densities=[1.0], decays=[0.5], n_steps=4_000, batch_size=256,
        lr=1e-2,
    )  # fmt: skip
    model, _ = train(grid, 3, 6, seed=0, device="cpu", name="test")
    W = model.W[0]  # noqa: N806
    represented = W.square().sum(dim=0) >= 1e-3
    assert represented.tolist() == [True] * 3 + [False] * 3
    directions = W[:, :3] / W[:, :3].norm(dim=0)
    assert_close(directions.T @ directions, torch.eye(3), rtol=0, atol=0.02)


@given(slope=st.integers(-30, 30).map(lambda tenth: tenth / 10), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_slope_within_groups_does_not_see_the_groups(slope: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, groups = rng.normal(size=40), rng.integers(0, 5, size=40)
    level = rng.normal(scale=50, size=5)
    found = within_slope(x, slope * x + level[groups], groups.tolist())
    assert found.estimate == pytest.approx(slope, abs=1e-9)


def test_the_slope_of_a_grid_pools_no_two_models() -> None:
    """The first feature of every model has importance 1, whatever the decay."""
    from allostasis.experiments.superposition.collected import Collected
    from allostasis.experiments.superposition.features import Grid, survey

    grid = Grid(
        hidden=[2], ratios=[3], densities=[1.0, 0.1], decays=[1.0, 0.9], n_steps=60, batch_size=64,
        lr=3e-2,
    )  # fmt: skip
    found = Collected()
    facts = survey(grid, seed=0, device="cpu", name="test", found=found)
    table = pd.concat(found.examples)
    table = table[table["represented"]].assign(amplitude=lambda frame: np.log(frame["norm"]))
    equal = table[table["decay"] == 1.0]  # with 0.9 no two features are as important
    columns = ["polysemanticity", "amplitude"]
    off = equal[columns] - equal.groupby("density")[columns].transform("mean")
    x, y = off["polysemanticity"], off["amplitude"]
    assert facts["slope"] == pytest.approx(float((x * y).sum() / (x * x).sum()), rel=1e-9)
    assert facts["n_groups_in_slope"] == 2
    assert facts["n_in_slope"] == len(equal)


def test_a_slope_needs_something_that_varies() -> None:
    with pytest.raises(UndefinedError, match="no two features of one cell"):
        within_slope(np.ones(3), np.arange(3.0), [0, 1, 2])


# ---- the predecessor's procedure


def test_the_published_script_finds_no_suppressor_and_ratios_about_one() -> None:
    """Tokens without pattern, 63 updates, coordinates of the attention's output for heads, and
    variance for suppression: ablated over intact, which hardly anything can raise."""
    from allostasis.models.toy_transformer import ToyTransformer

    generator = torch.Generator().manual_seed(0)
    model = ToyTransformer(
        seed=0, vocab_size=256, seq_len=32, d_model=64, n_layers=2, n_heads=4, d_ff=256
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(63):
        tokens = torch.randint(256, (32, 33), generator=generator)
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.requires_grad_(False)
    tokens = torch.randint(256, (64, 32), generator=generator)

    def variance(layer: int, coordinates: slice | None) -> float:
        def silence(value: torch.Tensor, hook: object) -> torch.Tensor:
            del hook
            changed = value.clone()
            changed[..., coordinates] = 0
            return changed

        hooks = [] if coordinates is None else [(f"blocks.{layer}.hook_attn_out", silence)]
        with model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(tokens)
        stream = cache["blocks.1.hook_resid_post"]
        return float(stream.var(dim=(0, 1)).mean())

    ratios = [
        variance(layer, slice(16 * head, 16 * head + 16)) / variance(layer, None)
        for layer in range(2)
        for head in range(4)
    ]
    assert all(0.85 < ratio < 1.1 for ratio in ratios), ratios
    assert not any(ratio > 1.5 for ratio in ratios)  # the script's own criterion


def test_a_scan_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from allostasis.engines.subjects import ToySubject
    from allostasis.experiments.superposition import survey as module
    from allostasis.experiments.superposition.survey import Rule, Survey
    from allostasis.experiments.superposition.training import held_out
    from allostasis.models.toy_transformer import ToyTransformer
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns

    monkeypatch.setattr(module, "PIECE", 4)
    toy = ToyTransformer(seed=0, vocab_size=32, seq_len=16, d_model=16, n_layers=2)
    toy.requires_grad_(False)
    splits = held_out(InterleavedPatterns(seed=0, seq_len=16, vocab_size=32), 32)
    heads = list(itertools.product(range(2), range(4)))

    def scan(keep: Path | None) -> np.ndarray:
        survey = Survey(ToySubject(toy), splits, heads, seed=0, rule=Rule(), keep=keep)
        return survey.effects("resample", "select")

    whole, first = scan(None), scan(tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    kept[1].unlink()
    np.testing.assert_array_equal(scan(tmp_path), whole)
    np.testing.assert_array_equal(first, whole)
