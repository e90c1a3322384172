"""Exact tests by relabelling, and the intervals that they invert.

Flipping signs, or moving units from one arm to the other, makes one statistic of each way to do so.
How many of these "typical values" lie below a bound is, but for the units' own labelling, the p of
the bound: one sorted list gives the test at every bound, and its quantiles are the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations

import numpy as np

from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.hypothesis_tests import EXACT, RANDOM
from allostasis.analysis.intervals import Interval
from allostasis.analysis.survival import log_hazard_ratio, log_rank_sums

BATCH = 4_000_000  # numbers that a batch of random relabellings holds at once


@dataclass(frozen=True)
class Relabelled:
    """A test by relabelling of a mean, a difference of means or a hazard ratio, at any bound.

    Error rate of means at a nominal 5 % under normal nulls, 4,000 data sets: 4.8 % for 7 signs
    (attainable: 4.69 %), 3.0 % for 4 against 4 (attainable: 2.86 %).

    Attributes:
        typical: Sorted statistics of all relabellings but the units' own.
        labellings: Their number with the units' own.
        method: What was relabelled.

    Source:
        Hartigan (1969), Using subsample values as typical values, J. Am. Stat. Assoc. 64;
        Phipson & Smyth (2010), Permutation p-values should never be zero, Stat. Appl. Genet. 9.

    Example:
        >>> test = flipped_signs(np.arange(1.0, 7.0), np.random.default_rng(0))
        >>> test.above(0.0), test.interval(0.95).low
        (0.015625, 1.0)
    """

    typical: np.ndarray
    labellings: int
    method: str

    def above(self, bound: float) -> float:
        """One-sided p of "at most `bound`"."""
        return float(1 + np.searchsorted(self.typical, bound, side="right")) / self.labellings

    def below(self, bound: float) -> float:
        """One-sided p of "at least `bound`"."""
        under = np.searchsorted(self.typical, bound, side="left")
        return float(self.labellings - under) / self.labellings

    def two_sided(self, bound: float = 0.0) -> float:
        """Two-sided p of "it is the bound": twice the smaller one-sided p."""
        return min(1.0, 2 * min(self.above(bound), self.below(bound)))

    def interval(self, level: float = 0.95) -> Interval:
        """All bounds that the two-sided test does not reject; open where it can reject none."""
        k = math.ceil((1 - level) / 2 * self.labellings - 1e-9) - 1
        if k < 1:
            return Interval(None, None, level, self.method)
        low, high = self.typical[k - 1], self.typical[len(self.typical) - k]
        return Interval(float(low), float(high), level, self.method)


def flipped_signs(values: np.ndarray, generator: np.random.Generator) -> Relabelled:
    """The sign-flip test of a mean: exact up to 10^6 flips, else 99,999 random ones.

    Flipping the signs of a subset of value - bound gives a mean as large as the observed one
    where the subset's mean is at most the bound: the typical values are the means of subsets.
    """
    n = len(values)
    if 2**n <= EXACT:
        subsets = _subsets(n)
        count = 2**n
    else:
        subsets = generator.random((RANDOM, n)) < 0.5
        count = RANDOM + 1
    sizes = subsets.sum(axis=1)
    means = np.where(sizes > 0, (subsets @ values) / np.maximum(sizes, 1), -np.inf)
    return Relabelled(np.sort(means), count, "sign flips")


@cache
def _subsets(n: int) -> np.ndarray:
    """Every subset of n units but the empty one, one a row."""
    numbers = np.arange(1, 2**n)
    return (numbers[:, None] >> np.arange(n)) & 1 == 1


def permuted_labels(
    left: np.ndarray, right: np.ndarray, generator: np.random.Generator
) -> Relabelled:
    """The permutation test of mean(left) - mean(right): exact up to 10^6 labellings, else 99,999.

    Exchanging k units of each arm gives a difference as large as the observed one, once the bound
    is taken from `left`, where the means of the exchanged units differ by at most the bound.

    Raises:
        UndefinedError: An arm is empty.
    """
    n, m = len(left), len(right)
    if not n or not m:
        raise UndefinedError("an arm has no unit")
    chosen, count = _labellings(n, m, generator)
    pooled = np.concatenate([left, right])
    moved_in = np.where(chosen >= n, pooled[chosen], 0.0).sum(axis=1)
    k = (chosen >= n).sum(axis=1)
    stayed = np.where(chosen < n, pooled[chosen], 0.0).sum(axis=1)
    means = np.where(k > 0, (left.sum() - stayed - moved_in) / np.maximum(k, 1), -np.inf)
    return Relabelled(np.sort(means), count, "relabellings")


def _labellings(n: int, m: int, generator: np.random.Generator) -> tuple[np.ndarray, int]:
    """Which units make the first arm of n, in every labelling but the units' own.

    Returns:
        One row a labelling, and their number with the units' own.
    """
    labellings = math.comb(n + m, n)
    if labellings <= EXACT:
        return _every_labelling(n, m), labellings
    order = generator.permuted(np.tile(np.arange(n + m), (RANDOM, 1)), axis=1)
    return order[:, :n], RANDOM + 1


@lru_cache(maxsize=1)  # a study's arms are of one size; the largest takes 90 MB
def _every_labelling(n: int, m: int) -> np.ndarray:
    return np.array(list(combinations(range(n + m), n)))[1:]  # the first is the units' own


def permuted_times(
    left: tuple[np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray],
    generator: np.random.Generator,
) -> Relabelled:
    """The log-rank test of two arms by relabelling: exact up to 10^6 labellings, else 99,999.

    At a log hazard ratio of 0, where both arms are censored alike, the test is exact: its statistic
    is the log-rank z. At another bound b, Peto's (estimate - b) / error takes the place of z, with
    the critical values of the relabellings for the normal's; that gives the interval, which covers
    94.6 % at a hazard ratio of 2 and 95.1 % at 4 (1,500 data sets each).

    Error rate at a nominal 5 %, 8 an arm, a fifth of them censored, 4,000 data sets: 5.0 %, where
    the chi-square's is 6.6 %.

    Args:
        left: Times and whether each is censored.
        right: The same of the other arm.
        generator: Draws the labellings where they are too many.

    Raises:
        UndefinedError: No event has runs of both arms at risk.

    Source:
        Mantel (1966), Evaluation of survival data, Cancer Chemother. Rep. 50; Heinze, Gnant &
        Schemper (2003), Exact log-rank tests for unequal follow-up, Biometrics 59.

    Example:
        >>> soon, late = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])
        >>> none = np.zeros(3, dtype=bool)
        >>> test = permuted_times((soon, none), (late, none), np.random.default_rng(0))
        >>> test.above(0.0), test.labellings
        (0.05, 20)
    """
    estimate, error = log_hazard_ratio(left, right)
    times, censored = (np.concatenate(both) for both in zip(left, right, strict=True))
    n, m = len(left[0]), len(right[0])
    chosen, count = _labellings(n, m, generator)
    typical = np.empty(len(chosen))
    rows = max(1, BATCH // (n + m))
    for begin in range(0, len(chosen), rows):
        part = chosen[begin : begin + rows]
        is_left = np.zeros((len(part), n + m), dtype=bool)
        np.put_along_axis(is_left, part, values=True, axis=1)
        excess, variance = log_rank_sums(times, censored, is_left)
        # of a labelling that leaves nothing to compare O is E, so that its z is 0
        z = excess / np.sqrt(np.where(variance > 0, variance, 1.0))
        typical[begin : begin + rows] = estimate - error * z
    # labellings that tie with the units' own, but for rounding
    typical[np.abs(typical) < 1e-9 * error] = 0.0
    return Relabelled(np.sort(typical), count, "relabellings of Peto's estimate")


def max_t(effects: np.ndarray, generator: np.random.Generator, *, flips: int = 9_999) -> np.ndarray:
    """Two-sided p of "this column's mean is 0", adjusted over all columns by the largest |t|.

    The signs of whole rows are flipped, for all columns at once, so that what columns share stays
    shared; a column's p is the share of flips whose largest |t| over columns reaches its own.

    Args:
        effects: One row a unit, one column a head; every head that was looked at.
        generator: Draws the signs.
        flips: How many; the observed signs count as one more.

    Returns:
        One p a column, in (0, 1]. Family-wise error at a nominal 5 %, 16 heads correlated by 0.8,
        4,000 data sets of 12 units: 5.8 % with 499 flips.

    Source:
        Westfall & Young (1993), Resampling-Based Multiple Testing, 2.6.

    Example:
        >>> effects = np.random.default_rng(0).normal(size=(12, 16))
        >>> effects[:, 3] += 4
        >>> np.flatnonzero(max_t(effects, np.random.default_rng(1)) < 0.05)
        array([3])
    """
    n = len(effects)
    squares = (effects**2).sum(axis=0)

    def t(sums: np.ndarray) -> np.ndarray:
        # of a column without spread, all of whose flips but two have one
        spread = np.maximum(squares - sums**2 / n, 1e-15 * squares)
        return np.abs(sums) / np.sqrt(n * spread / (n - 1))

    observed = t(effects.sum(axis=0))
    reached = np.ones(effects.shape[1])
    rows = max(1, BATCH // max(n, effects.shape[1]))
    for begin in range(0, flips, rows):
        signs = generator.choice([-1.0, 1.0], size=(min(rows, flips - begin), n))
        largest = t(signs @ effects).max(axis=1)
        reached += (largest[:, None] >= observed * (1 - 1e-12)).sum(axis=0)
    return reached / (flips + 1)
