"""The sweep engine against TransformerLens, one unit and one prompt at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allostasis.engines.budget import Budget
from allostasis.engines.parts import Parts
from allostasis.engines.prompts import Prompt, Rows
from allostasis.engines.readouts import READOUTS
from allostasis.engines.suffix import ShamError, sweep
from allostasis.engines.verify import Oracle, verify_slice
from allostasis.interventions.ablate import Unit
from allostasis.models.lens import pretrained
from allostasis.models.zoo import LanguageModel

ARCHS = ("gpt2", "gpt_neox", "llama", "mistral", "gemma", "gemma3_text", "qwen2")
LENGTH = 7
EXACT = 1e-5


@pytest.fixture(scope="module", params=ARCHS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return pretrained(arch=request.param)


@pytest.fixture(scope="module")
def oracle(model: LanguageModel) -> Oracle:
    return Oracle(model)


def _prompts(n: int, *, length: int = LENGTH, seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(row) for row in torch.randint(4, 100, (n, length), generator=generator).tolist()]


def _rows(prompts: list[Prompt]) -> Rows:
    n = len(prompts)
    return Rows(prompts=prompts, target=list(range(10, 10 + n)), foil=list(range(40, 40 + n)))


def _sources(n: int) -> dict[str, list[tuple[Prompt, ...]]]:
    others = _prompts(3 * n, seed=1)
    return {
        "mean": [tuple(others[3 * i : 3 * i + 3]) for i in range(n)],
        "resample0": [(others[i],) for i in range(n)],
        "patch": [(others[n + i],) for i in range(n)],
    }


def _units(model: LanguageModel) -> list[Unit]:
    """Every op at every site and kind of positions, and sets within and across layers."""
    ops: list[dict[str, Any]] = [
        {"op": "scale", "scale": 0.0},
        {"op": "scale", "scale": 0.5},
        {"op": "mean"},
        {"op": "resample", "donor": 0},
        {"op": "patch"},
    ]
    sites = ["attn_out", "mlp_out", "resid_pre", "resid_post"]
    sites += [] if model.decoder.is_parallel else ["resid_mid"]
    units = []
    heads = (((0, 1),), ((1, 0), (1, 3)), ((0, 2), (1, 1), (2, 0)), ((2, 3),))
    for positions, chosen in (("all", ops), ("last", ops[::4]), ((1, 3), ops[2:3])):
        for op in chosen:
            units += [Unit(members=some, positions=positions, **op) for some in heads]
            layers = (1,) if positions == "all" else (0, 2)
            units += [
                Unit(site=site, members=((layer, None),), positions=positions, **op)
                for site, layer in zip(sites, itertools.cycle(layers))
            ]
    return units


def _expected(oracle: Oracle, rows: Rows, unit: Unit, sources: dict[str, Any]) -> list[float]:
    found = []
    for row, prompt in enumerate(rows.prompts):
        some = () if unit.source is None else sources[unit.source][row]
        logits = oracle.logits(prompt, unit, some).double()
        found.append(float(logits[rows.target[row]] - logits[rows.foil[row]]))
    return found


def test_every_op_site_and_set_equals_transformer_lens(
    model: LanguageModel, oracle: Oracle
) -> None:
    rows, sources, units = _rows(_prompts(2)), _sources(2), _units(model)
    swept = sweep(model.decoder, rows, units, sources=sources, full=False, budget=Budget(64))
    for unit, found in zip(units, swept.values["ld"], strict=True):
        np.testing.assert_allclose(
            found, _expected(oracle, rows, unit, sources), atol=EXACT, err_msg=unit.key
        )


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_drawn_sets_of_heads_equal_transformer_lens(
    model: LanguageModel, oracle: Oracle, data: st.DataObject
) -> None:
    heads = st.tuples(st.integers(0, 2), st.integers(0, 3))
    members = data.draw(st.sets(heads, min_size=1, max_size=5))
    scale = data.draw(st.sampled_from([0.0, -1.0, 0.3, 2.0]))
    length = data.draw(st.integers(2, 9))
    rows = _rows(_prompts(2, length=length, seed=data.draw(st.integers(0, 99))))
    unit = Unit(members=tuple(sorted(members)), scale=scale)
    swept = sweep(model.decoder, rows, [unit], full=False, budget=Budget(64))
    np.testing.assert_allclose(swept.values["ld"][0], _expected(oracle, rows, unit, {}), atol=EXACT)


def test_batching_never_changes_results(model: LanguageModel) -> None:
    """Trap 1: the same prompts one by one, by length, padded on either side, shuffled."""
    prompts = [*_prompts(3, length=4), *_prompts(3, length=9), *_prompts(2, length=6)]
    rows = _rows(prompts)
    units = [Unit(members=((layer, 1),)) for layer in range(3)]
    units.append(Unit(members=((0, 1), (2, 2))))
    want = sweep(model.decoder, rows, units, budget=Budget(1000))
    order = [5, 0, 7, 3, 1, 2, 6, 4]
    shuffled = Rows(
        prompts=[prompts[i] for i in order],
        target=[rows.target[i] for i in order],
        foil=[rows.foil[i] for i in order],
    )
    ways = {
        "one by one": sweep(model.decoder, rows, units, budget=Budget(1)),
        "left": sweep(model.decoder, rows, units, pad="left", budget=Budget(70)),
        "right": sweep(model.decoder, rows, units, pad="right", budget=Budget(70)),
    }
    moved = sweep(model.decoder, shuffled, units, budget=Budget(50))
    for name in READOUTS:
        for way, found in ways.items():
            np.testing.assert_allclose(
                found.values[name], want.values[name], atol=EXACT, err_msg=f"{way} {name}"
            )
        np.testing.assert_allclose(moved.values[name], want.values[name][:, order], atol=EXACT)


def test_patching_a_run_into_itself_changes_nothing(model: LanguageModel) -> None:
    rows = _rows(_prompts(3))
    own = {"patch": [(prompt,) for prompt in rows.prompts]}
    sites = ["z", "attn_out", "mlp_out", "resid_pre", "resid_post"]
    units = [
        Unit(site=site, op="patch", members=((1, 2 if site == "z" else None),))  # pyright: ignore[reportArgumentType]
        for site in sites
    ]
    swept = sweep(model.decoder, rows, units, sources=own, full=False)
    for unit, found in zip(units, swept.values["ld"], strict=True):
        np.testing.assert_allclose(found, swept.clean["ld"], atol=1e-5, err_msg=unit.key)


def test_a_full_overwrite_of_the_stream_gives_the_other_run(model: LanguageModel) -> None:
    rows, others = _rows(_prompts(3)), _prompts(3, seed=5)
    source = {"patch": [(prompt,) for prompt in others]}
    units = [Unit(site="resid_post", op="patch", members=((layer, None),)) for layer in range(3)]
    units.append(Unit(site="resid_post", op="patch", members=((2, None),), positions="last"))
    swept = sweep(model.decoder, rows, units, sources=source, full=False)
    there = sweep(
        model.decoder, replace(rows, prompts=others), [Unit(members=((0, 0),))], full=False
    )
    for found in swept.values["ld"]:
        np.testing.assert_allclose(found, there.clean["ld"], atol=EXACT)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return pretrained(arch="llama")


def test_the_clean_baseline_equals_a_plain_forward(llama: LanguageModel) -> None:
    rows = _rows(_prompts(4))
    swept = sweep(llama.decoder, rows, [Unit(members=((0, 0),))])
    logits = llama.hf(torch.tensor(rows.prompts)).logits[:, -1].double()
    index = torch.arange(4)
    ld = logits[index, torch.tensor(rows.target)] - logits[index, torch.tensor(rows.foil)]
    np.testing.assert_allclose(swept.clean["ld"], ld.numpy(), atol=EXACT)
    p = logits.softmax(-1)
    np.testing.assert_allclose(swept.clean["entropy"], -(p * p.log()).sum(-1), atol=EXACT)
    assert swept.clean["pred_id"].tolist() == logits.argmax(-1).tolist()
    assert swept.clean["kl"].max() <= 1e-9


def test_equal_prompts_are_run_once_and_read_with_their_own_answers(llama: LanguageModel) -> None:
    (prompt,) = _prompts(1)
    rows = Rows(prompts=[prompt, prompt], target=[10, 40], foil=[40, 10])
    swept = sweep(llama.decoder, rows, [Unit(members=((1, 1),))])
    assert swept.profile.n_unique == 1
    assert swept.values["ld"][0, 0] == pytest.approx(-swept.values["ld"][0, 1])


def test_chunking_never_changes_results(llama: LanguageModel) -> None:
    rows = _rows(_prompts(5))
    units = [Unit(members=((layer, head),)) for layer in range(3) for head in range(4)]
    want = sweep(llama.decoder, rows, units, budget=Budget(10_000))
    for tokens in (1, 20, 50, 77):
        found = sweep(llama.decoder, rows, units, budget=Budget(tokens))
        np.testing.assert_allclose(found.values["ld"], want.values["ld"], atol=EXACT)
        np.testing.assert_allclose(found.values["kl"], want.values["kl"], atol=EXACT)


def test_forward_tokens_are_those_of_the_suffix(llama: LanguageModel) -> None:
    """All heads of 3 layers on 2 prompts of 7: layers l + 1.. in full but the last at one token."""
    rows = _rows(_prompts(2))
    units = [Unit(members=((layer, head),)) for layer in range(3) for head in range(4)]
    profile = sweep(llama.decoder, rows, units, full=False).profile
    pairs = 4 * 2 + 1  # with the layer's sham
    suffix = pairs * sum(7 * (2 - layer) + 1 for layer in range(3)) / 3
    assert profile.forward_tokens == pytest.approx(2 * 7 + suffix)
    assert profile.naive_forward_tokens == 2 * 7 * 13


def test_a_change_of_the_last_token_runs_that_token_alone(llama: LanguageModel) -> None:
    rows = _rows(_prompts(2))
    units = [Unit(members=((layer, 1),), positions="last") for layer in range(3)]
    found = sweep(llama.decoder, rows, units)
    whole = sweep(llama.decoder, rows, units, reuse_kv=False)
    for name in READOUTS:
        np.testing.assert_allclose(found.values[name], whole.values[name], atol=EXACT)
    tokens = {"found": 2 * sum(3 - layer for layer in range(3)) / 3}
    tokens["whole"] = 2 * sum(7 * (2 - layer) + 1 for layer in range(3)) / 3
    shams = sum(7 * (2 - layer) + 1 for layer in range(3)) / 3
    assert found.profile.forward_tokens == pytest.approx(2 * 7 + shams + tokens["found"])
    assert whole.profile.forward_tokens == pytest.approx(2 * 7 + shams + tokens["whole"])


def test_what_does_not_fit_into_memory_is_run_in_halves(
    llama: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = _rows(_prompts(5))
    units = [Unit(members=((layer, head),)) for layer in range(3) for head in range(4)]
    want = sweep(llama.decoder, rows, units, budget=Budget(1000))
    original = llama.decoder.attention

    def scarce(layer: int, resid: torch.Tensor, call: Any) -> torch.Tensor:
        if resid.shape[0] * resid.shape[1] > 40:
            raise torch.OutOfMemoryError("no room")
        return original(layer, resid, call)

    llama.decoder.attention = scarce  # pyright: ignore[reportAttributeAccessIssue]
    parts = Parts(tmp_path, "weights prompts")
    try:
        found = sweep(llama.decoder, rows, units, budget=Budget(100), parts=parts)
    finally:
        del llama.decoder.attention  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(found.values["ld"], want.values["ld"], atol=EXACT)
    assert found.profile.max_tokens == 25
    assert "out of memory: 25 tokens side by side" in caplog.text
    assert parts.budget(llama.decoder).max_tokens == 25  # where a later session goes on


def test_finished_layers_are_read_instead_of_run(llama: LanguageModel, tmp_path: Path) -> None:
    rows = _rows(_prompts(3))
    units = [Unit(members=((layer, head),)) for layer in range(3) for head in range(2)]

    def stop(done: int, planned: int) -> None:
        assert planned == 6
        if done == 4:
            raise KeyboardInterrupt

    parts = Parts(tmp_path, "weights prompts")
    with pytest.raises(KeyboardInterrupt):
        sweep(llama.decoder, rows, units, parts=parts, progress=stop)
    whole = sweep(llama.decoder, rows, units)
    resumed = sweep(llama.decoder, rows, units, parts=parts)
    again = sweep(llama.decoder, rows, units, parts=parts)
    for name in READOUTS:
        assert np.array_equal(resumed.values[name], whole.values[name])
        assert np.array_equal(again.values[name], whole.values[name])
    assert resumed.profile.n_passes < whole.profile.n_passes
    assert again.profile.n_passes == 0
    other = sweep(llama.decoder, rows, units, parts=replace(parts, identity="other weights"))
    assert other.profile.n_passes == whole.profile.n_passes


def test_a_model_that_does_more_than_its_blocks_is_refused() -> None:
    model = pretrained(arch="llama")
    block = model.decoder.blocks[1]
    handle = block.register_forward_hook(lambda *passed: passed[2] * 1.01)
    try:
        with pytest.raises(ShamError, match=r"allostasis/models/blocks\.py does not know of"):
            sweep(model.decoder, _rows(_prompts(2)), [Unit(members=((0, 0),))], full=False)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (Unit(members=((3, 0),)), "the model has layers 0 to 2, not 3"),
        (Unit(members=((0, 4),)), "layer 0 has heads 0 to 3, not 4"),
        (Unit(members=((0, 0),), op="mean"), "no prompts are given for 'mean'"),
    ],
)
def test_a_unit_without_a_place_in_the_model_is_refused(
    llama: LanguageModel, unit: Unit, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(llama.decoder, _rows(_prompts(2)), [unit])


def test_a_source_of_another_length_is_refused(llama: LanguageModel) -> None:
    rows = _rows(_prompts(2))
    source = {"patch": [(prompt,) for prompt in _prompts(2, length=5)]}
    unit = Unit(members=((0, 0),), op="patch")
    with pytest.raises(ValueError, match="a prompt of 7 tokens can take values of prompts of the"):
        sweep(llama.decoder, rows, [unit], sources=source)


def test_verify_passes_on_what_was_swept_and_fails_on_other_weights() -> None:
    """Trap: a check that cannot fail. One weight is moved after the sweep."""
    model = pretrained(arch="llama")
    rows = _rows(_prompts(4))
    units = [Unit(members=((layer, head),)) for layer in range(3) for head in range(4)]
    swept = sweep(model.decoder, rows, units, full=False)
    result = verify_slice(model, rows, swept, seed=0)
    assert result["passed"]
    assert result["max_abs_diff"] <= EXACT
    assert len(result["rows"]) == 8 * 4
    weight: torch.Tensor = model.decoder.blocks[1].mlp.down_proj.weight
    weight.data[0, 0] += 1.0
    try:
        assert not verify_slice(model, rows, swept, seed=0)["passed"]
    finally:
        weight.data[0, 0] -= 1.0


def test_peak_memory_does_not_grow_with_the_number_of_units(llama: LanguageModel) -> None:
    """What is alive at once is bounded by the budget: pieces of pairs, never units x prompts."""
    seen: list[int] = []
    original = llama.decoder.attention

    def watch(layer: int, resid: torch.Tensor, call: Any) -> torch.Tensor:
        seen.append(resid.shape[0] * resid.shape[1])
        return original(layer, resid, call)

    llama.decoder.attention = watch  # pyright: ignore[reportAttributeAccessIssue]
    try:
        for n_units in (4, 8):
            units = [Unit(members=((0, h % 4),), scale=h / 10) for h in range(n_units)]
            sweep(llama.decoder, _rows(_prompts(6)), units, full=False, budget=Budget(40))
    finally:
        del llama.decoder.attention  # pyright: ignore[reportAttributeAccessIssue]
    assert max(seen) <= 40


def test_reduced_precision_is_re_checked_and_says_what_it_costs(llama: LanguageModel) -> None:
    rows = _rows(_prompts(4))
    units = [Unit(members=((layer, head),)) for layer in range(3) for head in range(4)]
    swept = sweep(llama.decoder, rows, units, full=False, precision="bf16")
    assert torch.get_float32_matmul_precision() == "highest"
    result = verify_slice(llama, rows, swept, seed=0, precision="bf16")
    assert result["passed"]
    assert result["max_abs_diff"] <= result["atol"] == 0.25
    assert -1 <= result["spearman"] <= 1
    assert 0 <= result["top_overlap"] <= 1
    noisy = {
        unit.key
        for unit, ld in zip(units, swept.values["ld"], strict=True)
        if abs((ld - swept.clean["ld"]).mean()) < 2 * result["max_abs_diff_effect"]
    }
    assert set(result["below_noise"]) == noisy
