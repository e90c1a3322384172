"""OV circuits against closed forms of planted heads, writes against TransformerLens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from allostasis.engines import ov
from allostasis.engines.prompts import Prompt, Rows
from allostasis.models.blocks import Decoder
from allostasis.models.lens import bridge, pretrained
from allostasis.models.zoo import LanguageModel

ARCHS = (
    pytest.param("gpt_neox", marks=pytest.mark.slow),
    pytest.param("llama", marks=pytest.mark.slow),
    "gemma3_text",
    "gpt2",
)
CLOSE = 2e-5


@pytest.fixture(scope="module", params=ARCHS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return pretrained(arch=request.param)


def _rows() -> tuple[Rows, list[str]]:
    generator = torch.Generator().manual_seed(0)
    prompts: list[Prompt] = []
    for length in (5, 9, 9, 5, 8):
        prompts.append(tuple(torch.randint(4, 100, (length,), generator=generator).tolist()))
    rows = Rows(prompts=prompts, target=[10, 11, 12, 13, 14], foil=[40, 41, 42, 43, 44])
    return rows, ["a", "b", "b", "c", "d"]


class Folded:
    """The weights of a model read by hand: what follows a head's output up to the logits."""

    def __init__(self, hf: Any) -> None:
        self.kind = hf.config.model_type
        self.hf = hf
        body = {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(self.kind, "model")
        self.body = getattr(hf, body)
        names = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}
        self.norm = getattr(self.body, names.get(self.kind, "norm"))
        self.gain = self.norm.weight + (self.kind == "gemma3_text")
        self.W_U = hf.get_output_embeddings().weight.T

    def logits(self, write: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
        """A write's share of the logits, with the final norm's scale of the whole stream."""
        if self.kind in {"gpt2", "gpt_neox"}:
            scale = (stream.var(-1, correction=0, keepdim=True) + self.norm.eps).sqrt()
            write = write - write.mean(-1, keepdim=True)
        else:
            eps = getattr(self.norm, "variance_epsilon", None) or self.norm.eps
            scale = (stream.square().mean(-1, keepdim=True) + eps).sqrt()
        return (write / scale * self.gain) @ self.W_U

    def after_attention(self, layer: int, write: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Gemma's norm after attention, at the scale of the whole attention's output."""
        if self.kind != "gemma3_text":
            return write
        norm = self.body.layers[layer].post_attention_layernorm
        scale = (out.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return write / scale * (1 + norm.weight)


@torch.no_grad()
def test_writes_equal_those_read_off_transformer_lens(model: LanguageModel) -> None:
    rows, clusters = _rows()
    decoder, folded, lens = model.decoder, Folded(model.hf), bridge(model)
    ends = ov.ends_of(decoder, rows, clusters)
    for layer in range(decoder.n_layers):
        logits, writes, streams, answers = [], [], [], []
        for row, prompt in enumerate(rows.prompts):
            _, cache = lens.run_with_cache(torch.tensor([prompt]))
            z = cache[f"blocks.{layer}.attn.hook_z"][0, -1]
            stream = cache[f"blocks.{decoder.n_layers - 1}.hook_resid_post"][0, -1]
            W_O = lens.blocks[layer].attn.W_O  # noqa: N806
            write = torch.einsum("hk,hkd->hd", z, W_O)
            bias = lens.blocks[layer].attn.b_O if folded.kind in {"gpt2", "gpt_neox"} else 0
            write = folded.after_attention(layer, write, (write.sum(0) + bias)[None])
            found = folded.logits(write, stream)
            logits.append(found)
            writes.append(write)
            streams.append(stream.norm())
            answers.append((found[:, rows.target[row]], found[:, rows.foil[row]]))
        mean, vector = torch.stack(logits).mean(0), torch.stack(writes).mean(0)
        for one in ov.writes(decoder, ends, layer, range(decoder.n_heads), top_k=5):
            best = mean[one.head].topk(5)
            torch.testing.assert_close(one.top.logits, best.values, atol=CLOSE, rtol=1e-4)
            assert one.top.ids.tolist() == best.indices.tolist()
            worst = mean[one.head].topk(5, largest=False)
            torch.testing.assert_close(one.bottom.logits, worst.values, atol=CLOSE, rtol=1e-4)
            norm = float(vector[one.head].norm())
            assert one.vector_norm == pytest.approx(norm, rel=1e-4)
            assert one.norm_ratio == pytest.approx(
                norm / float(torch.stack(streams).mean()), rel=1e-4
            )
            right, wrong = (
                float(torch.stack([a[i][one.head] for a in answers]).mean()) for i in (0, 1)
            )
            assert one.target == pytest.approx(right, abs=CLOSE)
            assert one.delta == pytest.approx(right - wrong, abs=CLOSE)


@torch.no_grad()
def test_values_of_a_circuit_are_those_of_a_token_that_attends_to_itself(
    model: LanguageModel,
) -> None:
    """TransformerLens: z of a prompt of one token is its value; the stream is set to e."""
    decoder, folded, lens = model.decoder, Folded(model.hf), bridge(model)
    inputs = torch.arange(4, 60, 7)
    for layer in range(decoder.n_layers):
        kept: list[torch.Tensor] = []

        def put(value: torch.Tensor, hook: Any) -> torch.Tensor:
            del value, hook
            return decoder.embed(inputs)[:, None]  # noqa: B023

        def keep(value: torch.Tensor, hook: Any, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            del hook
            kept.append(value[:, 0])
            return value

        hooks = [(f"blocks.{layer}.hook_resid_pre", put), (f"blocks.{layer}.attn.hook_z", keep)]
        lens.run_with_hooks(inputs[:, None], fwd_hooks=hooks)
        (z,) = kept
        W_O = lens.blocks[layer].attn.W_O  # noqa: N806
        write = torch.einsum("nhk,hkd->nhd", z, W_O)
        if folded.kind == "gemma3_text":
            write = write * (1 + folded.body.layers[layer].post_attention_layernorm.weight)
        if folded.kind in {"gpt2", "gpt_neox"}:
            write = write - write.mean(-1, keepdim=True)
        logits = (write * folded.gain) @ folded.W_U
        rank = (logits > logits.gather(2, inputs[:, None, None].expand(-1, z.shape[1], 1))).sum(-1)
        for one in ov.circuits(decoder, layer, range(decoder.n_heads), inputs, top_k=4):
            best = logits.mean(0)[one.head].topk(4)
            assert one.top.ids.tolist() == best.indices.tolist()
            torch.testing.assert_close(one.top.logits, best.values, atol=1e-4, rtol=1e-4)
            copied = (rank[:, one.head] < 0.01 * decoder.n_vocab).double().mean()
            assert one.copying_score == float(copied)


@torch.no_grad()
def test_norms_and_eigenvalues_are_those_of_the_whole_matrices(model: LanguageModel) -> None:
    """What is computed from factors as small as a head, against matrices as large as the model."""
    decoder, folded = model.decoder, Folded(model.hf)
    every = torch.arange(decoder.n_vocab)
    for layer in (0, 2):
        nothing = decoder.attn_norm(layer, torch.zeros(1, decoder.d_model))
        read = (decoder.attn_norm(layer, decoder.embed(every)) - nothing).double().numpy()
        for one in ov.circuits(decoder, layer, [1, 3], every[:9], top_k=2):
            W_V, W_O = decoder.W_V(layer)[one.head], decoder.W_O(layer)[one.head]  # noqa: N806
            whole = (W_V @ W_O).double().numpy()
            assert one.frobenius_norm == pytest.approx(np.linalg.norm(whole), rel=1e-6)
            assert one.spectral_norm == pytest.approx(np.linalg.norm(whole, 2), rel=1e-6)
            eigenvalues = np.linalg.eigvals(whole)
            share = eigenvalues.sum().real / np.abs(eigenvalues).sum()
            assert one.ov_positivity == pytest.approx(share, abs=1e-4)
            gain = decoder.attn_post_gain(layer)
            out = W_O if gain is None else W_O * gain
            if decoder.is_centred:
                out = out - out.mean(-1, keepdim=True)
            tokens = read @ (W_V @ (out * folded.gain) @ folded.W_U).double().numpy()
            eigenvalues = np.linalg.eigvals(tokens)
            share = eigenvalues.sum().real / np.abs(eigenvalues).sum()
            assert one.eigenvalue_positivity == pytest.approx(share, abs=1e-3)


@torch.no_grad()
def planted(sign: float, *, frobenius: float = 2.0) -> Decoder:
    """A tiny llama whose head 0.1 writes what it reads, times a sign, in its 8 dimensions.

    Every token is a signed unit vector, half of them within the head's dimensions.
    """
    decoder = pretrained(arch="llama").decoder
    d_model, d_head = decoder.d_model, decoder.d_head
    table = torch.eye(d_model)[torch.arange(decoder.n_vocab) % d_head]
    decoder.model.get_input_embeddings().weight.copy_(table)
    decoder.model.get_output_embeddings().weight.copy_(table)
    for norm in (decoder.blocks[0].input_layernorm, decoder.model.model.norm):
        norm.weight.fill_(1.0)
    attention = decoder.blocks[0].self_attn
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[:d_head, :d_head] = torch.eye(d_head) * frobenius
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[:d_head, d_head : 2 * d_head] = torch.eye(d_head) * sign
    return decoder


@pytest.mark.parametrize(("sign", "copying"), [(1.0, 1.0), (-1.0, 0.0)])
def test_a_planted_copying_head_has_the_numbers_of_its_closed_form(
    sign: float, copying: float
) -> None:
    decoder = planted(sign)
    inputs = torch.arange(0, 200)
    (one,) = ov.circuits(decoder, 0, [1], inputs, top_k=3)
    assert one.copying_score == copying
    assert one.eigenvalue_positivity == pytest.approx(sign)
    assert one.ov_positivity == pytest.approx(sign)
    assert one.spectral_norm == pytest.approx(2.0)
    assert one.frobenius_norm == pytest.approx(2.0 * decoder.d_head**0.5)


def test_the_standard_error_counts_clusters_and_not_rows() -> None:
    """A row that is there twice in one cluster tells nothing new; closed form of one dimension."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=12)
    rows = torch.tensor(values)[:, None]
    alone = ov.standard_error(rows, torch.arange(12))
    assert alone == pytest.approx(values.std(ddof=1) / 12**0.5)
    twice = ov.standard_error(rows.repeat(2, 1), torch.arange(12).repeat(2))
    assert twice == pytest.approx(alone)
    with pytest.raises(ValueError, match="one cluster of prompts has no spread"):
        ov.standard_error(rows, torch.zeros(12, dtype=torch.long))
