"""Readouts of interventions against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from allostasis.metrics.base import Snapshot
from allostasis.metrics.flip_rate import FlipRate
from allostasis.metrics.kl_divergence import KLDivergence, kl_divergence
from allostasis.metrics.trajectory_curvature import trajectory_curvature
from allostasis.metrics.trajectory_step import trajectory_step


def _logits(rows: int, vocab: int, *, seed: int) -> torch.Tensor:
    return 20 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kl_is_finite_and_nonnegative(dtype: torch.dtype) -> None:
    """Trap 5: most of 50,000 probabilities underflow in half precision."""
    clean, moved = (_logits(3, 50_000, seed=seed).to(dtype) for seed in (0, 1))
    metric = KLDivergence()
    metric.update(Snapshot(step=0, logits=moved, clean_logits=clean))
    (reading,) = metric.readings()
    assert 0 < reading.value < 1e4
    metric = KLDivergence()
    metric.update(Snapshot(step=0, logits=clean, clean_logits=clean))
    (same,) = metric.readings()
    assert same.value == pytest.approx(0, abs=1e-6)


def test_kl_is_scipys_relative_entropy() -> None:
    clean, moved = (_logits(4, 30, seed=s).double().log_softmax(-1) for s in (2, 3))
    want = stats.entropy(clean.exp().numpy(), moved.exp().numpy(), axis=1)
    assert_close(kl_divergence(clean, moved), torch.from_numpy(np.asarray(want)))


def test_a_model_that_errs_and_is_left_alone_flips_nothing() -> None:
    """Trap 6: the error rate stands beside the flip rate, under a name of its own."""
    logits = torch.eye(5)
    labels = torch.tensor([0, 1, 2, 3, 0])
    metric = FlipRate()
    metric.update(Snapshot(step=0, logits=logits, clean_logits=logits, labels=labels))
    found = {reading.part: reading.value for reading in metric.readings()}
    assert found == {"": 0.0, "top1_error": pytest.approx(0.2)}


def test_steps_and_turns_of_a_regular_polygon() -> None:
    n = 12
    angle = torch.arange(n + 1) * 2 * torch.pi / n
    path = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert_close(trajectory_step(path), torch.full((n,), 2 * float(np.sin(np.pi / n))))
    turns = trajectory_curvature(path)
    assert_close(turns, torch.full((n - 1,), 2 * torch.pi / n), atol=1e-4, rtol=0)
