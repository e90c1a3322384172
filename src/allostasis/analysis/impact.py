"""Many interventions on the same prompts at once: intervals, sign-flip p, percentiles.

Rows of a matrix are interventions, columns are prompts or their clusters. What is drawn at random
is drawn once for all interventions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from allostasis.analysis import estimands, resampling
from allostasis.analysis.hypothesis_tests import RANDOM

EXACT = 16  # clusters up to which all sign flips are counted
BATCH = 4_000_000  # numbers that a batch of sign flips holds at once


@dataclass(frozen=True)
class Clustered:
    """Numbers of prompts added up by cluster.

    Attributes:
        sums: One row an intervention, one column a cluster.
        sizes: Prompts of each cluster.
    """

    sums: np.ndarray
    sizes: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Mean over prompts, one an intervention."""
        return self.sums.sum(axis=1) / self.sizes.sum()


def clustered(values: np.ndarray, clusters: Sequence[str]) -> Clustered:
    """Add up a matrix [intervention, prompt] by cluster, in the order of their names."""
    names, index = np.unique(np.asarray(clusters), return_inverse=True)
    member = np.zeros((values.shape[1], len(names)))
    member[np.arange(values.shape[1]), index] = 1.0
    return Clustered(values @ member, member.sum(axis=0))


def intervals(found: Clustered, *, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of the means over prompts; NaN where all clusters have one mean.

    BCa over clusters from 50 of them on, below that Student's t of the linearised ratio, as claims
    have it: with few clusters the bootstrap covers less.

    Args:
        found: What is averaged.
        level: Nominal coverage.

    Returns:
        Lower and upper limits, one an intervention.
    """
    n = len(found.sizes)
    off = found.sums - found.means[:, None] * found.sizes
    spread = off.std(axis=1, ddof=1) if n > 1 else np.zeros(len(off))
    has_spread = spread > 1e-12 * (1 + np.abs(found.means))
    low, high = np.full((2, len(off)), np.nan)
    if not has_spread.any():
        return low, high
    some = Clustered(found.sums[has_spread], found.sizes)
    if n < estimands.BOOTSTRAP_FROM:
        width = stats.t.ppf((1 + level) / 2, n - 1) * spread[has_spread]
        width /= np.sqrt(n) * found.sizes.mean()
        ends = some.means - width, some.means + width
    else:
        ends = _bca(some, level)
    low[has_spread], high[has_spread] = ends
    return low, high


def _bca(found: Clustered, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected and accelerated bootstrap of every mean, on the same resamples."""
    counts = resampling.resamples(len(found.sizes))
    drawn = (found.sums @ counts.T) / (counts @ found.sizes)
    means, total = found.means[:, None], found.sums.sum(axis=1, keepdims=True)
    left_out = (total - found.sums) / (found.sizes.sum() - found.sizes)
    off = left_out.mean(axis=1, keepdims=True) - left_out
    acceleration = (off**3).sum(axis=1) / (6 * (off**2).sum(axis=1) ** 1.5)
    below = ((drawn < means).mean(axis=1) + (drawn <= means).mean(axis=1)) / 2
    bias = stats.norm.ppf(below)
    drawn.sort(axis=1)
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = bias + stats.norm.ppf(share)
        place = stats.norm.cdf(bias + z / (1 - acceleration * z)) * (drawn.shape[1] - 1)
        left = np.clip(place.astype(int), 0, drawn.shape[1] - 2)
        at = np.arange(len(drawn))
        step = drawn[at, left + 1] - drawn[at, left]
        ends.append(drawn[at, left] + (place - left) * step)
    return ends[0], ends[1]


@dataclass(frozen=True)
class SignFlips:
    """Tests of "the intervention has no effect" by flipping the signs of clusters.

    Attributes:
        p: Two-sided, of each intervention alone.
        p_max: The same against the largest of all interventions (max-T), which holds for them all.
    """

    p: np.ndarray
    p_max: np.ndarray


def sign_flips(found: Clustered, rng: np.random.Generator, draws: int = RANDOM) -> SignFlips:
    """Flip the signs of clusters: all ways up to 16 clusters, else `draws` random ones.

    The statistic of an intervention is |sum over clusters of s_c x_c| / sqrt(sum x_c^2), so that
    interventions of unlike spread can be compared in the maximum.

    Args:
        found: Effects, 0 under the null.
        rng: Where random flips come from.
        draws: How many.

    Source:
        Westfall & Young (1993), Resampling-Based Multiple Testing, for max-T.

    Example:
        >>> x = Clustered(np.ones((1, 5)), np.ones(5))
        >>> sign_flips(x, np.random.default_rng(0)).p
        array([0.0625])
    """
    n = found.sums.shape[1]
    scale = np.sqrt((found.sums**2).sum(axis=1))
    scale = np.where(scale > 0, scale, 1.0)
    sums = found.sums / scale[:, None]
    observed = np.abs(sums.sum(axis=1)) - 1e-9
    is_exact = n <= EXACT
    total = 2**n if is_exact else draws
    each, largest = np.zeros((2, len(sums)))
    step = max(1, BATCH // max(n, len(sums)))
    for begin in range(0, total, step):
        size = min(step, total - begin)
        if is_exact:
            bits = (np.arange(begin, begin + size)[:, None] >> np.arange(n)) & 1
        else:
            bits = rng.integers(2, size=(size, n))
        flipped = np.abs((2.0 * bits - 1) @ sums.T)
        each += (flipped >= observed).sum(axis=0)
        largest += (flipped.max(axis=1)[:, None] >= observed).sum(axis=0)
    more = 0 if is_exact else 1
    return SignFlips((each + more) / (total + more), (largest + more) / (total + more))


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """q-values: the least false discovery rate at which each is a discovery."""
    return np.asarray(stats.false_discovery_control(p, method="bh")) if len(p) else p


def percentile(values: np.ndarray) -> np.ndarray:
    """Share of the others that lie below each value, in percent; ties count half.

    0: the smallest, 100: the largest; 50 for one alone, which has no others.

    Example:
        >>> percentile(np.array([0.0, 2.0, 1.0, 1.0]))
        array([  0., 100.,  50.,  50.])
    """
    if len(values) == 1:
        return np.array([50.0])
    return 100 * (stats.rankdata(values) - 1) / (len(values) - 1)
