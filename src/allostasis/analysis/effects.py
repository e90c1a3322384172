"""Standardised effect sizes with exact intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.intervals import Interval


@dataclass(frozen=True)
class Effect:
    """A standardised difference.

    Attributes:
        d: Difference in units of the (pooled) standard deviation, ddof 1.
        g: d without its small-sample bias.
        interval: Of g, from the noncentral t distribution.
    """

    d: float
    g: float
    interval: Interval


def unbiasing(df: int) -> float:
    """J(df) = Gamma(df / 2) / (sqrt(df / 2) Gamma((df - 1) / 2)), which times d gives g.

    Example:
        >>> round(unbiasing(8), 4)
        0.9027
    """
    return math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2) - math.log(df / 2) / 2)


def one_sample_effect(values: np.ndarray, bound: float, *, level: float = 0.95) -> Effect:
    """Distance of a mean from a bound, in standard deviations between units."""
    n = len(values)
    return _effect(values.mean() - bound, values.std(ddof=1), 1 / math.sqrt(n), n - 1, level)


def hedges_g(left: np.ndarray, right: np.ndarray, *, level: float = 0.95) -> Effect:
    """Difference of two means in pooled standard deviations, unbiased.

    Source:
        Hedges (1981), Distribution theory for Glass's estimator, J. Educ. Stat. 6.
    """
    n, m = len(left), len(right)
    df = n + m - 2
    pooled = math.sqrt(((n - 1) * left.var(ddof=1) + (m - 1) * right.var(ddof=1)) / df)
    return _effect(left.mean() - right.mean(), pooled, math.sqrt(1 / n + 1 / m), df, level)


def _effect(difference: float, sd: float, se_of_d: float, df: int, level: float) -> Effect:
    if df < 2 or sd == 0:
        raise UndefinedError("an effect size needs three units that are not all equal")
    d, factor = difference / sd, unbiasing(df)
    t = d / se_of_d
    low, high = (_noncentrality(t, df, tail) for tail in ((1 + level) / 2, (1 - level) / 2))
    limits = (factor * limit * se_of_d for limit in (low, high))
    return Effect(d, factor * d, Interval(*limits, level=level, method="noncentral t"))


def noncentral_above(t: float, df: int, delta: float) -> float:
    """P(T >= t) of a noncentral t: the one-sided p of "the noncentrality is at most delta"."""
    if t < 0:  # far tails of a negative t are not a number in scipy
        return 1 - noncentral_above(-t, df, -delta)
    return 1 - float(stats.nct.cdf(t, df, delta))  # scipy's sf is 0 for a large t


def _noncentrality(t: float, df: int, share: float) -> float:
    """The noncentrality at which `share` of the distribution lies below t."""
    if t < 0:  # far tails of a negative t are not a number in scipy
        return -_noncentrality(-t, df, 1 - share)

    def surplus(delta: float) -> float:
        return float(stats.nct.cdf(t, df, delta)) - share

    root = optimize.root_scalar(surplus, bracket=(-10.0, 2 * t + 10), xtol=1e-12)
    return float(root.root)
