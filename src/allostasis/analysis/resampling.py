"""Bootstrap intervals: of one level of units, and of groups of units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy import stats

from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.intervals import Interval

RESAMPLES = 9_999
LEAST = 1e-9  # no p-value of a bootstrap is believed beyond this
BATCH = 4_000_000  # numbers that a batch of resamples holds at once


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
    def estimate(self) -> float:
        """The statistic of all units."""
        return float(self.statistic(*self.columns, axis=-1))

    def _resampled(self) -> np.ndarray:
        """The statistic of each resample."""
        return stats.bootstrap(
            self.columns, self.statistic, paired=True, n_resamples=self.resamples,
            rng=self.generator, method="percentile", batch=max(1, BATCH // len(self.columns[0])),
        ).bootstrap_distribution  # fmt: skip

    def _left_out(self) -> np.ndarray:
        """The statistic without each unit."""
        return np.array([
            self.statistic(*(np.delete(column, unit) for column in self.columns), axis=-1)
            for unit in range(len(self.columns[0]))
        ])

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, float, float]:
        """Resampled statistics, bias z0 and acceleration a."""
        drawn, left_out, estimate = self._resampled(), self._left_out(), self.estimate
        off = left_out.mean() - left_out
        acceleration = (off**3).sum() / (6 * (off**2).sum() ** 1.5)
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
        """One-sided p of "at most `bound`": the level at which the lower limit meets it.

        Beyond all resamples, whose number would bound p from below, by the normal distribution
        with their standard deviation, where that is further out, but never below 1e-9.
        """
        drawn, bias, acceleration = self._drawn
        count = int((drawn < bound).sum())
        z = stats.norm.ppf((count + 1) / (self.resamples + 2)) - bias  # never of 0 nor 1
        p = float(stats.norm.cdf(z / (1 + acceleration * z) - bias))
        tail = float(stats.norm.sf((self.estimate - bound) / drawn.std()))
        beyond = min(max(tail, LEAST), 1 - LEAST)
        return {0: min(p, beyond), self.resamples: max(p, beyond)}.get(count, p)


@lru_cache(maxsize=2)
def resamples(n: int, count: int = RESAMPLES) -> np.ndarray:
    """How often each of n units is in each resample; the same for every number over n units."""
    generator = np.random.default_rng([n, count])
    return generator.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)


class RatioBootstrap(Bootstrap):
    """The BCa bootstrap of a ratio of sums, fast enough for tables of hundreds of numbers.

    Args:
        numerators: One a unit.
        denominators: One a unit; ones for a mean.
        resamples: How many; they are the same ones for all numbers over as many units.
    """

    def __init__(
        self, numerators: np.ndarray, denominators: np.ndarray, resamples: int = RESAMPLES
    ) -> None:
        columns = numerators, denominators
        super().__init__(columns, _ratio, np.random.default_rng(0), resamples)

    def _resampled(self) -> np.ndarray:
        above, below = self.columns
        counts = resamples(len(above), self.resamples)
        return (counts @ above) / (counts @ below)

    def _left_out(self) -> np.ndarray:
        above, below = self.columns
        return (above.sum() - above) / (below.sum() - below)


def _ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(above.sum(axis=axis) / below.sum(axis=axis))


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


def iqm(values: np.ndarray) -> float:
    """Interquartile mean: floor(n / 4) cut from each end of all values.

    Source:
        Agarwal et al. (2021), Deep reinforcement learning at the edge of the statistical precipice,
        NeurIPS 34.

    Example:
        >>> iqm(np.array([0.0, 1.0, 2.0, 100.0]))
        1.5
    """
    return float(stats.trim_mean(values.ravel(), 0.25))


def iqm_interval(
    scores: np.ndarray,
    generator: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile bootstrap of the interquartile mean, runs resampled within each task.

    Args:
        scores: One row a run, one column a task.
        generator: Where randomness comes from.
        level: Nominal coverage.
        resamples: How many.
    """
    n_runs, n_tasks = scores.shape
    drawn = np.empty(resamples)
    size = max(1, BATCH // scores.size)
    for begin in range(0, resamples, size):
        block = drawn[begin : begin + size]
        rows = generator.integers(n_runs, size=(len(block), n_runs, n_tasks))
        values = np.take_along_axis(scores[None], rows, axis=1).reshape(len(block), -1)
        block[:] = stats.trim_mean(values, 0.25, axis=1)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(
        float(low), float(high), level, f"percentile bootstrap within tasks, {resamples} resamples"
    )


def resampled_difference(
    left: np.ndarray, right: np.ndarray, generator: np.random.Generator, *, level: float = 0.95
) -> Interval:
    """Percentile bootstrap of mean(left) - mean(right), units of each arm resampled alone.

    With few units it covers less than it says; it is printed beside and decides nothing.

    Args:
        left: One a unit.
        right: Of the other arm.
        generator: Draws the 9,999 resamples.
        level: Nominal coverage.

    Raises:
        UndefinedError: An arm has one unit.
    """
    if min(len(left), len(right)) < 2:
        raise UndefinedError("no interval: an arm has one unit")
    found = stats.bootstrap(
        (left, right), lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis), rng=generator,
        n_resamples=RESAMPLES, method="percentile", confidence_level=level,
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high), level, "percentile")
