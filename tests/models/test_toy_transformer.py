"""The toy transformer: causality, norms, hook points, and both ways of its attention."""

import math

import pytest
import torch
from torch.testing import assert_close

NORMS = ["pre", "post", "rms", "none"]
SIZES = {"seed": 0, "vocab_size": 20, "seq_len": 12, "d_model": 16, "n_layers": 2}


def build(**settings):
    from allostasis.models.toy_transformer import ToyTransformer

    return ToyTransformer(**{**SIZES, **settings})


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(20, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("at", [0, 5, 10])
def test_future_tokens_do_not_change_earlier_logits(norm, at: int, tokens: torch.Tensor) -> None:
    model = build(norm=norm)
    changed = tokens.clone()
    changed[:, at + 1] = (changed[:, at + 1] + 1) % 20
    assert torch.equal(model(tokens)[:, : at + 1], model(changed)[:, : at + 1])
    assert not torch.equal(model(tokens)[:, at + 1], model(changed)[:, at + 1])


def test_unmasked_mutant_fails_the_leak_test(tokens: torch.Tensor) -> None:
    mutant = build(causal=False)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 20
    assert not torch.equal(mutant(tokens)[:, :6], mutant(changed)[:, :6])


@pytest.mark.parametrize("norm", NORMS)
def test_attention_is_the_same_with_and_without_its_pattern(norm, tokens: torch.Tensor) -> None:
    model = build(norm=norm).double()
    short = model(tokens)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda pattern, hook: None)]):
        assert_close(model(tokens), short, rtol=1e-10, atol=1e-12)


def test_pattern_has_batch_head_query_key_shape(tokens: torch.Tensor) -> None:
    _, cache = build().run_with_cache(tokens)
    pattern = cache["blocks.1.attn.hook_pattern"]
    assert pattern.shape == (3, 4, 12, 12)
    assert_close(pattern.sum(dim=-1), torch.ones(3, 4, 12))
    assert pattern.triu(1).abs().max() == 0


@pytest.mark.parametrize("norm", NORMS)
def test_head_writes_and_bias_sum_to_what_attention_adds(norm, tokens: torch.Tensor) -> None:
    model = build(norm=norm)
    torch.nn.init.normal_(model.blocks[0].attn.b_O)
    _, cache = model.run_with_cache(tokens)
    attn = model.blocks[0].attn
    writes = torch.einsum("bqhk,hkd->bqhd", cache["blocks.0.attn.hook_z"], attn.W_O)
    assert_close(writes.sum(dim=2) + attn.b_O, cache["blocks.0.hook_attn_out"])


def test_an_untrained_post_norm_stream_has_the_length_of_its_gain() -> None:
    model = build(norm="post", d_model=128, n_layers=1)
    tokens = torch.arange(12)[None]
    _, cache = model.run_with_cache(tokens)
    lengths = cache["blocks.0.hook_resid_post"].norm(dim=-1)
    assert_close(lengths, torch.full_like(lengths, math.sqrt(128)), rtol=0, atol=1e-3)
    assert not torch.allclose(cache["blocks.0.hook_mlp_sum"].norm(dim=-1), lengths, rtol=0.1)


def test_a_layer_norm_undoes_a_scale() -> None:
    from allostasis.models.toy_transformer import LayerNorm, RMSNorm

    resid = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for norm in (LayerNorm(64), RMSNorm(64)):
        assert_close(norm(0.3 * resid), norm(resid), rtol=0, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_sites_say_what_stands_around_them(norm, tokens: torch.Tensor) -> None:
    """A scale at a site is undone where all readers normalise, and nowhere else."""
    model = build(norm=norm).double().requires_grad_(False)
    for (
        block
    ) in model.blocks:  # without biases an MLP is homogeneous, and a norm after it undoes all
        torch.nn.init.normal_(block.mlp.b_in)
    clean = model(tokens)
    for name, site in model.sites().items():
        with model.hooks(fwd_hooks=[(name, lambda value, hook: 3.0 * value)]):
            moved = float((model(tokens) - clean).abs().max())
        assert (moved < 1e-3) == site.all_readers_normalise, name
        if site.feeds_unembed:
            with model.hooks(fwd_hooks=[(name, lambda value, hook: 3.0 * value)]):
                assert_close(model(tokens), 3 * clean)
    last = model.sites()["blocks.1.hook_resid_post"]
    assert last.feeds_unembed == (norm == "none")
    assert model.normalised_sites == (
        {f"blocks.{i}.hook_resid_{p}" for i in (0, 1) for p in ("mid", "post")}
        | {"blocks.1.hook_resid_pre"}
        if norm == "post"
        else set()
    )


def test_a_hook_on_the_norm_sees_it_before_its_gain(tokens: torch.Tensor) -> None:
    model = build()
    torch.nn.init.normal_(model.ln_final.w)
    plain = model(tokens)
    _, cache = model.run_with_cache(tokens)
    normed = cache["ln_final.hook_normalized"]
    assert_close(normed.var(dim=-1, correction=0), torch.ones(3, 12), rtol=1e-2, atol=1e-2)
    assert_close((normed * model.ln_final.w + model.ln_final.b) @ model.W_U, plain)


def test_groups_part_the_parameters_and_seeds_the_weights() -> None:
    model = build()
    weights = model.weights()
    named = [name for names in weights.groups.values() for name in names]
    assert sorted(named) == sorted(weights.named)
    assert torch.equal(build().W_E, model.W_E)
    assert not torch.equal(build(seed=1).W_E, model.W_E)


def test_what_does_not_fit_is_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="cannot be shared among n_heads=3"):
        build(n_heads=3)
    with pytest.raises(ValueError, match="final_norm=true needs a kind of norm"):
        build(norm="none", final_norm=True)
    with pytest.raises(ValueError, match="the model knows 12 positions"):
        build()(torch.zeros(1, 13, dtype=torch.int64))
