"""Calibration of a choice against true labels, against sklearn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import brier_score_loss, log_loss

from allostasis.analysis.choice_calibration import calibrate, is_first


def _choices(n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(1, 2, n), is_first(n, rng)


def test_half_of_the_targets_are_presented_first() -> None:
    first = is_first(100, np.random.default_rng(1))
    assert first.sum() == 50
    assert is_first(7, np.random.default_rng(1)).sum() == 4


def test_brier_and_nll_are_sklearns() -> None:
    ld, first = _choices()
    p = expit(np.where(first, ld, -ld))
    found = calibrate(ld, first)
    assert found.brier == pytest.approx(brier_score_loss(first, p))
    assert found.nll == pytest.approx(log_loss(first, p))


def test_self_labelled_ece_is_mean_min_p() -> None:
    """Trap 10: whatever is true, the source's number is the mean distance from certainty."""
    ld, first = _choices()
    p = expit(ld)
    for order in (first, ~first, np.ones_like(first)):
        found = calibrate(ld, order)
        assert found.ece_self == pytest.approx(np.minimum(p, 1 - p).mean())


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    rng = np.random.default_rng(2)
    n = 200_000
    p = rng.uniform(0.02, 0.98, n)
    label = rng.random(n) < p
    # the target is the true answer: presented first where the label is 1
    signed = np.log(p / (1 - p))
    found = calibrate(np.where(label, signed, -signed), label)
    assert found.ece < 0.01
    assert found.equal_mass < 0.01


def test_a_constant_half_is_right_by_chance() -> None:
    found = calibrate(np.zeros(10), np.array([True, False] * 5))
    assert (found.ece, found.brier, found.ece_self) == (0.0, 0.25, 0.5)
