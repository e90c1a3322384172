"""Taking a head away takes away what it writes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from allostasis.engines.subjects import Filling, ToySubject
from allostasis.interventions.plant import plant, strength
from allostasis.metrics.head_write_variance import deviations
from allostasis.models.toy_transformer import Block, ToyTransformer
from allostasis.tasks.splits import next_tokens

TIGHT = {"rtol": 0.0, "atol": 1e-12}  # float64, sums of some hundred terms


@pytest.fixture
def model() -> ToyTransformer:
    toy = ToyTransformer(seed=0, vocab_size=32, seq_len=8, d_model=16, n_layers=2, n_heads=4)
    for block in toy.blocks:
        assert isinstance(block, Block)
        for bias in (block.attn.b_Q, block.attn.b_K, block.attn.b_V, block.attn.b_O):
            torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(1))
    return toy.double().requires_grad_(False)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(32, (5, 9), generator=torch.Generator().manual_seed(2))


def _attention(model: ToyTransformer, layer: int) -> Block:
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return block


@pytest.mark.parametrize("layer", [0, 1])
def test_head_writes_sum_and_ablation_subtracts_one_head(
    model: ToyTransformer, tokens: Tensor, layer: int
) -> None:
    batch, attn = next_tokens(tokens), _attention(model, layer).attn
    _, cache = model.run_with_cache(batch.tokens)
    z = cache[f"blocks.{layer}.attn.hook_z"]
    writes = torch.einsum("sphk,hkd->sphd", z, attn.W_O)
    attn_out = cache[f"blocks.{layer}.hook_attn_out"]
    assert_close(writes.sum(dim=2) + attn.b_O, attn_out, **TIGHT)
    subject = ToySubject(model)
    intact = subject.streams(batch, [], None)[layer, "mid"]
    for head in range(4):
        without = subject.streams(batch, [(layer, head)], Filling("zero"))[layer, "mid"]
        assert_close(intact - without, writes[:, :, head], **TIGHT)
        donors = tuple(other.flip(0) for other in subject.z(batch.tokens))
        filled = Filling("resample", donors, torch.arange(5))
        swapped = subject.streams(batch, [(layer, head)], filled)[layer, "mid"]
        expected = writes[:, :, head] - writes[:, :, head].flip(0)
        assert_close(intact - swapped, expected, **TIGHT)


def test_zeroing_coordinates_of_the_output_is_another_thing(
    model: ToyTransformer, tokens: Tensor
) -> None:
    """The predecessor's "head" is a slice of the attention's output, to which all heads write."""
    _, cache = model.run_with_cache(tokens[:, :-1])
    writes = torch.einsum(
        "sphk,hkd->sphd", cache["blocks.0.attn.hook_z"], _attention(model, 0).attn.W_O
    )
    sliced = cache["blocks.0.hook_attn_out"].clone()
    sliced[..., 4:] = 0
    others = writes[:, :, 1:].sum(dim=2)[..., :4]
    assert (sliced[..., :4] - writes[:, :, 0, :4]).norm() > 0.5 * others.norm()


def test_a_silent_head_has_no_effect_at_all(model: ToyTransformer, tokens: Tensor) -> None:
    _attention(model, 1).attn.W_O[2] = 0
    batch, subject = next_tokens(tokens), ToySubject(model)
    ablated = subject.ablated_losses(batch, [(1, 2)], Filling("zero"))[0]
    assert torch.equal(ablated, subject.losses(batch))


@given(alpha=st.floats(0.1, 5.0), host=st.integers(0, 3), step=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_plant_has_alpha_squared_the_variance_and_goes_without_a_trace(
    alpha: float, host: int, step: int
) -> None:
    toy = ToyTransformer(seed=1, vocab_size=32, seq_len=8, d_model=16, n_layers=2, n_heads=4)
    toy = toy.double().requires_grad_(False)
    source = (host + step) % 4
    tokens = torch.randint(32, (6, 9), generator=torch.Generator().manual_seed(3))
    batch, subject = next_tokens(tokens), ToySubject(toy)
    attn = _attention(toy, 1).attn
    without = subject.ablated_losses(batch, [(1, host)], Filling("zero"))
    plant(attn, host=host, source=source, alpha=alpha)
    # exact: without the host nothing of the plant is left
    assert torch.equal(subject.ablated_losses(batch, [(1, host)], Filling("zero")), without)
    variances = deviations(subject.z(batch.tokens)[1], attn.W_O).mean(dim=(0, 1))
    assert_close(variances[host], alpha**2 * variances[source], rtol=1e-9, atol=0)


@given(ratio=st.floats(0.2, 10.0), values=st.lists(st.floats(0.1, 9.0), min_size=3, max_size=3))
def test_a_plant_has_the_ratio_it_was_made_for(ratio: float, values: list[float]) -> None:
    variances = torch.tensor(values, dtype=torch.float64)
    alpha = strength(variances, host=0, source=2, ratio=ratio)
    assert alpha**2 * values[2] == pytest.approx(ratio * (values[1] + values[2]) / 2)


def test_impossible_plants_are_refused(model: ToyTransformer) -> None:
    attn = _attention(model, 0).attn
    with pytest.raises(ValueError, match="cannot suppress itself"):
        plant(attn, host=1, source=1, alpha=1.0)
    with pytest.raises(ValueError, match="heads 0 to 3"):
        plant(attn, host=4, source=1, alpha=1.0)
    with pytest.raises(ValueError, match="no copy of it varies"):
        strength(torch.tensor([1.0, 0.0]), host=0, source=1, ratio=2.0)
