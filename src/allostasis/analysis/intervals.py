"""Interval estimates of means, proportions, medians and ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from allostasis.analysis.curves import UndefinedError

RESAMPLES = 9_999
BATCH = 4_000_000  # numbers that a batch of resamples holds at once


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
    limits = stats.ttest_1samp(values, 0.0).confidence_interval(level)
    return Interval(float(limits.low), float(limits.high), level, "t")


def welch_interval(left: np.ndarray, right: np.ndarray, *, level: float = 0.95) -> Interval:
    """Welch's interval of mean(left) - mean(right), variances not taken as equal.

    Source:
        Welch (1947), The generalization of Student's problem, Biometrika 34.
    """
    _check_spread(np.concatenate([left - left.mean(), right - right.mean()]))
    limits = stats.ttest_ind(left, right, equal_var=False).confidence_interval(level)
    return Interval(float(limits.low), float(limits.high), level, "Welch t")


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


@dataclass(frozen=True)
class Bootstrap:
    """Bias-corrected and accelerated bootstrap of a statistic over units.

    Args:
        columns: Equally long arrays, one entry a unit, resampled together.
        statistic: Takes the columns and `axis`.
        generator: Where randomness comes from.

    Source:
        Efron (1987), Better bootstrap confidence intervals, J. Am. Stat. Assoc. 82.
    """

    columns: tuple[np.ndarray, ...]
    statistic: Callable[..., np.ndarray]
    generator: np.random.Generator
    resamples: int = RESAMPLES

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, float, float]:
        """Resampled statistics, bias z0 and acceleration a."""
        drawn = stats.bootstrap(
            self.columns, self.statistic, paired=True, n_resamples=self.resamples,
            rng=self.generator, method="percentile", batch=max(1, BATCH // len(self.columns[0])),
        ).bootstrap_distribution  # fmt: skip
        n = len(self.columns[0])
        left_out = np.array([
            self.statistic(*(np.delete(column, unit) for column in self.columns), axis=-1)
            for unit in range(n)
        ])
        off = left_out.mean() - left_out
        acceleration = (off**3).sum() / (6 * (off**2).sum() ** 1.5)
        estimate = self.statistic(*self.columns, axis=-1)
        below = ((drawn < estimate).mean() + (drawn <= estimate).mean()) / 2
        return drawn, float(stats.norm.ppf(below)), float(acceleration)

    def interval(self, level: float = 0.95) -> Interval:
        """The BCa interval."""
        drawn, bias, acceleration = self._drawn
        z = bias + stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
        shares = stats.norm.cdf(bias + z / (1 - acceleration * z))
        low, high = np.quantile(drawn, shares)
        return Interval(float(low), float(high), level, f"BCa, {self.resamples} resamples")

    def p_above(self, bound: float) -> float:
        """One-sided p of "at most `bound`": the level at which the lower limit meets it."""
        drawn, bias, acceleration = self._drawn
        share = ((drawn < bound).sum() + 1) / (self.resamples + 2)  # never 0 nor 1
        z = stats.norm.ppf(share) - bias
        return float(stats.norm.cdf(z / (1 + acceleration * z) - bias))


def nested_interval(
    numerators: np.ndarray,
    denominators: np.ndarray,
    groups: np.ndarray,
    generator: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile bootstrap of a ratio of sums on two levels: groups, then units in each group.

    Args:
        numerators: One a unit.
        denominators: One a unit; the number of its prompts where the ratio is a mean.
        groups: The group of each unit; with few of them the interval is too narrow.
        generator: Where randomness comes from.
        level: Nominal coverage.
        resamples: How many.

    Source:
        Davison & Hinkley (1997), Bootstrap Methods and their Application, 3.8.
    """
    names = np.unique(groups)
    members = [np.flatnonzero(groups == name) for name in names]
    chosen = generator.integers(len(names), size=(resamples, len(names)))
    sums = np.zeros((2, resamples))
    for index, units in enumerate(members):
        # how often each unit of this group is drawn: the group's draws, each of its own size
        counts = generator.multinomial(
            (chosen == index).sum(axis=1) * len(units), np.full(len(units), 1 / len(units))
        )
        sums += counts.dot(np.stack([numerators[units], denominators[units]], axis=1)).T
    low, high = np.quantile(sums[0] / sums[1], [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        float(low), float(high), level, f"groups and units resampled, {resamples} resamples"
    )


def _check_spread(values: np.ndarray) -> None:
    if len(values) < 2:
        raise UndefinedError("one unit has no interval")
    if np.ptp(values) == 0:
        raise UndefinedError("ci_degenerate: all units are equal, so their spread is 0")
