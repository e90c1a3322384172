"""Measures of scatter against numpy, scikit-learn and simulated Gaussians."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.covariance import ledoit_wolf, ledoit_wolf_shrinkage
from torch import Tensor

from allostasis.core.spaces import Weights
from allostasis.instrument import read
from allostasis.metrics.activation_entropy import activation_entropy, shrinkage
from allostasis.metrics.base import Snapshot
from allostasis.metrics.dprime import MAX_PAIRS, DPrime, dprime
from allostasis.metrics.residual_variance import ResidualVariance, residual_variance

POST = "blocks.0.hook_resid_post"


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_total_variance_is_the_trace_of_numpys_covariance() -> None:
    resid, classes = 5 + _random(40, 6), torch.arange(40) % 4
    parts = residual_variance(resid, classes, n_classes=4)
    expected = np.trace(np.cov(resid.numpy().T, bias=True)) / 6
    assert parts["total"].item() == pytest.approx(expected, rel=1e-12)
    assert (parts["between"] + parts["within"]).item() == pytest.approx(expected, rel=1e-12)
    assert parts["common"].item() == pytest.approx(resid.mean(0).square().mean().item())


def test_the_ratio_of_mean_squares_is_scipys_f_statistic() -> None:
    resid, sizes = _random(30, 1), (4, 10, 16)
    classes = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    parts = residual_variance(resid, classes, n_classes=3)
    n, n_0 = 30, (30 - sum(size**2 for size in sizes) / 30) / 2
    mean_square_within = parts["within_unbiased"].item()
    mean_square_between = parts["between_unbiased"].item() * n_0 + mean_square_within
    f = stats.f_oneway(*(group.numpy() for group in resid[:, 0].split(sizes))).statistic
    assert mean_square_between / mean_square_within == pytest.approx(f, rel=1e-12)
    assert mean_square_within == pytest.approx(parts["within"].item() * n / (n - 3), rel=1e-12)


def test_scatter_within_classes_does_not_leak_into_the_unbiased_part() -> None:
    """Without any difference between classes `between` grows with their number; this one is 0."""
    resid, classes = _random(6000, 16), torch.arange(6000) % 2000
    parts = residual_variance(resid, classes, n_classes=2000)
    assert parts["between"].item() == pytest.approx(1 / 3, rel=0.03)
    assert parts["between_unbiased"].item() == pytest.approx(0, abs=0.02)
    assert parts["within_unbiased"].item() == pytest.approx(1, rel=0.03)


def test_classes_with_one_example_are_left_out_and_counted() -> None:
    resid, classes = _random(5, 1, 3), torch.tensor([0, 0, 1, 1, 4])
    snapshot = Snapshot(step=0, acts={POST: resid}, classes=classes, n_classes=7, readout=0)
    readings = read(ResidualVariance(), snapshot)
    kept = residual_variance(resid[:4, 0], classes[:4], n_classes=2)
    assert readings["", 0, None, None] == pytest.approx(kept["total"].item(), rel=1e-12)
    assert readings["between", 0, None, None] == pytest.approx(kept["between"].item(), rel=1e-12)
    assert readings["excluded", 0, None, None] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("amplitude", "published"),
    [(11.64, 1.07), (11.47, 1.04), (11.43, 1.03), (11.41, 1.03), (11.39, 1.02)],
)
def test_the_published_variance_is_the_published_amplitude_again(
    amplitude: float, published: float
) -> None:
    """At d = 128, sigma^2 = A^2 / 127 for vectors of feature mean 0: the source's own numbers."""
    resid = _random(20, 3, 128)
    resid = resid - resid.mean(dim=-1, keepdim=True)
    resid = amplitude * resid / resid.norm(dim=-1, keepdim=True)
    classes = torch.arange(20) % 2
    snapshot = Snapshot(step=0, acts={POST: resid}, classes=classes, n_classes=2, readout=2)
    found = read(ResidualVariance(), snapshot)["published", 0, None, None]
    assert found == pytest.approx(amplitude**2 / 127, rel=1e-12)
    assert round(found, 2) == published


@pytest.mark.parametrize("n", [20, 400])
def test_activation_entropy_uses_scikit_learns_shrunk_covariance(n: int) -> None:
    rows = 3 + _random(n, 10) * torch.linspace(0.5, 4, 10).double()
    found = activation_entropy(rows)
    shrunk, _ = ledoit_wolf(rows.numpy())
    spectrum = np.linalg.eigvalsh(shrunk)
    assert found["entropy"] == pytest.approx(np.linalg.slogdet(shrunk)[1] / 2, rel=1e-10)
    assert found["effective_rank"] == pytest.approx(spectrum.sum() ** 2 / (spectrum**2).sum())
    assert found["condition"] == pytest.approx(np.linalg.cond(shrunk))
    sample = np.cov(rows.numpy().T, bias=True)
    ridge = sample + 1e-3 * np.trace(sample) / 10 * np.eye(10)
    assert found["published"] == pytest.approx(np.linalg.slogdet(ridge)[1] / 2, rel=1e-10)


@pytest.mark.parametrize("shape", [(7, 50), (40, 30), (500, 10)])
def test_shrinkage_is_scikit_learns(shape: tuple[int, int]) -> None:
    rows = (_random(*shape) * torch.linspace(0.5, 4, shape[1]).double()).numpy()
    rows -= rows.mean(axis=0)
    wanted = ledoit_wolf_shrinkage(rows, assume_centered=True)
    assert shrinkage(rows) == pytest.approx(wanted, rel=1e-12)


