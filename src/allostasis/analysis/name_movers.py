"""Which heads write the answer: chosen by what they write, with the error rate of the choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float, Float64
from scipy import stats

DRAWS = 10_000
_CHUNK = 1_000_000  # numbers that a block of draws holds


class NameMovers(NamedTuple):
    """Heads that write the answer on the prompts that they were chosen on.

    Attributes:
        heads: (layer, head), the largest direct effect first.
        q: Benjamini-Hochberg q of every head of the model.
    """

    heads: list[tuple[int, int]]
    q: Float64[np.ndarray, "layer head"]


def select_name_movers(
    direct_effects: Float[np.ndarray, "example layer head"],
    clusters: Sequence[str],
    *,
    rng: np.random.Generator,
    k: Annotated[int, Gt(0)] = 3,
    q: Annotated[float, Gt(0), Lt(1)] = 0.01,
    draws: Annotated[int, Ge(1)] = DRAWS,
) -> NameMovers:
    """The `k` heads of largest mean direct effect among those that pass a test of it.

    A head passes whose mean is positive and whose one-sided p, corrected over all heads of the
    model, is at most `q`. Its mean over clusters is studentised, and resampled clusters say how
    large that gets by chance: p = (1 + number of draws with (m* - m) / se* >= m / se) / (1 + draws)
    with the mean m of cluster means and its standard error se. Without studentising, the far tail
    that a correction over all heads needs is too short.

    Args:
        direct_effects: Of every head at END, in logits, on the discovery split alone.
        clusters: Name of each example's cluster; each cluster has the same weight.
        rng: Where the draws come from.
        k: At most so many heads.
        q: False discovery rate.
        draws: At least so many; as many more as let one head alone pass among all of them.

    Returns:
        At most `k` heads, and the q of every head; effects have to be measured on other examples.

    Raises:
        ValueError: Clusters and examples differ in number, or there are fewer than two clusters.

    Source:
        Benjamini & Hochberg (1995), Controlling the false discovery rate, J. R. Stat. Soc. B 57;
        Davison & Hinkley (1997), Bootstrap Methods and their Application, 4.4.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> effects = rng.normal(size=(40, 2, 3))
        >>> effects[:, 1, 2] += 3
        >>> select_name_movers(effects, [f"c{i}" for i in range(40)], rng=rng).heads
        [(1, 2)]
    """
    n, *shape = direct_effects.shape
    if len(clusters) != n:
        raise ValueError(f"{len(clusters)} clusters for {n} examples: each example has one")
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"all {n} examples are of cluster {names[0]}; a test needs two at least")
    member = np.arange(len(names))[:, None] == cluster
    per_cluster = member @ direct_effects.reshape(n, -1) / member.sum(axis=1, keepdims=True)
    p = _p_above_zero(per_cluster, rng, max(draws, math.ceil(math.prod(shape) / q)))
    levels = stats.false_discovery_control(p, method="bh").reshape(shape)
    means = per_cluster.mean(axis=0).reshape(shape)
    passed = np.argwhere((levels <= q) & (means > 0))
    largest = sorted(((int(layer), int(head)) for layer, head in passed), key=lambda at: -means[at])
    return NameMovers(largest[:k], levels)


def _p_above_zero(
    values: Float64[np.ndarray, "cluster head"], rng: np.random.Generator, draws: int
) -> Float64[np.ndarray, " head"]:
    """One-sided bootstrap p of "the mean over clusters is at most 0", for all heads at once."""
    n, n_heads = values.shape
    mean = values.mean(axis=0)
    off = values - mean
    deviation = np.sqrt((off**2).mean(axis=0))
    as_large = np.zeros(n_heads)
    rows = max(1, _CHUNK // max(n, n_heads))
    for start in range(0, draws, rows):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(rows, draws - start)) / n
        moved = counts @ off
        spread = np.sqrt(np.maximum(counts @ off**2 - moved**2, 0))
        as_large += (moved * deviation >= mean * spread).sum(axis=0)
    p = (1 + as_large) / (1 + draws)
    # rounding noise has no tail: what is equal in all clusters is above 0 or it is not
    equal = deviation <= 1e-12 * np.abs(mean)
    return np.where(equal, np.where(mean > 0, 1 / (1 + draws), 1.0), p)
