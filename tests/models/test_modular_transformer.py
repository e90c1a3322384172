import inspect
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor
from torch.testing import assert_close

from allostasis.models.modular_transformer import ModularTransformer, cross_entropy
from allostasis.tasks.modular_addition import ModularAddition, Pairs

CONF = Path(__file__).parents[2] / "conf"

# Sums of up to 640 products round in another order in the two forwards, nothing else differs.
LOGITS = {torch.float32: 1e-5, torch.float64: 1e-12}
GRADIENTS = {torch.float32: 1e-5, torch.float64: 1e-10}


def gradients(model: ModularTransformer, pairs: Pairs, **how) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model.loss(pairs, **how)
    loss.backward()
    return loss.detach(), {name: w.grad.clone() for name, w in model.named_parameters()}


def unlike(ours: Tensor, oracle: Tensor) -> float:
    return ((ours - oracle).norm() / oracle.norm()).item()


def perturbed(model: ModularTransformer) -> ModularTransformer:
    """The model with its biases away from zero, where no term can hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for bias in (model.b_in, model.b_out):
            bias += 0.1 * torch.randn(bias.shape, generator=generator)
    return model


def away_from_kinks(model: ModularTransformer) -> ModularTransformer:
    """The model with every other neuron always on and the others always off.

    Among two million pre-activations some lie within rounding of zero, and their gradients jump.
    """
    with torch.no_grad():
        model.b_in.fill_(1.0)[::2] = -1.0
    return model


@pytest.mark.parametrize(
    ("dtype", "prepared"), [(torch.float32, away_from_kinks), (torch.float64, perturbed)]
)
@pytest.mark.parametrize("p", [7, 113])
def test_structured_equals_naive_values_and_gradients(p, dtype, prepared) -> None:
    task = ModularAddition(seed=0, p=p, probe_size=8)
    model = perturbed(ModularTransformer(seed=0, p=p)).to(dtype)
    naive_logits = model(task.test.tokens)[:, -1].detach()
    assert_close(model.logits(task.test), naive_logits, rtol=0, atol=LOGITS[dtype])

    model = prepared(ModularTransformer(seed=0, p=p)).to(dtype)
    naive_loss, naive = gradients(model, task.train, engine="naive")
    loss, structured = gradients(model, task.train, engine="structured")
    assert loss.dtype == torch.float64
    assert_close(loss, naive_loss, rtol=LOGITS[dtype], atol=0)
    for name, oracle in naive.items():
        assert unlike(structured[name], oracle) < GRADIENTS[dtype], name


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    p=st.integers(3, 12),
    d_head=st.integers(1, 5),
    n_heads=st.integers(1, 3),
    d_mlp=st.integers(1, 20),
    data=st.data(),
)
def test_structured_equals_naive_for_any_size_and_order_of_pairs(
    seed, p, d_head, n_heads, d_mlp, data
) -> None:
    number = st.integers(0, p - 1)
    chosen = data.draw(st.lists(st.tuples(number, number, number), min_size=1, max_size=20))
    a, b, answer = torch.tensor(chosen).T.contiguous()
    pairs = Pairs(a=a, b=b, answer=answer, p=p)
    sizes = {"p": p, "d_model": d_head * n_heads, "n_heads": n_heads, "d_mlp": d_mlp}
    model = perturbed(ModularTransformer(seed=seed, **sizes)).double()
    naive_loss, naive = gradients(model, pairs, engine="naive")
    loss, structured = gradients(model, pairs)
    assert_close(loss, naive_loss, rtol=1e-12, atol=1e-12)
    for name, oracle in naive.items():
        assert_close(structured[name], oracle, rtol=1e-10, atol=1e-12)


def test_future_tokens_do_not_change_earlier_logits() -> None:
    model = ModularTransformer(seed=0, p=11)
    tokens = torch.tensor([[3, 4, 11], [5, 0, 11]])
    for position in (1, 2):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position:], after[:, position:])


def test_published_sizes_have_226_816_parameters() -> None:
    model = ModularTransformer(seed=0)
    assert sum(weight.numel() for weight in model.parameters()) == 226_816


def test_initial_weights_have_the_stated_spread_and_biases_are_zero() -> None:
    model = ModularTransformer(seed=0)
    for name, weight in model.named_parameters():
        if name.startswith("b_"):
            assert (weight == 0).all()
            continue
        std = 1 / math.sqrt(114 if name == "W_U" else 128)
        # five standard errors of a mean, and of a standard deviation, of n normal numbers
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())
        assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * weight.numel())


def test_the_seed_alone_decides_the_initial_weights() -> None:
    first = ModularTransformer(seed=5)
    torch.rand(3)
    again, other = ModularTransformer(seed=5), ModularTransformer(seed=6)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        assert name.startswith("b_") or not torch.equal(weight, other.get_parameter(name))


def test_hook_points_have_transformer_lens_names_and_shapes() -> None:
    model = ModularTransformer(seed=0, p=11, d_model=24, n_heads=4, d_mlp=10)
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 11], [3, 4, 11]]))
    assert {name: tuple(value.shape) for name, value in cache.items()} == {
        "hook_embed": (2, 3, 24),
        "hook_pos_embed": (2, 3, 24),
        "blocks.0.hook_resid_pre": (2, 3, 24),
        "blocks.0.attn.hook_q": (2, 3, 4, 6),
        "blocks.0.attn.hook_k": (2, 3, 4, 6),
        "blocks.0.attn.hook_v": (2, 3, 4, 6),
        "blocks.0.attn.hook_attn_scores": (2, 4, 3, 3),
        "blocks.0.attn.hook_pattern": (2, 4, 3, 3),
        "blocks.0.attn.hook_z": (2, 3, 4, 6),
        "blocks.0.hook_attn_out": (2, 3, 24),
        "blocks.0.hook_resid_mid": (2, 3, 24),
        "blocks.0.mlp.hook_pre": (2, 3, 10),
        "blocks.0.mlp.hook_post": (2, 3, 10),
        "blocks.0.hook_mlp_out": (2, 3, 24),
        "blocks.0.hook_resid_post": (2, 3, 24),
    }
    pattern = cache["blocks.0.attn.hook_pattern"]
    assert_close(pattern.sum(-1), torch.ones(2, 4, 3))
    assert (pattern.triu(1) == 0).all()


def test_streams_are_the_hooked_residual_stream_at_equals() -> None:
    model = perturbed(ModularTransformer(seed=0, p=11)).double()
    pairs = ModularAddition(seed=0, p=11, probe_size=8).test
    _, cache = model.run_with_cache(pairs.tokens)
    streams = model.streams(pairs.a, pairs.b)
    assert_close(streams.resid_mid, cache["blocks.0.hook_resid_mid"][:, -1])
    assert_close(streams.resid_post, cache["blocks.0.hook_resid_post"][:, -1])


def test_grid_logits_are_those_of_every_pair_by_a_and_b() -> None:
    model = ModularTransformer(seed=0, p=7).double()
    grid = model.grid_logits()
    assert grid.shape == (7, 7, 8)
    for a, b in ((0, 0), (2, 5), (6, 1)):
        assert_close(grid[a, b], model(torch.tensor([[a, b, 7]]))[0, -1].detach())


@pytest.mark.parametrize("engine", ["structured", "naive"])
def test_equal_logits_cost_the_log_of_the_number_of_outputs(engine) -> None:
    model = ModularTransformer(seed=0, p=7)
    torch.nn.init.zeros_(model.W_U)
    pairs = ModularAddition(seed=0, p=7, probe_size=8).train
    assert model.loss(pairs, engine=engine).item() == pytest.approx(math.log(8), rel=1e-15)


def test_gradients_follow_what_is_done_to_the_loss() -> None:
    model = perturbed(ModularTransformer(seed=0, p=7)).double()
    task = ModularAddition(seed=0, p=7, probe_size=8)
    _, train = gradients(model, task.train)
    _, test = gradients(model, task.test)
    model.zero_grad()
    (3 * model.loss(task.train) - model.loss(task.test)).backward()
    for name, weight in model.named_parameters():
        assert_close(weight.grad, 3 * train[name] - test[name], rtol=1e-10, atol=1e-12)


def test_frozen_weights_get_no_gradient() -> None:
    model = ModularTransformer(seed=0, p=7)
    model.W_E.requires_grad_(False)
    model.loss(ModularAddition(seed=0, p=7, probe_size=8).train).backward()
    assert model.W_E.grad is None
    assert model.W_U.grad is not None


def test_loss_without_gradients_is_the_same_number() -> None:
    model = ModularTransformer(seed=0, p=7).double()
    pairs = ModularAddition(seed=0, p=7, probe_size=8).train
    with torch.no_grad():
        loss = model.loss(pairs)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(model.loss(pairs).item(), rel=1e-15)


def test_bfloat16_products_change_gradients_by_their_rounding_and_no_setting_of_torch() -> None:
    model = ModularTransformer(seed=0)
    pairs = ModularAddition(seed=0).train
    exact_loss, exact = gradients(model, pairs)
    loss, rounded = gradients(model, pairs, matmul="bfloat16")
    assert torch.get_float32_matmul_precision() == "highest"
    # a factor's rounding error is at most 2^-9; a product has two factors, a gradient two products
    assert loss.item() == pytest.approx(exact_loss.item(), rel=2**-8)
    for name, oracle in exact.items():
        assert unlike(rounded[name], oracle) < 4 * 2**-8, name


def test_bfloat16_products_are_refused_where_they_have_no_effect() -> None:
    model = ModularTransformer(seed=0, p=7)
    pairs = ModularAddition(seed=0, p=7, probe_size=8).train
    with pytest.raises(ValueError, match=r"matmul=bfloat16 has no effect with engine=naive"):
        model.loss(pairs, engine="naive", matmul="bfloat16")


def test_a_hooked_model_does_not_take_the_engine_without_hook_points() -> None:
    model = ModularTransformer(seed=0, p=7)
    pairs = ModularAddition(seed=0, p=7, probe_size=8).train
    model.add_hook("blocks.0.hook_resid_mid", lambda resid, **_: 2 * resid)
    with pytest.raises(ValueError, match=r"blocks.0.hook_resid_mid.*engine=naive"):
        model.loss(pairs)
    hooked = model.loss(pairs, engine="naive").item()
    model.reset_hooks()
    assert model.loss(pairs).item() != pytest.approx(hooked, rel=1e-3)


def test_weights_are_the_parameters_and_their_groups_a_partition() -> None:
    model = ModularTransformer(seed=0)
    weights = model.weights()
    assert weights.layers[0].W_V.data_ptr() == model.W_V.data_ptr()
    assert weights.final_gain is None
    assert weights.layers[0].gain is None
    grouped = [name for group in weights.groups.values() for name in group]
    assert sorted(grouped) == sorted(weights.named)
    assert list(weights.named) == [name for name, _ in model.named_parameters()]


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"d_model=128 .* n_heads=5"):
        ModularTransformer(seed=0, n_heads=5)


def test_cross_entropy_of_a_confident_answer_is_computed_in_float64() -> None:
    logits = torch.zeros(1, 114)
    logits[0, 3] = 25.0
    expected = math.log1p(113 * math.exp(-25.0))
    assert cross_entropy(logits, torch.tensor([3])).item() == pytest.approx(expected, rel=1e-9)


def test_config_repeats_the_signature() -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONF / "model/modular_transformer.yaml"))
    parameters = inspect.signature(ModularTransformer).parameters
    assert set(config) - {"_target_"} == set(parameters)
    for name in ("d_model", "n_heads", "d_mlp"):
        assert config[name] == parameters[name].default
