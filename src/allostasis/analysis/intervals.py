"""Interval estimates of means, proportions, medians and ratios."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from allostasis.analysis.curves import UndefinedError


@dataclass(frozen=True)
class Interval:
    """A two-sided interval.

    Attributes:
        low: Lower limit; None where it is not bounded by the data.
        high: Upper limit; None where it is not (a median that was not reached).
        level: Nominal coverage.
        method: How it was made.
    """

    low: float | None
    high: float | None
    level: float
    method: str

    def within(self, low: float, high: float) -> bool:
        """Whether it lies inside [low, high]."""
        return (
            self.low is not None and self.high is not None and low <= self.low and self.high <= high
        )


def t_interval(values: np.ndarray, *, level: float = 0.95) -> Interval:
    """Student's t interval of a mean: mean ± t(n - 1) sd / sqrt(n).

    Args:
        values: One number a unit, at least two, not all equal.
        level: Nominal coverage.

    Source:
        Student (1908), The probable error of a mean, Biometrika 6.

    Example:
        >>> interval = t_interval(np.array([2.20, 2.45, 2.38]))
        >>> round(interval.low, 5), round(interval.high, 5)
        (2.02295, 2.66371)
    """
    _check_spread(values)
    # not ttest_1samp's: it warns of values that are nearly equal
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values)
    return Interval(float(values.mean() - half), float(values.mean() + half), level, "t")


def welch_interval(left: np.ndarray, right: np.ndarray, *, level: float = 0.95) -> Interval:
    """Welch's interval of mean(left) - mean(right), variances not taken as equal.

    Source:
        Welch (1947), The generalization of Student's problem, Biometrika 34.
    """
    _check_spread(np.concatenate([left - left.mean(), right - right.mean()]))
    difference, error, df = welch(left, right)
    half = float(stats.t.ppf((1 + level) / 2, df)) * error
    return Interval(difference - half, difference + half, level, "Welch t")


def welch(left: np.ndarray, right: np.ndarray) -> tuple[float, float, float]:
    """Difference of two means, its standard error, and Welch and Satterthwaite's freedom.

    Not ttest_ind's: it warns of an arm whose units are equal, such as one that is all censored.
    """
    parts = [float(side.var(ddof=1)) / len(side) for side in (left, right)]
    freedom = sum(v**2 / (len(side) - 1) for v, side in zip(parts, (left, right), strict=True))
    return float(left.mean() - right.mean()), sum(parts) ** 0.5, sum(parts) ** 2 / freedom


def clopper_pearson(count: int, n: int, *, level: float = 0.95) -> Interval:
    """Exact binomial interval of a proportion; covers at least its level, always in [0, 1].

    Source:
        Clopper & Pearson (1934), The use of confidence or fiducial limits, Biometrika 26.

    Example:
        >>> round(clopper_pearson(6, 6).low, 3)
        0.541
    """
    limits = stats.binomtest(count, n).proportion_ci(level, method="exact")
    return Interval(float(limits.low), float(limits.high), level, "Clopper-Pearson")


def median_interval(times: np.ndarray, censored: np.ndarray, *, level: float = 0.95) -> Interval:
    """Interval of a median between order statistics: the sign test inverted.

    [x_(k), x_(n + 1 - k)] with the largest k for which P(Binomial(n, 1/2) < k) <= (1 - level) / 2.
    A censored time may lie anywhere after its value, so it counts as later than every bound above.

    Args:
        times: Times to the event, or to the end of the run where censored.
        censored: Whether the event had not come by then.
        level: Nominal coverage; covers at least this.

    Raises:
        UndefinedError: Too few units: no pair of order statistics covers the level.

    Source:
        Conover (1999), Practical Nonparametric Statistics, 3.2.

    Example:
        >>> median_interval(np.arange(1, 9), np.zeros(8, dtype=bool)).high
        8.0
    """
    n = len(times)
    k = int(stats.binom.ppf((1 - level) / 2, n, 0.5))
    if stats.binom.cdf(k - 1, n, 0.5) > (1 - level) / 2 or k < 1:
        least = int(np.ceil(np.log2(2 / (1 - level))))
        raise UndefinedError(f"a median's interval needs at least {least} units, there are {n}")
    # a censored time is at least its value: that bounds the median from below, never from above
    low = np.sort(times)[k - 1]
    high = np.sort(np.where(censored, np.inf, times))[n - k]
    return Interval(float(low), float(high) if np.isfinite(high) else None, level, "sign test")


def fieller(numerator: np.ndarray, denominator: np.ndarray, *, level: float = 0.95) -> Interval:
    """Fieller's interval of sum(numerator) / sum(denominator) over paired units.

    The values rho for which |mean(num) - rho mean(den)| <= t(n - 1) se(num - rho den).

    Raises:
        UndefinedError: The denominator's own interval contains 0 (g >= 1), so that every ratio, or
            every ratio outside an interval, is in agreement with the data.

    Source:
        Fieller (1954), Some problems in interval estimation, J. R. Stat. Soc. B 16.

    Example:
        >>> weight = np.array([1.0, 1.2, 0.9, 1.1])
        >>> fieller(2 * weight + np.array([0.1, -0.2, 0.1, 0.0]), weight).within(1.5, 2.5)
        True
    """
    n = len(numerator)
    t = stats.t.ppf((1 + level) / 2, n - 1)
    (var_num, cov), (_, var_den) = np.cov(numerator, denominator) / n
    num, den = numerator.mean(), denominator.mean()
    a, b, c = den**2 - t**2 * var_den, num * den - t**2 * cov, num**2 - t**2 * var_num
    if a <= 0:
        raise UndefinedError(
            f"the denominator's {level:.0%} interval contains 0, so the ratio is undefined"
        )
    root = np.sqrt(max(b**2 - a * c, 0.0))
    return Interval(float((b - root) / a), float((b + root) / a), level, "Fieller")


def _check_spread(values: np.ndarray) -> None:
    if len(values) < 2:
        raise UndefinedError("one unit has no interval")
    if np.ptp(values) == 0:
        raise UndefinedError("ci_degenerate: all units are equal, so their spread is 0")
