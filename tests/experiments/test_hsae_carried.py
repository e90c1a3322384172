"""Concepts at an earlier hook: a planted linear map, and one that tells too little."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from allostasis.core.spaces import CausalMetric, ResidVec
from allostasis.experiments.hsae.arms import Directions
from allostasis.experiments.hsae.carried import PENALTIES, RidgeMap, ridge_map

D = 12


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(noise: float) -> tuple[RidgeMap, torch.Tensor]:
    """The map that is found where rows are a known one's, less some noise."""
    truth = drawn(D, D, seed=0)
    x = drawn(3000, D, seed=1)
    y = x @ truth.T + 5.0 + noise * drawn(3000, D, seed=2)
    return ridge_map((x[:2000], y[:2000]), (x[2000:], y[2000:])), truth


def test_a_planted_map_is_found_whatever_its_offset() -> None:
    found, truth = planted(noise=0.0)
    assert found.r2 > 1 - 1e-6
    assert found.penalty == pytest.approx(PENALTIES[0])  # without noise none is best
    assert_close(found.weight, truth, rtol=1e-3, atol=1e-4)


def test_r2_is_the_share_that_is_no_noise() -> None:
    found, truth = planted(noise=3.0)
    signal = float(truth.square().sum())
    assert found.r2 == pytest.approx(signal / (signal + 9.0 * D), abs=0.05)


def test_rows_that_have_nothing_in_common_make_a_weak_map() -> None:
    x, y = drawn(600, D, seed=3), drawn(600, D, seed=4)
    found = ridge_map((x[:400], y[:400]), (x[400:], y[400:]))
    assert found.r2 < 0.1
    assert found.penalty == pytest.approx(PENALTIES[-1])
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post tells -?0\.\d\d of the var"):
        found.check("blocks.1.hook_resid_post", allow_weak=False)
    found.check("blocks.1.hook_resid_post", allow_weak=True)


def test_what_is_carried_back_has_the_inner_products_that_it_had() -> None:
    found, truth = planted(noise=0.0)
    root = drawn(D, D, seed=5)
    later = CausalMetric(root @ root.T + torch.eye(D, dtype=torch.float64), torch.zeros(D))
    start = Directions(
        drawn(3, D, seed=6).float(), drawn(3, 2, D, seed=7).float(), torch.ones(3, 2).bool()
    )
    here = found.back(start)
    assert_close(here.parents.double() @ truth.T, start.parents.double(), rtol=1e-2, atol=1e-2)
    was, now = (
        metric.whiten_resid(ResidVec(torch.cat([of.parents, of.children.flatten(0, 1)]).double()))
        for metric, of in ((later, start), (found.metric(later), here))
    )
    assert_close(now @ now.T, was @ was.T, rtol=1e-5, atol=1e-5)
    assert here.mask is start.mask
