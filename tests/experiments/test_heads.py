"""The head lab on planted models and on a corpus of random tokens, without words."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch

from allostasis.analysis import lattice
from allostasis.callbacks.recorder import Identity
from allostasis.callbacks.tables import Tables
from allostasis.core.interrupt import Interrupted
from allostasis.core.progress import Ticker
from allostasis.experiments.heads.lab import Engine, Verify
from allostasis.experiments.heads.pairs import HeadsPairs
from allostasis.experiments.heads.zero import HeadsZero
from allostasis.models.lens import pretrained
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.probes.encoded import Encoded, Example, Tokens
from allostasis.tasks.probes.rows import Probe
from allostasis.tasks.probes.task import Probes

TARGET, FOIL = 10, 40


class FakeTask(Probes):
    """Random prompts of three lengths; answers of one token, or of several."""

    def __init__(self, *, n: int = 18, seed: int = 0, spans: bool = False) -> None:
        super().__init__(seed=seed, corpus="facts")
        self.n, self.long = n, spans

    def build(self, encode: Any, tokenizer: Any) -> Any:
        del encode, tokenizer
        rng = np.random.default_rng(5)

        def prompt(length: int) -> tuple[int, ...]:
            return tuple(int(t) for t in rng.integers(50, 90, length))

        form = ("fake", "fake", "all")
        pool = {(*form, length): tuple(prompt(length) for _ in range(8)) for length in (5, 6, 8)}
        examples = []
        for number in range(self.n):
            target = (TARGET, 11, 12)[: 1 + number % 3] if self.long else (TARGET,)
            foil = (FOIL, 41)[: 1 + number % 2] if self.long else (FOIL,)
            clean = prompt((5, 6, 8)[number % 3])
            row = Probe(
                id=f"fake-{number}", corpus="facts", family="fake", template="fake", cell="all",
                group=f"g{number // 2}", clean="?", corrupt="?", target=" a", foil=" b",
            )  # fmt: skip
            split: Any = ("train", "test", "val")[(number // 3) % 3]
            tokens = Tokens(clean, clean[::-1], target, foil)
            examples.append(Example(number, row, split, tokens))
        return Encoded(
            corpus="facts", examples=tuple(examples), sha256="fake", requested=self.n, dropped={},
            n_extra=0, seed=self.seed, frac=1.0, n_reference=8, pool=pool,
        )  # fmt: skip


def _model(arch: str = "llama") -> LanguageModel:
    """A copy that may be changed."""
    known = pretrained(arch=arch)  # pyright: ignore[reportArgumentType]
    hf = copy.deepcopy(known.hf)
    return LanguageModel(
        hf, known.tokenizer, title=known.title, identity=known.identity, facts=known.facts
    )


def _zero(model: LanguageModel | None = None, task: Probes | None = None, **settings: Any) -> Any:
    given = {"verify": Verify(units=0), "engine": Engine(max_tokens=40)} | settings
    return HeadsZero(model=model or _model(), task=task or FakeTask(), **given)


def _pairs(**settings: Any) -> Any:
    given = {"verify": Verify(units=0), "engine": Engine(max_tokens=40)} | settings
    model = given.pop("model", None) or _model()
    return HeadsPairs(model=model, task=given.pop("task", None) or FakeTask(), **given)


def _tables(module: Any, workspace: Path) -> dict[str, pd.DataFrame]:
    module.workspace = workspace
    return module.test_step(module.task, 0)["tables"]


def _read(table: pd.DataFrame, metric: str, split: str = "test") -> pd.DataFrame:
    rows = table[(table["metric"] == metric) & (table["split"] == split)]
    return rows[rows["intervention"].notna()].set_index("intervention")


# ---------------------------------------------------------------- heads_zero


def test_a_head_that_writes_nothing_has_no_effect(tmp_path: Path) -> None:
    model = _model()
    model.decoder.W_O(1)[2].zero_()
    metrics = _tables(_zero(model), tmp_path)["metrics"]
    delta = _read(metrics, "logit_diff")["delta"]
    assert abs(delta["zero:1.2"]) < 1e-6
    assert _read(metrics, "flip_rate")["value"]["zero:1.2"] == 0
    assert (delta.drop("zero:1.2").abs() > 1e-4).all()


def _planted() -> LanguageModel:
    """A GPT-2 whose head 0.2 writes the same against the target whatever it reads."""
    model = _model("gpt2")
    decoder: Any = model.decoder
    attn = decoder.blocks[0].attn
    columns = slice(
        2 * decoder.d_model + 2 * decoder.d_head, 2 * decoder.d_model + 3 * decoder.d_head
    )
    with torch.no_grad():
        attn.c_attn.weight[:, columns] = 0.0
        attn.c_attn.bias[columns] = 1.0
        against = decoder.W_U[:, FOIL] - decoder.W_U[:, TARGET]
        decoder.W_O(0)[2] = 1.5 * against / against.norm() / decoder.d_head**0.5
        for layer in range(decoder.n_layers):  # what comes behind shall not undo it
            decoder.blocks[layer].mlp.c_proj.weight.mul_(0.05)
            for head in range(decoder.n_heads):
                if (layer, head) != (0, 2):
                    decoder.W_O(layer)[head].mul_(0.05)
    return model


def test_a_planted_suppressor_ranks_first_and_top_suppressors_have_positive_delta(
    tmp_path: Path,
) -> None:
    """Trap 25."""
    module = _zero(_planted())
    tables = _tables(module, tmp_path)
    assert module.summary()["top_suppressor"] == "zero:0.2"
    ranks = _read(tables["metrics"], "effect.rank_signed")["value"]
    assert ranks["zero:0.2"] == 1
    assert _read(tables["metrics"], "effect.percentile_layer")["value"]["zero:0.2"] == 100
    assert _read(tables["metrics"], "effect.percentile_model")["value"]["zero:0.2"] == 100
    assert all(found["train"] > 0 for found in module.facts["suppressors"].values())
    marked = tables["examples"]
    assert set(marked.loc[marked["set"] == "suppressor", "intervention"]) == {"zero:0.2"}


def test_clean_baseline_equals_a_plain_forward(tmp_path: Path) -> None:
    """Trap 7: the baseline is the untouched model, not a mean over the sweep."""
    module = _zero()
    tables = _tables(module, tmp_path)
    for row in tables["baseline"].itertuples():
        example = next(e for e in module.corpus.examples if e.example == row.example)
        with torch.no_grad():
            logits = module.model.hf(torch.tensor([example.tokens.clean])).logits[0, -1]
        assert row.ld == pytest.approx(float(logits[TARGET] - logits[FOIL]), abs=1e-5)


def test_sham_has_zero_flip_rate(tmp_path: Path) -> None:
    """Trap 6: a model that errs on most prompts flips none if nothing is done to it."""
    metrics = _tables(_zero(scales=[1.0, 0.0]), tmp_path)["metrics"]
    flips, errors = _read(metrics, "flip_rate"), _read(metrics, "top1_error")
    sham = [key for key in flips.index if key.startswith("scale1:")]
    assert len(sham) == 12
    assert (flips.loc[sham, "value"] == 0).all()
    assert (errors["value_clean"] > 0.2).all()
    np.testing.assert_allclose(errors.loc[sham, "delta"], 0)
    assert (_read(metrics, "kl_divergence").loc[sham, "value"] < 1e-9).all()


@pytest.mark.slow
def test_positions_and_ablations_are_honoured(tmp_path: Path) -> None:
    """Trap 3."""
    ways: list[dict[str, Any]] = [
        {}, {"positions": "last"}, {"positions": [0]}, {"ablation": "mean"},
        {"ablation": "resample", "n_donors": 2}, {"scales": [0.5]},
    ]  # fmt: skip
    found = [
        _read(_tables(_zero(**way), tmp_path / str(i))["metrics"], "logit_diff")["delta"]
        for i, way in enumerate(ways)
    ]
    for one in range(len(found)):
        for other in range(one):
            assert np.abs(found[one].to_numpy() - found[other].to_numpy()).max() > 1e-4


@pytest.mark.slow
def test_every_way_is_what_transformer_lens_gives(tmp_path: Path) -> None:
    for number, way in enumerate((
        {"ablation": "mean"}, {"ablation": "resample", "n_donors": 2}, {"positions": "last"},
    )):  # fmt: skip
        module = _zero(verify=Verify(units=3, prompts=4, atol=1e-4), layers=[1], **way)
        assert "verify" in _tables(module, tmp_path / str(number))
        assert module.facts["verify"]["passed"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": []}, "module.heads is an empty list"),
        ({"layers": []}, "module.layers is an empty list"),
        ({"scales": []}, "module.scales is an empty list"),
        ({"layers": [3]}, r"the model has layers 0 to 2, not \[3\]"),
        ({"heads": ["0.4"]}, "head 4 does not exist in layer 0: the model has heads 0 to 3"),
        ({"heads": ["3.0"]}, "the model has layers 0 to 2"),
        ({"ablation": "mean", "scales": [0.5]}, "multiplies a head's output"),
    ],
)
def test_what_would_do_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _zero(**settings)


def test_answers_of_several_tokens_are_read_whole(tmp_path: Path) -> None:
    module = _zero(task=FakeTask(spans=True), layers=[1])
    tables = _tables(module, tmp_path)
    hf = module.model.hf

    def log_p(prompt: tuple[int, ...], answer: Sequence[int]) -> float:
        with torch.no_grad():
            logits = hf(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        return sum(float(logits[place, token]) for place, token in zip(at, answer, strict=True))

    test = module.asked.at("test")
    want = [
        log_p(e.tokens.clean, e.tokens.target) - log_p(e.tokens.clean, e.tokens.foil)
        for e in (module.asked.examples[index] for index in test)
    ]
    metrics = tables["metrics"]
    rows = metrics[(metrics["metric"] == "span_logit_diff") & (metrics["split"] == "test")]
    clean = rows[rows["intervention"].isna()]["value"].iloc[0]
    assert clean == pytest.approx(np.mean(want), abs=1e-5)
    assert rows["delta"].abs().max() > 1e-4


def test_the_trajectory_of_the_clean_model_is_that_of_its_residual_stream(tmp_path: Path) -> None:
    module = _zero(trajectory=True, layers=[0, 2])
    metrics = _tables(module, tmp_path)["metrics"]
    example = module.asked.examples[0]
    with torch.no_grad():
        seen = module.model.hf(torch.tensor([example.tokens.clean]), output_hidden_states=True)
    steps = seen.hidden_states[-2][0].diff(dim=0)
    clean = pd.Series(module.asked.rows.prompts)
    assert clean[0] == example.tokens.clean
    base = _tables(_zero(trajectory=True, layers=[0]), tmp_path / "one")["baseline"]
    own = base[base["example"] == example.example].iloc[0]
    assert own["step_no_first"] == pytest.approx(float(steps[1:].norm(dim=1).mean()), rel=1e-5)
    cosine = torch.cosine_similarity(steps[:-1], steps[1:], dim=1)
    assert own["curvature"] == pytest.approx(float(cosine.arccos().mean()), rel=1e-4)
    delta = _read(metrics, "trajectory_curvature")["delta"]
    assert delta["zero:0.0"] != 0
    assert delta["zero:2.0"] == 0  # the last layer comes behind the stream that is read


# ---------------------------------------------------------------- interruption


def _write(module: Any, folder: Path) -> None:
    identity = Identity(
        run_id="heads", exp="heads_zero", condition="facts", seed=0, device="cpu"
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[Tables(folder=folder, identity=identity)],
    )  # fmt: skip
    trainer.test(module, datamodule=module.task, verbose=False)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_interrupted_after_any_layer_it_resumes_and_its_tables_are_byte_identical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    _write(_zero(), tmp_path / "whole")
    said: list[int] = []

    def stop(self: Ticker, done: int, planned: int) -> None:
        del self, planned
        said.append(done)
        if len(said) == stop_after:
            raise Interrupted(2)

    stopped = _zero(engine=Engine(max_tokens=40))
    with monkeypatch.context() as patch:
        patch.setattr(Ticker, "__call__", stop)
        with pytest.raises(Interrupted):
            _write(stopped, tmp_path / "cut")
    assert stopped.facts["completed_units"] == 4 * stop_after
    assert stopped.facts["planned_units"] == 12
    part = pd.read_parquet(tmp_path / "cut" / "interventions.parquet")
    assert len(part) == 4 * stop_after
    assert set(part["layer_min"]) == {*range(stop_after)}
    whole = pd.read_parquet(tmp_path / "whole" / "metrics.parquet")
    cut = pd.read_parquet(tmp_path / "cut" / "metrics.parquet")
    both = _read(whole, "logit_diff").loc[part["intervention"]]
    np.testing.assert_array_equal(_read(cut, "logit_diff")["delta"], both["delta"])
    _write(_zero(), tmp_path / "cut")
    for name in ("metrics", "examples", "interventions", "baseline"):
        files = [(tmp_path / run / f"{name}.parquet").read_bytes() for run in ("whole", "cut")]
        assert files[0] == files[1], name


def test_a_measured_budget_is_kept_and_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allostasis.engines.budget import Budget

    asked: list[int] = []

    def measured(decoder: Any) -> Budget:
        del decoder
        asked.append(1)
        return Budget(37)

    monkeypatch.setattr(Budget, "measured", measured)
    for _ in range(2):
        _tables(_zero(engine=Engine()), tmp_path)
    in_sweeps = (tmp_path / "sweep" / "budget.json").read_text()
    assert '"max_tokens": 37' in in_sweeps
    assert len(asked) <= 3  # once for the sweep, and for the val split of each session


# ---------------------------------------------------------------- heads_pairs


def test_sets_have_no_layer_or_head(tmp_path: Path) -> None:
    """Trap 25: a set lives in members, so that triples never land in a table of layers."""
    tables = _tables(_pairs(layers=[1]), tmp_path)
    rows = _read(tables["metrics"], "logit_diff")
    assert len(rows) == 4 + 6 + 4
    several = rows.index.str.contains(r"\+")
    assert rows.loc[several, "layer"].isna().all()
    assert rows.loc[~several, "layer"].notna().all()
    kinds = tables["interventions"].set_index("intervention")
    assert kinds.loc["zero:1.0+1.2+1.3", "members"] == "1.0+1.2+1.3"
    assert kinds.loc["zero:1.0+1.2+1.3", "size"] == 3


def test_interactions_and_exact_ranks_are_those_of_the_effects(tmp_path: Path) -> None:
    metrics = _tables(_pairs(layers=[0]), tmp_path)["metrics"]
    v = _read(metrics, "logit_diff")["delta"]
    pair = _read(metrics, "interaction")["value"]["zero:0.1+0.3"]
    assert pair == pytest.approx(v["zero:0.1+0.3"] - v["zero:0.1"] - v["zero:0.3"], abs=1e-9)
    pairs = v[[key for key in v.index if key.count("+") == 1]]
    p = _read(metrics, "effect.null_p")["value"]
    for key in pairs.index:
        assert p[key] == pytest.approx((pairs >= pairs[key]).mean())
    assert {int(n) for n in _read(metrics, "effect.null_p")["n_unique"]} == {4, 6}


def test_restore_equals_smaller_set(tmp_path: Path) -> None:
    """Trap 9: a set zeroed and one head put back, by hooks, is the smaller set of the lattice."""
    module = _pairs(layers=[0], k=3)
    examples = _tables(module, tmp_path)["examples"]
    restored = examples[examples["set"] == "restored"]
    assert len(restored["intervention"].unique()) == 3
    key = str(restored["intervention"].iloc[0])
    head = int(key.removeprefix("restore:0.").partition("|")[0])
    whole = [int(name.partition(".")[2]) for name in key.partition("zero:")[2].split("+")]
    decoder = module.decoder
    kept: list[torch.Tensor] = []

    def zero_then_restore(_: object, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        z = args[0].unflatten(-1, (decoder.n_heads, -1)).clone()
        kept.append(z[:, :, head].clone())
        z[:, :, whole] = 0
        z[:, :, head] = kept[-1]
        return (z.flatten(-2),)

    for row in restored[restored["intervention"] == key].itertuples():
        example = next(e for e in module.corpus.examples if e.example == row.example)
        handle = decoder.out_projection(0).register_forward_pre_hook(zero_then_restore)
        with torch.no_grad():
            logits = module.model.hf(torch.tensor([example.tokens.clean])).logits[0, -1]
        handle.remove()
        assert float(logits[TARGET] - logits[FOIL]) == pytest.approx(row.ld, abs=1e-4)


def test_sets_may_lie_in_several_layers(tmp_path: Path) -> None:
    module = _pairs(
        sets="explicit", members=[["0.1", "2.3"]], verify=Verify(units=3, prompts=4, atol=1e-4)
    )
    v = _read(_tables(module, tmp_path)["metrics"], "interaction")
    assert list(v.index) == ["zero:0.1+2.3"]
    assert module.facts["verify"]["passed"]


@pytest.mark.parametrize("sets", ["pairs", "explicit"])
def test_sets_without_heads_are_refused(sets: str) -> None:
    with pytest.raises(ValueError, match=r"module\.sets="):
        _pairs(sets=sets)


@pytest.mark.slow
def test_pairs_are_made_of_the_largest_suppressors_of_another_run(tmp_path: Path) -> None:
    """Largest change above 0 on train, not smallest value."""
    from allostasis.core.records import RunRecord

    _write(_zero(_planted()), tmp_path)
    module = _pairs(model=_planted(), sets="pairs", top_k_from="heads_zero", k=3)
    module.take({"heads_zero": RunRecord(tmp_path, {"run_id": "heads"})})
    assert (0, 2) in module.top
    train = _read(pd.read_parquet(tmp_path / "metrics.parquet"), "logit_diff", "train")["delta"]
    want = train[train > 0].nlargest(3).index
    assert sorted(f"zero:{lattice.name_of((head,))}" for head in module.top) == sorted(want)
