"""Measures of size against products that are formed in full, and by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from allostasis.core.spaces import LayerWeights, Weights
from allostasis.instrument import read
from allostasis.metrics.amplitude_activation import AmplitudeActivation
from allostasis.metrics.amplitude_learned import AmplitudeLearned, amplitude_learned
from allostasis.metrics.amplitude_param import AmplitudeParam, amplitude_param, spectral_norm
from allostasis.metrics.base import Snapshot
from allostasis.metrics.qk_norm import qk_norm
from allostasis.metrics.weight_norm import WeightNorm
from allostasis.metrics.weight_update import WeightUpdate, descent_cosine, weight_update

POST = "blocks.0.hook_resid_post"


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_activation_amplitude_does_not_grow_with_width() -> None:
    readings = {}
    for width in (16, 1024):
        acts = {POST: 3 * _random(50, 4, width)}
        readings[width] = read(AmplitudeActivation(), Snapshot(step=0, acts=acts))
        assert readings[width]["", 0, None, None] == pytest.approx(3, rel=0.05)
    ratio = readings[1024]["published", 0, None, None] / readings[16]["published", 0, None, None]
    assert ratio == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("d", [32, 40, 64, 128])
def test_the_published_amplitude_behind_a_norm_is_the_root_of_the_width(d: int) -> None:
    resid = torch.nn.functional.layer_norm(_random(8, 3, d), (d,), eps=0)
    snapshot = Snapshot(step=0, acts={POST: resid}, normalised_sites=frozenset({POST}))
    readings = read(AmplitudeActivation(), snapshot)
    assert readings == {("published", 0, None, None): pytest.approx(math.sqrt(d), rel=1e-12)}


def test_quantiles_come_within_half_a_percent_of_the_sorted_ones() -> None:
    resid = _random(500, 3, 8) * torch.logspace(-2, 2, 500).double()[:, None, None]
    readings = read(AmplitudeActivation(), Snapshot(step=0, acts={POST: resid}))
    amplitude = resid.square().mean(dim=-1).sqrt().flatten()
    for part, share in (("median", 0.5), ("p99", 0.99)):
        expected = amplitude.quantile(share, interpolation="lower").item()
        assert readings[part, 0, None, None] == pytest.approx(expected, rel=0.0055)


def test_the_readout_position_and_the_largest_share_are_read_by_hand() -> None:
    resid = torch.zeros(2, 3, 4)
    resid[:, 0, 1] = 6  # one feature holds all
    resid[:, 2] = 5  # all features alike
    readings = read(AmplitudeActivation(), Snapshot(step=0, acts={POST: resid}, readout=2))
    assert readings["at_answer", 0, None, None] == 5
    assert readings["", 0, None, None] == pytest.approx((3 + 0 + 5) / 3)
    assert readings["max_share", 0, None, None] == pytest.approx((1 + 1 / 4) / 2)


def test_learned_amplitude_is_the_rms_logit_of_isotropic_input() -> None:
    unembed, gain = _random(6, 9), _random(6, seed=1)
    inputs = _random(200_000, 6, seed=2)
    logits = inputs * gain @ unembed
    centred = logits - logits.mean(dim=-1, keepdim=True)
    expected = centred.square().mean().sqrt().item()
    assert amplitude_learned(unembed, gain).item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("d_model", "n_answers"), [(6, 9), (9, 6)])
def test_the_readouts_spectral_norm_is_its_largest_singular_value(
    d_model: int, n_answers: int
) -> None:
    unembed, gain = _random(d_model, n_answers), _random(d_model, seed=1)
    weights = Weights((), unembed, gain, {}, {})
    readings = read(AmplitudeLearned(), Snapshot(step=0, weights=weights))
    matrix = gain[:, None] * (unembed - unembed.mean(dim=1, keepdim=True))
    largest = torch.linalg.svdvals(matrix)[0].item()
    assert readings["spectral", None, None, None] == pytest.approx(largest, rel=1e-12)
    assert readings["published", None, None, None] == pytest.approx(gain.mean().item())


@pytest.mark.parametrize("gain", [None, _random(12, seed=9)])
def test_head_circuits_are_measured_as_if_they_were_formed(gain: Tensor | None) -> None:
    W_Q, W_K, W_V = _random(3, 4, 12, 5)
    W_O = _random(4, 5, 12, seed=1)
    norm = torch.eye(12).double() if gain is None else gain.diag()
    ov, qk = norm @ W_V @ W_O, norm @ W_Q @ W_K.mT @ norm / math.sqrt(5)
    assert_close(amplitude_param(W_V, W_O, gain), ov.norm(dim=(1, 2)), rtol=1e-12, atol=0)
    largest = torch.linalg.svdvals(ov)[:, 0]
    assert_close(spectral_norm(W_V, W_O, gain), largest, rtol=1e-12, atol=0)
    assert_close(qk_norm(W_Q, W_K, gain), qk.norm(dim=(1, 2)), rtol=1e-12, atol=0)


def test_imbalance_gives_the_published_balance_of_values_and_outputs() -> None:
    W_Q, W_V, W_O = _random(2, 6, 3), _random(2, 6, 3, seed=1), 0.3 * _random(2, 3, 6, seed=2)
    layer = LayerWeights(W_Q=W_Q, W_K=W_Q, W_V=W_V, W_O=W_O)
    weights = Weights((layer,), torch.eye(6), None, {}, {})
    readings = read(AmplitudeParam(), Snapshot(step=0, weights=weights))
    for head in range(2):
        v, o = W_V[head].norm().item(), W_O[head].norm().item()
        balance = math.tanh(readings["imbalance", 0, head, None] / 2)
        assert balance == pytest.approx((v - o) / (v + o), rel=1e-12)


def test_squared_weight_norms_of_tensors_sum_to_those_of_groups_and_all() -> None:
    named = {"W_E": _random(5, 4), "W_in": _random(4, 7), "b_in": _random(7)}
    groups = {"embed": ("W_E",), "qk": (), "mlp": ("W_in", "b_in")}
    weights = Weights((), torch.eye(4), None, named, groups)
    readings = read(WeightNorm(), Snapshot(step=0, weights=weights))
    square = {part: value**2 for (part, *_), value in readings.items()}
    assert square["W_in"] + square["b_in"] == pytest.approx(square["mlp"], rel=1e-12)
    assert square["embed"] + square["mlp"] == pytest.approx(square[""], rel=1e-12)
    flat = torch.cat([tensor.flatten() for tensor in named.values()])
    assert readings["", None, None, None] == pytest.approx(flat.norm().item(), rel=1e-12)
    assert "qk" not in square


def test_weight_decay_alone_moves_the_weights_inward_only() -> None:
    theta = _random(100)
    lengths = weight_update(0.9 * theta, theta)
    assert lengths["radial"].item() == pytest.approx(-0.1 * theta.norm().item(), rel=1e-12)
    assert lengths["tangential"].item() == pytest.approx(0, abs=1e-7 * lengths["length"].item())


def test_the_gradient_of_a_scale_free_loss_is_across_the_weights() -> None:
    theta = _random(20).requires_grad_()
    (theta / theta.norm())[:3].sum().backward()
    assert theta.grad is not None
    assert descent_cosine(theta.detach(), theta.grad).item() == pytest.approx(0, abs=1e-14)


def test_updates_are_told_apart_by_group() -> None:
    start = {"W_E": _random(5, 4), "W_U": _random(4, 6, seed=1)}
    now = {"W_E": start["W_E"], "W_U": 2 * start["W_U"]}
    groups = {"embed": ("W_E",), "unembed": ("W_U",)}
    weights = Weights((), now["W_U"], None, now, groups)
    snapshot = Snapshot(step=1, weights=weights, before=start, grads=start)
    readings = {part: value for (part, *_), value in read(WeightUpdate(), snapshot).items()}
    grown = start["W_U"].norm().item()
    assert readings["length_embed"] == readings["radial_embed"] == 0
    assert readings[""] == readings["length_unembed"] == pytest.approx(grown, rel=1e-12)
    whole = math.hypot(*(tensor.norm().item() for tensor in start.values()))
    assert readings["radial"] == pytest.approx(grown**2 / whole, rel=1e-12)
    assert readings["tangential"] == pytest.approx(
        math.sqrt(grown**2 - readings["radial"] ** 2), rel=1e-9
    )
    assert readings["cosine_unembed"] == pytest.approx(-1, rel=1e-12)
