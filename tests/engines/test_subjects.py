"""Losses of ablated heads against the whole model, one head and one full forward at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from allostasis.engines.budget import Budget
from allostasis.engines.subjects import DecoderSubject, Filling, ToySubject, Value, filling
from allostasis.models.lens import pretrained
from allostasis.models.toy_transformer import ToyTransformer
from allostasis.tasks.sequences import Sequences
from allostasis.tasks.splits import next_tokens

ARCHS = ("gpt2", "gpt_neox", "llama", "gemma2", "gemma3_text")
VALUES: tuple[Value, ...] = ("resample", "mean", "zero")
EXACT = {"rtol": 0.0, "atol": 2e-5}  # float32, another order of sums


def _batch(n: int, seed: int) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    batch = next_tokens(torch.randint(4, 100, (n, 8), generator=generator))
    scored = torch.rand(batch.tokens.shape, generator=generator) < 0.7
    scored[:, 0] = True
    return Sequences(batch.tokens, batch.targets, scored)


def _mean_losses(logits: Tensor, batch: Sequences) -> Tensor:
    each = functional.cross_entropy(logits.float().mT, batch.targets, reduction="none")
    return torch.stack([row[mask].mean() for row, mask in zip(each, batch.scored, strict=True)])


@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_a_language_models_suffix_equals_the_whole_model_with_a_hook(arch: Any) -> None:
    model = pretrained(arch=arch)
    decoder = model.decoder
    subject = DecoderSubject(decoder, Budget(24))
    batch, reference = _batch(5, 0), subject.z(_batch(4, 1).tokens)
    assert_close(subject.losses(batch), _mean_losses(model.hf(batch.tokens).logits, batch), **EXACT)
    heads = [(layer, head) for layer in (0, decoder.n_layers - 1) for head in range(2)]
    for value in VALUES:
        fill = filling(value, reference, 5, torch.Generator().manual_seed(2))
        found = subject.ablated_losses(batch, heads, fill)
        for index, (layer, head) in enumerate(heads):
            whole = _hooked(model.hf, decoder, layer, head, fill, batch)
            assert_close(found[index], _mean_losses(whole, batch), **EXACT)
        assert (found - subject.losses(batch)).abs().max() > 1e-4


def _hooked(
    hf: Any, decoder: Any, layer: int, head: int, fill: Filling, batch: Sequences
) -> Tensor:
    def change(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].unflatten(-1, (decoder.n_heads, -1)).clone()
        z[:, :, head] = fill.of(layer, z)[:, :, head]
        return (z.flatten(-2),)

    handle = decoder.out_projection(layer).register_forward_pre_hook(change)
    try:
        return hf(batch.tokens).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("arch", ["llama", "gpt_neox"])
@torch.no_grad()
def test_streams_are_those_of_the_whole_model(arch: Any) -> None:
    model = pretrained(arch=arch)
    subject, batch = DecoderSubject(model.decoder), _batch(3, 4)
    last = (subject.n_layers - 1, "post")
    fill = filling("mean", subject.z(_batch(4, 1).tokens), 3, torch.Generator())
    for heads, here in (([], None), ([(0, 1)], fill)):
        stream = subject.streams(batch, heads, here)[last]
        logits = model.decoder.unembed(model.decoder.final_norm(stream))
        whole = (
            model.hf(batch.tokens).logits
            if here is None
            else _hooked(model.hf, model.decoder, 0, 1, here, batch)
        )
        assert_close(logits, whole, **EXACT)


@torch.no_grad()
def test_a_toy_transformers_losses_do_not_depend_on_how_it_is_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from allostasis.engines import subjects

    toy = ToyTransformer(seed=0, vocab_size=100, seq_len=8, d_model=16, n_layers=2)
    subject, batch = ToySubject(toy), _batch(6, 5)
    heads = [(0, 1), (1, 3)]
    fill = filling("resample", subject.z(_batch(4, 1).tokens), 6, torch.Generator().manual_seed(0))
    whole = subject.losses(batch), subject.ablated_losses(batch, heads, fill)
    assert_close(whole[0], _mean_losses(toy(batch.tokens), batch), **EXACT)
    monkeypatch.setattr(subjects, "LOGITS", 1500)
    assert_close(subject.losses(batch), whole[0], **EXACT)
    assert_close(subject.ablated_losses(batch, heads, fill), whole[1], **EXACT)
