"""Is a choice between two answers right as often as its probability says? Against true labels.

One of the two answers is presented first. p is the probability of that one, and the label says
whether it is the true one: with the order drawn at random, labels are 0 and 1 with known truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_expit

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """How far probabilities and truth are apart; 0 is best everywhere.

    Attributes:
        ece: Expected calibration error with 15 bins of equal width, in [0, 1].
        equal_mass: The same with 15 bins of equal numbers.
        brier: Mean squared difference of p and label, in [0, 1].
        nll: Mean negative log-likelihood, nats.
        ece_self: The error against the model's own choice in place of the truth, as the source has
            it: mean min(p, 1 - p) identically, whatever is true. Tautological.
    """

    ece: float
    equal_mass: float
    brier: float
    nll: float
    ece_self: float


def is_first(n: int, rng: np.random.Generator) -> np.ndarray:
    """For each of n pairs, whether the target is presented first: half of them, at random."""
    return rng.permutation(n) < n / 2


def calibrate(logit_diff: np.ndarray, first: np.ndarray) -> Calibration:
    """Calibration of p = sigmoid(logit difference), answers in the order that was drawn.

    Args:
        logit_diff: Target minus foil, one a prompt.
        first: Whether the target is presented first; then the label is 1.

    Source:
        Guo et al. (2017), On calibration of modern neural networks, arXiv 1706.04599.

    Example:
        >>> found = calibrate(np.array([0.0, 0.0]), np.array([True, False]))
        >>> found.ece, found.brier
        (0.0, 0.25)
    """
    return Calibration(*_weighted(logit_diff, first, np.ones((1, len(first))))[0].tolist())


def limits(
    logit_diff: np.ndarray, first: np.ndarray, weights: np.ndarray, *, level: float = 0.95
) -> tuple[Calibration, Calibration]:
    """Percentile intervals over resamples, with the bins of the whole sample.

    Calibration errors are biased upwards in a resample, as they are in any finite sample.

    Args:
        logit_diff: Target minus foil, one a prompt.
        first: Whether the target is presented first.
        weights: How often each prompt is in each resample, [resample, prompt].
        level: Nominal coverage.

    Returns:
        Lower and upper limits.
    """
    ends = np.quantile(
        _weighted(logit_diff, first, weights), [(1 - level) / 2, (1 + level) / 2], axis=0
    )
    return Calibration(*ends[0].tolist()), Calibration(*ends[1].tolist())


def _weighted(logit_diff: np.ndarray, first: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The numbers of `Calibration`, in its order, one row a row of weights."""
    signed = np.where(first, logit_diff, -logit_diff)
    p, label = expit(signed), first.astype(float)
    confidence = np.maximum(p, 1 - p)
    total = weights.sum(axis=1)

    def error(off: np.ndarray, bins: np.ndarray) -> np.ndarray:
        """Sum over bins of |mean label - mean p|, weighted by their share."""
        return np.abs(weights @ (off[:, None] * np.eye(BINS)[bins])).sum(axis=1) / total

    columns = (
        error(label - p, _equal_width(p)),
        error(label - p, _equal_mass(p)),
        weights @ (p - label) ** 2 / total,
        weights @ -log_expit(logit_diff) / total,
        error(1 - confidence, _equal_width(confidence)),
    )
    return np.stack(columns, axis=1)


def _equal_width(p: np.ndarray) -> np.ndarray:
    """The bin (lo, hi] of each."""
    return np.clip(np.ceil(p * BINS).astype(int) - 1, 0, BINS - 1)


def _equal_mass(p: np.ndarray) -> np.ndarray:
    """The bin of each by rank; what is tied goes by its place, since its bins say the same."""
    ranks = np.argsort(np.argsort(p, kind="stable"), kind="stable")
    return ranks * BINS // len(p)
