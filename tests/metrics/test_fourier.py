"""Fourier measures against planted circuits, numpy's FFT and the definitions by brute force."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from allostasis.core.spaces import Weights
from allostasis.instrument import read
from allostasis.metrics.base import Snapshot
from allostasis.metrics.cosine_fve import CosineFve, cosine_fve, sum_table
from allostasis.metrics.excluded_loss import ExcludedLoss, excluded_loss
from allostasis.metrics.fourier_power import FourierPower, fourier_basis, fourier_power
from allostasis.metrics.key_frequencies import KeyFrequencies, key_frequencies
from allostasis.metrics.restricted_loss import (
    RestrictedLoss,
    key_part,
    null_sets,
    restricted_loss,
)


def _planted(p: int, amplitudes: dict[int, float], *, noise: float = 0.0) -> Tensor:
    """Logits that add with the given frequencies."""
    x = torch.arange(p)
    offset = (x[:, None, None] + x[:, None] - x) % p
    waves = [a * torch.cos(2 * math.pi * k * offset.double() / p) for k, a in amplitudes.items()]
    generator = torch.Generator().manual_seed(0)
    return torch.stack(waves).sum(0) + noise * torch.randn(p, p, p, generator=generator).double()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("p", [7, 113])
def test_the_basis_is_orthonormal_and_misses_only_the_constant(p: int) -> None:
    rows = fourier_basis(p).flatten(0, 1)
    assert rows.shape == (p - 1, p)
    assert_close(rows @ rows.T, torch.eye(p - 1).double(), rtol=0, atol=1e-13)
    assert_close(rows.sum(dim=1), torch.zeros(p - 1).double(), rtol=0, atol=1e-12)


def test_an_even_modulus_is_refused() -> None:
    with pytest.raises(ValueError, match="must be odd, got 8"):
        fourier_basis(8)


def test_fourier_power_equals_numpys_fft_and_parseval() -> None:
    table = _random(13, 5)
    power = fourier_power(table)
    spectrum = np.fft.rfft(table.numpy(), axis=0)[1:]
    expected = np.sqrt(2 / 13 * (np.abs(spectrum) ** 2).sum(axis=1))
    assert_close(power, torch.from_numpy(expected), rtol=1e-12, atol=0)
    centred = table - table.mean(dim=0)
    assert_close(power.square().sum(), centred.square().sum(), rtol=1e-12, atol=0)


def test_fourier_power_is_recorded_by_frequency_without_the_equals_sign() -> None:
    wave = 3 * fourier_basis(7)[1, 0]
    W_E = torch.cat([wave, torch.tensor([1e6]).double()])[:, None].expand(-1, 4)
    to_logits = {"W_out": _random(5, 4), "W_U": torch.zeros(4, 8)}
    weights = Weights((), to_logits["W_U"], None, {"W_E": W_E, **to_logits}, {})
    readings = read(FourierPower(), Snapshot(step=0, weights=weights))
    assert [readings["", None, None, k] for k in (1, 2, 3)] == pytest.approx([0, 6, 0], abs=1e-12)
    assert [readings["logits", None, None, k] for k in (1, 2, 3)] == [0, 0, 0]


@pytest.mark.parametrize("grid", [_random(7, 7, 7), _planted(7, {2: 1.0}, noise=0.3)])
def test_cosine_fve_equals_the_sum_over_all_p_cubed_terms(grid: Tensor) -> None:
    centred = grid - grid.mean(dim=-1, keepdim=True)
    expected = []
    for k in range(1, 4):
        cosine = torch.zeros(7, 7, 7).double()
        for a in range(7):
            for b in range(7):
                for c in range(7):
                    cosine[a, b, c] = math.cos(2 * math.pi * k * (a + b - c) / 7)
        along = (centred * cosine).sum() / cosine.norm()
        expected.append((along / centred.norm()) ** 2)
    assert_close(cosine_fve(grid), torch.stack(expected), rtol=1e-10, atol=1e-14)


def test_cosine_fve_of_float32_logits_keeps_six_digits() -> None:
    grid = _planted(31, {3: 5.0, 7: 2.0}, noise=1.0)
    assert_close(cosine_fve(grid.float()), cosine_fve(grid), rtol=1e-5, atol=1e-8)


def test_planted_cosines_give_exact_key_set() -> None:
    planted = {14: 5.0, 35: 4.0, 41: 3.5, 42: 3.0, 52: 2.5}
    fve = cosine_fve(_planted(113, planted, noise=2.0))
    assert key_frequencies(fve) == tuple(planted)
    share = torch.tensor([amplitude**2 for amplitude in planted.values()]).double()
    found = fve[[k - 1 for k in planted]]
    assert_close(found / found.sum(), share / share.sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({5: 0.6, 2: 0.3, 9: 0.1}, (5, 2, 9)),  # 90 % after two, so that the third is needed
        ({5: 0.6, 2: 0.36, 9: 0.04}, (5, 2)),  # 96 % after two
        ({k: 0.05 for k in range(1, 21)}, tuple(range(1, 11))),  # never more than ten
        ({1: 0.9, **{k: 0.1 / 55 for k in range(2, 57)}}, (1,)),  # the rest are below 1 % each
    ],
)
def test_the_rule_for_key_frequencies(shares: dict[int, float], expected: tuple[int, ...]) -> None:
    fve = torch.zeros(56).double()
    for k, share in shares.items():
        fve[k - 1] = 0.7 * share  # the rule is relative to the sum
    assert key_frequencies(fve) == expected


def test_key_frequencies_are_recorded_as_a_count_and_as_members() -> None:
    readings = read(KeyFrequencies(), Snapshot(step=0, grid_logits=_planted(11, {2: 2.0, 5: 1.0})))
    assert readings == pytest.approx({
        ("", None, None, None): 2,
        ("member", None, None, 2): 0.8,
        ("member", None, None, 5): 0.2,
    })


def test_sum_table_is_the_mean_over_pairs_of_equal_sum() -> None:
    grid, table = _random(5, 5, 5), sum_table(_random(5, 5, 5))
    for total in range(5):
        rows = torch.stack([grid[a, (total - a) % 5] for a in range(5)])
        assert_close(table[total], rows.mean(dim=0))


def test_kept_and_removed_parts_rebuild_centred_logits() -> None:
    """Kept, removed and mean rebuild the logits, and the removed part is deaf to the key waves."""
    p, keys, grid = 13, (2, 5), _random(13, 13, 13)
    centred = grid - grid.mean(dim=-1, keepdim=True)
    sums = (torch.arange(p)[:, None] + torch.arange(p)) % p
    kept = key_part(sum_table(centred), keys)[sums]
    angles = [2 * math.pi * k / p * sums.double() for k in keys]
    waves = torch.stack([wave(angle) for angle in angles for wave in (torch.cos, torch.sin)])
    waves = waves.flatten(1)
    waves = waves / waves.norm(dim=1, keepdim=True)
    by_projection = (waves.T @ (waves @ centred.view(p * p, p))).view(p, p, p)
    assert_close(kept, by_projection, rtol=0, atol=1e-12)
    removed = centred - kept
    assert_close(kept + removed, centred, rtol=0, atol=1e-15)
    assert (waves @ removed.view(p * p, p)).abs().max() < 1e-12


def test_restricted_and_excluded_loss_equal_the_losses_of_projected_logits() -> None:
    p, keys = 11, (1, 4)
    grid = _planted(p, {1: 3.0, 4: 2.0, 2: 1.0}, noise=0.5)
    sums = (torch.arange(p)[:, None] + torch.arange(p)) % p
    trained = torch.rand(p, p, generator=torch.Generator().manual_seed(2)) < 0.4
    kept = key_part(sum_table(grid), keys)[sums]
    restricted = (kept + grid.mean(dim=(0, 1))).view(p * p, p)
    expected = functional.cross_entropy(restricted, sums.flatten())
    assert_close(restricted_loss(grid, keys), expected, rtol=1e-12, atol=0)
    expected = functional.cross_entropy((grid - kept)[trained], sums[trained])
    assert_close(excluded_loss(grid, trained, keys), expected, rtol=1e-12, atol=0)


def test_a_planted_circuit_lives_on_its_keys_alone() -> None:
    """Keys alone answer, without keys nothing does, and random sets do not take their place."""
    p, planted = 31, {3: 20.0, 8: 15.0, 13: 10.0}
    snapshot = Snapshot(
        step=0,
        grid_logits=_planted(p, planted),
        train_pairs=torch.ones(p, p, dtype=torch.bool),
        key_frequencies=tuple(planted),
    )
    restricted, excluded = read(RestrictedLoss(), snapshot), read(ExcludedLoss(), snapshot)
    main, null = ("", None, None, None), ("null_mean", None, None, None)
    assert restricted[main] < 1e-4
    assert excluded[main] == pytest.approx(math.log(p), rel=1e-9)
    assert restricted[null] > 1
    assert excluded[null] < math.log(p)


def test_null_sets_are_the_same_every_time_and_differ_from_each_other() -> None:
    sets = null_sets(113, 5)
    assert sets == null_sets(113, 5)
    assert len({*sets}) == len(sets) == 20
    assert all(len({*chosen}) == 5 and 1 <= min(chosen) <= max(chosen) <= 56 for chosen in sets)


def test_a_random_grid_is_explained_by_no_frequency() -> None:
    readings = read(CosineFve(), Snapshot(step=0, grid_logits=_random(31, 31, 31)))
    assert len(readings) == 15
    assert max(readings.values()) < 20 / 31**3  # the mean is 1 / 31^3 each
