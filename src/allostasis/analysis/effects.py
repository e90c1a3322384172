"""Standardised effect sizes with exact intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

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
    """P(T >= t) of a noncentral t: the one-sided p of "the noncentrality is at most delta".

    1 - E Phi(t s - delta) over s = sqrt(chi^2_df / df), integrated; scipy's `nct` gives 0 or NaN
    where t and delta lie far apart.

    Example:
        >>> round(noncentral_above(2.0, 10, 0.0), 6)  # the central t
        0.036694
    """
    if t < 0:
        return 1 - noncentral_above(-t, df, -delta)
    if t > STEEP:  # then Phi is a step to the nodes of s, and P(s <= (z + delta) / t) is not
        z, weight = _nodes(-9.0, 9.0)
        reached = stats.chi.cdf(np.maximum(z + delta, 0) / t, df, scale=1 / math.sqrt(df))
        found = float(weight @ (stats.norm.pdf(z) * reached))
    else:
        s, mass = spread_nodes(df)
        found = float(mass @ special.ndtr(delta - t * s))
    return min(1.0, max(0.0, found))


STEEP = 30.0
N_NODES = 600


@cache
def _nodes(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss and Legendre's rule."""
    at, weight = np.polynomial.legendre.leggauss(N_NODES)
    return (high - low) / 2 * at + (high + low) / 2, (high - low) / 2 * weight


@cache
def spread_nodes(df: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of s = sqrt(chi^2_df / df), and the probability that each stands for."""
    scale = 1 / math.sqrt(df)
    ends = stats.chi.ppf(1e-15, df, scale=scale), stats.chi.isf(1e-15, df, scale=scale)
    s, weight = _nodes(*map(float, ends))
    return s, weight * stats.chi.pdf(s, df, scale=scale)


def _noncentrality(t: float, df: int, share: float) -> float:
    """The noncentrality at which `share` of the distribution lies below t."""

    def surplus(delta: float) -> float:
        return 1 - noncentral_above(t, df, delta) - share

    # t / delta is about s, which is rarely far from 1; the normal part adds less than 10
    reach = abs(t) * float(stats.chi.isf(1e-6, df)) / math.sqrt(df) + 10
    root = optimize.root_scalar(surplus, bracket=(-reach, reach), xtol=1e-12)
    return float(root.root)
