"""Who repaired it: self-repair of a logit difference, shared out among the parts of a transformer.

Everything is per example and in logits, and closed forms of two cached runs: no layer is run here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float, Float64

from allostasis.analysis import estimands
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.intervals import Interval
from allostasis.analysis.name_movers import NameMovers, select_name_movers

__all__ = [
    "PERCENTS", "PLAYERS", "SCALE_FIRST", "SCALE_LAST", "NameMovers", "Point", "in_order",
    "percentile_curve", "ratio_of_sums", "repair_shares", "residual_shares", "select_name_movers",
    "shapley", "shapley_shares",
]  # fmt: skip

PLAYERS = ("own", "routing", "content", "mlps", "scale")
"""The unit's own write, other heads' attention patterns, their value vectors, the writes of the
MLPs, and the scale of the final norm."""

SCALE_LAST = PLAYERS
SCALE_FIRST = ("scale", "own", "routing", "content", "mlps")
PERCENTS = (1, 2, 5, 10, 25, 50, 100)

PerExample = Float64[np.ndarray, " example"]


def shapley(
    *,
    attention: Float[np.ndarray, "example own=2 routing=2 content=2"],
    mlps: Float[np.ndarray, "example 2"],
    rest: Float[np.ndarray, " example"],
    scale: Float[np.ndarray, "example 2"],
    constant: Float[np.ndarray, " example"],
) -> dict[str, PerExample]:
    """Shapley values of the five players in the change of the logit difference.

    With the players of S taken from the intervened run and the others from the clean one,
    LD(S) = (attention(S) + mlps(S) + rest) / scale(S) + constant, and
    phi_i = sum over S without i of |S|! (4 - |S|)! / 5! (LD(S + i) - LD(S)): 2^5 evaluations.
    This says where the difference is written, not what caused it.

    Args:
        attention: What all heads write along the direction of the answer minus the foil, not yet
            divided by the scale; index 0 is the clean run, 1 the intervened one, for the unit's own
            write, for the patterns and for the values of the other heads.
        mlps: What the MLPs write, clean and intervened, likewise.
        rest: What is the same in both runs, likewise: embeddings, and biases outside `attention`.
        scale: Of the final norm, clean and intervened; ones in a model without one.
        constant: What the scale does not divide: the norm's bias and the unembedding's.

    Returns:
        `phi_own`, `phi_routing`, `phi_content`, `phi_mlps`, `phi_scale` in logits, any sign; their
        sum is the total effect. A player with equal values in both runs has exactly 0.

    Source:
        Shapley (1953), A value for n-person games, Contributions to the Theory of Games II.

    Example:
        >>> attention = np.zeros((1, 2, 2, 2))
        >>> attention[:, 0] = 3.0  # the clean own write; the intervened one is 0
        >>> phi = shapley(
        ...     attention=attention, mlps=np.array([[1.0, 2.0]]), rest=np.zeros(1),
        ...     scale=np.ones((1, 2)), constant=np.zeros(1),
        ... )
        >>> {player: float(value[0]) for player, value in phi.items() if value.any()}
        {'phi_own': -3.0, 'phi_mlps': 1.0}
    """
    values = _values(attention, mlps, rest, scale, constant)
    n = len(PLAYERS)
    phi = {}
    for axis, player in enumerate(PLAYERS, start=1):
        clean, intervened = np.moveaxis(values, axis, 0)
        gains = (intervened - clean).reshape(len(values), -1)
        joined = [sum(others) for others in product((0, 1), repeat=n - 1)]
        weights = [math.factorial(s) * math.factorial(n - 1 - s) / math.factorial(n)
                   for s in joined]  # fmt: skip
        phi[f"phi_{player}"] = gains @ np.array(weights)
    return phi


def in_order(
    order: Sequence[str],
    *,
    attention: Float[np.ndarray, "example own=2 routing=2 content=2"],
    mlps: Float[np.ndarray, "example 2"],
    rest: Float[np.ndarray, " example"],
    scale: Float[np.ndarray, "example 2"],
    constant: Float[np.ndarray, " example"],
) -> dict[str, PerExample]:
    """What each player adds when they change from the clean to the intervened run in one order.

    `SCALE_LAST` gives the residual method's shares (see `residual_shares`), `SCALE_FIRST` the other
    extreme: Shapley values are the mean over all orders, and the order carries the disagreement.

    Args:
        order: The players, each once.
        attention: As in `shapley`, like everything else.
        mlps: Likewise.
        rest: Likewise.
        scale: Likewise.
        constant: Likewise.

    Returns:
        Logits by player; their sum is the total effect.

    Raises:
        ValueError: A player is missing, repeated or unknown.
    """
    if sorted(order) != sorted(PLAYERS):
        raise ValueError(
            f"order {', '.join(order)}: an order names each of {', '.join(PLAYERS)} once"
        )
    values = _values(attention, mlps, rest, scale, constant)
    at = [0] * len(PLAYERS)
    added, before = {}, values[:, *at]
    for player in order:
        at[PLAYERS.index(player)] = 1
        added[player] = values[:, *at] - before
        before = values[:, *at]
    return added


def _values(
    attention: Float[np.ndarray, "example 2 2 2"],
    mlps: Float[np.ndarray, "example 2"],
    rest: Float[np.ndarray, " example"],
    scale: Float[np.ndarray, "example 2"],
    constant: Float[np.ndarray, " example"],
) -> Float64[np.ndarray, "example 2 2 2 2 2"]:
    """The logit difference of every coalition, an axis a player in the order of `PLAYERS`."""
    attention, mlps, rest, scale, constant = (
        part.astype(np.float64) for part in (attention, mlps, rest, scale, constant)
    )
    write = attention[..., None, None] + (mlps + rest[:, None])[:, None, None, None, :, None]
    return write / scale[:, None, None, None, None] + constant[:, None, None, None, None, None]


def residual_shares(
    *,
    total_effect: Float[np.ndarray, " example"],
    own: Float[np.ndarray, " example"],
    heads: Float[np.ndarray, " example"],
    mlps: Float[np.ndarray, " example"],
) -> dict[str, PerExample]:
    """Self-repair by the residual method: what the scale did is what nothing else accounts for.

    drop = -own; sr = total effect + drop; sr_scale = sr - sr_heads - sr_mlps.

    Args:
        total_effect: Logit difference, intervened minus clean.
        own: Change of the unit's direct effect, with the clean scale in both runs.
        heads: Change of the direct effects of all other heads, likewise.
        mlps: Change of the direct effects of the MLPs, likewise.

    Returns:
        `drop`, `sr`, `sr_heads`, `sr_mlps`, `sr_scale` in logits. sr > 0: the rest of the network
        made up for part of the loss; sr < 0: it lost more.

    Source:
        Rushing & Nanda (2024), Explorations of Self-Repair in Language Models, arXiv:2402.15390.

    Example:
        >>> shares = residual_shares(
        ...     total_effect=np.array([-0.231]), own=np.array([-1.702]),
        ...     heads=np.array([1.017]), mlps=np.array([-0.655]),
        ... )
        >>> round(float(shares["sr"][0]), 3), round(float(shares["sr_scale"][0]), 3)
        (1.471, 1.109)
    """
    total_effect, own, heads, mlps = (
        part.astype(np.float64) for part in (total_effect, own, heads, mlps)
    )
    drop = -own
    sr = total_effect + drop
    return {
        "drop": drop,
        "sr": sr,
        "sr_heads": heads,
        "sr_mlps": mlps,
        "sr_scale": sr - heads - mlps,
    }


def shapley_shares(phi: Mapping[str, PerExample], *, drop: PerExample) -> dict[str, PerExample]:
    """The split of self-repair that Shapley values give, beside the residual one.

    heads = phi_routing + phi_content, mlps = phi_mlps, scale = phi_scale + phi_own + drop: the own
    write's value differs from the drop by what the scale does to it.

    Returns:
        `heads`, `mlps`, `scale` in logits; their sum is the self-repair.
    """
    return {
        "heads": phi["phi_routing"] + phi["phi_content"],
        "mlps": phi["phi_mlps"],
        "scale": phi["phi_scale"] + phi["phi_own"] + drop,
    }


def repair_shares(phi: Mapping[str, PerExample]) -> dict[str, tuple[PerExample, PerExample]]:
    """Shares of what others than the unit itself add: amplitude, geometry, content.

    R = phi_routing + phi_content + phi_mlps + phi_scale; A = phi_scale / R, G = phi_routing / R,
    C = (phi_content + phi_mlps) / R.

    Returns:
        For `A`, `G` and `C` a numerator and a denominator per example, to be taken as a ratio of
        sums (see `ratio_of_sums`), and only where the interval of the sum of R excludes 0.
    """
    content = phi["phi_content"] + phi["phi_mlps"]
    total = phi["phi_routing"] + phi["phi_scale"] + content
    return {
        "A": (phi["phi_scale"], total), "G": (phi["phi_routing"], total), "C": (content, total),
    }  # fmt: skip


def ratio_of_sums(
    numerator: Float[np.ndarray, " example"], denominator: Float[np.ndarray, " example"]
) -> float:
    """Sum over sum: a mean of per-example ratios with each example weighted by its denominator.

    An example whose denominator is near 0 then counts for nearly nothing, so that no ratio needs
    clipping; a mean of clipped ratios can have the wrong sign.

    Raises:
        UndefinedError: The denominators' sum is 0.

    Example:
        >>> ratio_of_sums(np.array([1.0, -3.0]), np.array([1.0, 9.0]))
        -0.2
    """
    below = float(denominator.sum(dtype=np.float64))
    if below == 0:
        raise UndefinedError("the denominators' sum is 0, so the ratio is undefined")
    return float(numerator.sum(dtype=np.float64)) / below


@dataclass(frozen=True)
class Point:
    """Self-repair of the examples on which a unit's direct effect is largest.

    Attributes:
        percent: How many of the examples, in percent.
        n: Examples.
        n_clusters: Clusters that they come from: the units of the interval.
        least: Smallest direct effect among them, in logits.
        ratio: Sum of self-repair over sum of drop; 0 none, 1 all of it is repaired.
        interval: Of the ratio; None where there is none.
        reason: Why there is none.
    """

    percent: int
    n: int
    n_clusters: int
    least: float
    ratio: float
    interval: Interval | None
    reason: str = ""


def percentile_curve(
    direct_effect: Float[np.ndarray, " example"],
    *,
    self_repair: Float[np.ndarray, " example"],
    drop: Float[np.ndarray, " example"],
    clusters: Sequence[str],
    rng: np.random.Generator,
    percents: Sequence[int] = PERCENTS,
    level: float = 0.95,
) -> list[Point]:
    """Self-repair over drop, as ratios of sums, in the examples with the largest direct effects.

    How much is repaired depends on which examples are looked at, so no number stands without its
    percentile: near one half in the top 2 % of tokens, about 0 over all, in published work.

    Args:
        direct_effect: Of the unit in the clean run, by which examples are ranked, in logits.
        self_repair: `sr` of `residual_shares`.
        drop: `drop` of `residual_shares`.
        clusters: Name of each example's cluster.
        rng: For the bootstrap, which 100 clusters and more have; fewer have Fieller's interval.
        percents: Shares of the examples, above 0 and at most 100.
        level: Nominal coverage.

    Raises:
        UndefinedError: There is no example.
        ValueError: A percentage out of range.
    """
    if not len(direct_effect):
        raise UndefinedError("no example to rank by direct effect")
    ranked = np.argsort(-direct_effect, kind="stable")
    points = []
    for percent in percents:
        if not 0 < percent <= 100:
            raise ValueError(f"percent {percent}: allowed are numbers above 0, at most 100")
        top = ranked[: max(1, math.ceil(len(ranked) * percent / 100))]
        names, cluster = np.unique(np.asarray(clusters)[top], return_inverse=True)
        totals = [np.bincount(cluster, weights=column[top]) for column in (self_repair, drop)]
        interval, reason = None, ""
        try:
            interval = estimands.ratio_of_sums(totals[0], totals[1], rng).interval(level)
        except UndefinedError as error:
            reason = str(error)
        points.append(
            Point(
                percent, len(top), len(names), float(direct_effect[top].min()),
                ratio_of_sums(self_repair[top], drop[top]), interval, reason,
            )
        )  # fmt: skip
    return points
