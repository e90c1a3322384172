"""One-sided tests against a bound, exact where they can be, and their correction in families."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from allostasis.analysis.intervals import welch

EXACT = 1_000_000  # relabellings up to which a permutation test is exact
RANDOM = 99_999
BATCH = 4_000_000  # numbers that a batch of relabellings holds at once


def t_above(values: np.ndarray, bound: float) -> float:
    """One-sided p of "the mean is at most `bound`" by Student's t."""
    t = (values.mean() - bound) / stats.sem(values)
    return float(stats.t.sf(t, len(values) - 1))


def welch_above(left: np.ndarray, right: np.ndarray, bound: float) -> float:
    """One-sided p of "mean(left) - mean(right) is at most `bound`" by Welch's t."""
    difference, error, df = welch(left, right)
    return float(stats.t.sf((difference - bound) / error, df))


def ratio_above(numerator: np.ndarray, denominator: np.ndarray, bound: float) -> float:
    """One-sided p of "the ratio of sums is at most `bound`": the test that Fieller inverts.

    Student's t of num - bound den, read with the sign of the mean denominator.
    """
    side = math.copysign(1.0, denominator.mean())
    return t_above(side * (numerator - bound * denominator), 0.0)


def binomial_above(count: int, n: int, bound: float) -> float:
    """One-sided p of "the share is at most `bound`": P(Binomial(n, bound) >= count).

    Example:
        >>> binomial_above(6, 6, 0.5)
        0.015625
    """
    return float(stats.binomtest(count, n, bound, alternative="greater").pvalue)


def median_above(times: np.ndarray, bound: float) -> float:
    """One-sided p of "the median time is at most `bound`" by the sign test.

    A censored time is later than its value, so it counts only where that alone exceeds the bound.
    """
    return binomial_above(int((times > bound).sum()), len(times), 0.5)


def median_below(times: np.ndarray, censored: np.ndarray, bound: float) -> float:
    """One-sided p of "the median time is at least `bound`"; censored times never count."""
    return binomial_above(int(((times < bound) & ~censored).sum()), len(times), 0.5)


def sign_flip(values: np.ndarray, bound: float, generator: np.random.Generator) -> float:
    """Two-sided p of "the mean is `bound`" over all sign flips of value - bound.

    Exact up to 10^6 flips, else 99,999 random ones.

    Example:
        >>> sign_flip(np.arange(1.0, 7.0), 0.0, np.random.default_rng(0))
        0.03125
    """
    test = stats.permutation_test(
        (values - bound,), lambda x, axis: x.mean(axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=_resamples(2 ** len(values)), rng=generator,
        batch=max(1, BATCH // len(values)),
    )  # fmt: skip
    return float(test.pvalue)


def permutation(left: np.ndarray, right: np.ndarray, generator: np.random.Generator) -> float:
    """Two-sided p of "both samples come from one distribution" by their difference of means.

    Exact up to 10^6 relabellings, else 99,999 random ones.
    """
    labellings = math.comb(len(left) + len(right), len(left))
    test = stats.permutation_test(
        (left, right), lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        permutation_type="independent", vectorized=True,
        n_resamples=_resamples(labellings), rng=generator,
    )  # fmt: skip
    return float(test.pvalue)


def _resamples(labellings: int) -> int:
    return labellings if labellings <= EXACT else RANDOM


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family's p-values, in the order given.

    Source:
        Holm (1979), A simple sequentially rejective multiple test procedure, Scand. J. Stat. 6.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()