def test_activation_entropy_rises_by_d_log_c_under_scaling() -> None:
    rows = _random(50, 10)
    gained = activation_entropy(7 * rows)["entropy"] - activation_entropy(rows)["entropy"]
    assert gained == pytest.approx(10 * math.log(7), rel=1e-10)


def _two_classes(n: int, d: int, distance: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit Gaussians whose means lie apart along the first feature."""
    classes = torch.arange(2).repeat_interleave(n)
    resid = _random(2 * n, d, seed=seed)
    resid[:, 0] += distance * (classes == 0)
    return resid, classes


def test_dprime_predicts_the_accuracy_of_a_midpoint_decision() -> None:
    """Phi(d'/2) for one sample and Phi(d'/sqrt 2) for two, within three standard errors."""
    n, distance = 20_000, 1.5
    resid, classes = _two_classes(n, 4, distance)
    unembed = torch.zeros(4, 2).double()
    unembed[0], unembed[1] = torch.tensor([1.0, -1.0]), torch.tensor([0.5, -0.5])  # misaligned
    weights = Weights((), unembed, None, {}, {})
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(1))
    snapshot = Snapshot(
        step=0,
        acts={POST: resid[order, None]},
        classes=classes[order],
        n_classes=2,
        weights=weights,
        readout=0,
    )
    readings = read(DPrime(), snapshot)
    signal = resid @ (unembed[:, 0] - unembed[:, 1])
    first, second = signal[:n], signal[n:]
    middle = (first.mean() + second.mean()) / 2
    accuracy = ((first > middle).double().mean() + (second < middle).double().mean()) / 2
    auroc = stats.mannwhitneyu(first.numpy(), second.numpy()).statistic / n**2
    error = 3 * math.sqrt(0.25 / n)
    assert readings["accuracy_pred", 0, None, None] == pytest.approx(accuracy.item(), abs=error)
    assert readings["auroc_pred", 0, None, None] == pytest.approx(auroc, abs=error)
    expected = math.log(distance / math.sqrt(1 + 0.25))  # w = (2, 1, 0, 0)
    assert readings["", 0, None, None] == pytest.approx(expected, abs=0.03)
    assert readings["mean_shift", 0, None, None] == pytest.approx(math.log(distance), abs=0.03)
    cosine = math.log(2 / math.sqrt(5))
    assert readings["read_alignment", 0, None, None] == pytest.approx(cosine, abs=0.03)


def test_additive_noise_behind_the_clamp_breaks_the_invariance_under_scaling() -> None:
    """d' = c w.Dmu / sqrt(c^2 w'Sigma w + tau^2 ||w||^2)."""
    n, tau, c = 40_000, 0.8, 0.5
    resid, classes = _two_classes(n, 3, 2.0)
    folds, unembed = torch.arange(2 * n) % 2, torch.eye(3, 2).double()
    noisy = c * resid + tau * _random(2 * n, 3, seed=5)
    found = dprime(noisy, classes, folds, unembed).d_prime.item()
    expected = c * 2.0 / math.sqrt(2 * c**2 + 2 * tau**2)
    assert found == pytest.approx(expected, rel=0.02)


def test_the_mean_shift_is_not_inflated_by_noise() -> None:
    """Fifty small samples: the product of folds averages to the truth, one sample's square not."""
    products, squares = [], []
    folds = torch.arange(16) % 2
    for seed in range(50):
        resid, classes = _two_classes(8, 20, 4.0, seed=seed)
        products.append(dprime(resid, classes, folds, torch.eye(20, 2)).mean_shift.exp().square())
        shift = resid[:8].mean(0) - resid[8:].mean(0)
        squares.append(shift.square().sum())
    excess = 20 * (1 / 8 + 1 / 8)  # tr Sigma (1/n_y + 1/n_j)
    assert torch.stack(squares).mean().item() == pytest.approx(16 + excess, rel=0.1)
    assert torch.cat(products).mean().item() == pytest.approx(16, rel=0.1)


def test_pairs_are_adjacent_answers_with_two_examples_in_each_fold() -> None:
    classes = torch.cat([torch.arange(40).repeat_interleave(4), torch.tensor([40, 40, 40])])
    folds = torch.arange(len(classes)) % 2
    resid, unembed = _random(len(classes), 6), _random(6, 41, seed=1)
    assert len(dprime(resid, classes, folds, unembed).d_prime) == MAX_PAIRS
    last = classes >= 38  # 38 and 39 make a pair; 40 has a single example in one fold
    assert len(dprime(resid[last], classes[last], folds[last], unembed).d_prime) == 1


def test_behind_a_final_norm_dprime_reads_the_normalised_stream_with_the_gain() -> None:
    normed, gain, unembed = _random(32, 1, 6), _random(6, seed=1), _random(6, 4, seed=2)
    classes = torch.arange(4).repeat_interleave(8)
    acts = {POST: _random(32, 1, 6, seed=3), "ln_final.hook_normalized": normed}
    snapshot = Snapshot(
        step=0,
        acts=acts,
        classes=classes,
        n_classes=4,
        weights=Weights((), unembed, gain, {}, {}),
        readout=0,
    )
    found = read(DPrime(), snapshot)["accuracy_pred", 0, None, None]
    folds = torch.arange(32) % 2
    direct = dprime(normed[:, 0], classes, folds, gain[:, None] * unembed).d_prime
    expected = stats.norm.cdf(direct.numpy() / 2).mean()
    assert found == pytest.approx(expected, rel=1e-12)
