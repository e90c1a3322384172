"""What ablations did to a pretrained model, estimated over clusters of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from allostasis.analysis import clusters, estimands
from allostasis.analysis import statistics as st
from allostasis.analysis.claims import Select
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.intervals import Interval
from allostasis.analysis.prompts import column
from allostasis.analysis.repair import Point, percentile_curve
from allostasis.analysis.text import bracket, number

if TYPE_CHECKING:
    from allostasis.analysis.aggregate import Arm
    from allostasis.analysis.curves import RunView, Table
    from allostasis.analysis.prompts import Column, Pair

ABLATIONS: tuple[str, ...] = ("zero", "mean", "resample")
KINDS = {
    ("critical", "all"): "critical",
    ("critical", "published"): "critical, as published",
    ("random_control", "random"): "random sets",
    ("random_control", "published"): "random, as published",
}
"""What was ablated, by condition and kind of set, in the order of figures and tables."""
LEVEL = 0.95
FEWEST = 5  # clusters: an interval of fewer says nothing


@dataclass(frozen=True)
class Estimate:
    """A number over clusters of prompts.

    Attributes:
        value: The estimate.
        interval: At 95 %; None where there is none.
        n: Clusters.
        reason: Why there is no interval.
    """

    value: float
    interval: Interval | None
    n: int
    reason: str = ""

    @property
    def text(self) -> str:
        """The number with its interval."""
        ends = f"[{self.reason}]" if self.interval is None else bracket(self.interval)
        return f"{number(self.value)} {ends}"

    @property
    def bars(self) -> tuple[float, float]:
        """Distances to the ends of the interval; 0 where there is none."""
        if self.interval is None or self.interval.low is None or self.interval.high is None:
            return 0.0, 0.0
        return max(0.0, self.value - self.interval.low), max(0.0, self.interval.high - self.value)


@dataclass(frozen=True)
class Group:
    """Prompts under one kind of intervention.

    Attributes:
        label: What was ablated.
        ablation: What stands in its place.
        rows: Of examples.parquet or depths.parquet.
    """

    label: str
    ablation: str
    rows: pd.DataFrame

    @property
    def name(self) -> str:
        """Label and ablation."""
        return f"{self.label}, {self.ablation}"


def groups(arms: Sequence[Arm], table: Table) -> list[Group]:
    """What the arms hold of each kind of set and ablation.

    Raises:
        UndefinedError: They hold nothing.
    """
    by_name = {arm.condition: arm for arm in arms}
    found: list[Group] = []
    for (condition, kind), label in KINDS.items():
        for ablation in ABLATIONS:
            if condition not in by_name:
                continue
            select = Select.model_validate({"ablation": ablation, "set": kind})
            try:
                rows = clusters.prompts(by_name[condition], table, select)
            except UndefinedError:
                continue
            found.append(Group(label, ablation, rows))
    if not found:
        raise UndefinedError(f"no run ablated anything (no rows of {table}.parquet)")
    return found


def critical(arms: Sequence[Arm], table: Table = "examples") -> list[Group]:
    """The groups in which all chosen heads are ablated together.

    Raises:
        UndefinedError: There are none.
    """
    chosen = [group for group in groups(arms, table) if group.label == KINDS["critical", "all"]]
    if not chosen:
        raise UndefinedError("no run of condition 'critical' ablated all chosen heads")
    return chosen


def estimate(rows: pd.DataFrame, values: Column | Pair) -> Estimate:
    """A mean of a column, or a ratio of sums of a pair, over clusters.

    Args:
        rows: Prompts.
        values: One a row, or a pair.
    """
    totals = clusters.add_up(rows, values)
    pair = totals.numerators, totals.denominators
    value = float(pair[0].sum() / pair[1].sum())
    interval, reason = None, ""
    try:
        if isinstance(values, tuple):
            interval = ratio_interval(*pair)
        else:
            value = float(totals.means.mean())
            interval = _mean_interval(totals.means)
    except UndefinedError as error:
        reason = str(error)
    return Estimate(value, interval, len(totals.names), reason)


def _mean_interval(values: np.ndarray) -> Interval:
    """Interval of a mean over clusters, by the rule that claims follow."""
    if len(values) < estimands.BOOTSTRAP_FROM or np.ptp(values) == 0:
        return st.t_interval(values, level=LEVEL)
    return st.RatioBootstrap(values, np.ones_like(values)).interval(LEVEL)


def ratio_interval(above: np.ndarray, below: np.ndarray) -> Interval:
    """Interval of a ratio of sums over clusters, by the rule that claims follow.

    Raises:
        UndefinedError: There is one cluster, or the denominator may be 0.
    """
    estimate = above.sum() / below.sum()
    if len(above) < 2 or np.ptp(above - estimate * below) == 0:
        one = "one cluster has no interval"
        raise UndefinedError(one if len(above) < 2 else "all clusters have one ratio")
    interval = st.fieller(above, below, level=LEVEL)  # undefined where the denominator may be 0
    if len(above) < estimands.RATIO_BOOTSTRAP_FROM:
        return interval
    return st.RatioBootstrap(above, below).interval(LEVEL)


def own_direct_effect(groups: Sequence[Group]) -> pd.Series:
    """Direct effect of the ablated heads in the clean run, by (seed, example).

    What zero ablation takes away; that of the first ablation there is, where zero is not.
    """
    zero = next((group for group in groups if group.ablation == "zero"), groups[0])
    return zero.rows.groupby(["seed", "example"])["drop"].mean()


def by_percentile(group: Group, own: pd.Series) -> list[Point]:
    """Self-repair over drop in the prompts with the largest direct effects.

    Args:
        group: All chosen heads, ablated together.
        own: As `own_direct_effect` gives it.
    """
    rows = group.rows
    direct = own.reindex(pd.MultiIndex.from_frame(rows[["seed", "example"]])).to_numpy(float)
    curve = percentile_curve(
        direct,
        self_repair=column(rows, "sr"),
        drop=column(rows, "drop"),
        clusters=rows["cluster"].astype(str).tolist(),
        rng=estimands.generator(f"percentiles of {group.name}"),
    )
    few = f"fewer than {FEWEST} clusters"
    return [p if p.n_clusters >= FEWEST else replace(p, interval=None, reason=few) for p in curve]


def logarithm(ratio: Estimate) -> Estimate:
    """The natural logarithm of a positive ratio of sums."""
    interval = None if ratio.interval is None else estimands.logarithm(ratio.interval)
    return Estimate(float(np.log(ratio.value)), interval, ratio.n, ratio.reason)


def by_set(rows: pd.DataFrame, name: str) -> pd.Series:
    """Mean of a column for each seed's sets, by (seed, intervention)."""
    return rows.groupby(["seed", "intervention"])[name].mean()


def norm_by_set(rows: pd.DataFrame, depth: int) -> pd.Series:
    """Ratio of END norms (C) at a depth for each seed's sets, by (seed, intervention)."""
    here = rows[rows["depth"] == depth].groupby(["seed", "intervention"])
    return here["norm_end"].sum() / here["norm_end_clean"].sum()


def last_depth(rows: pd.DataFrame) -> int:
    """The depth behind the last block, which is the number of layers."""
    return int(rows["depth"].max())


def ratio_by_depth(rows: pd.DataFrame, above: str, below: str) -> np.ndarray:
    """Ratio of sums of two norms over prompts, at depths from 0.

    Depths before the first that an intervention can reach have no rows, and a ratio of 1.
    """
    sums = rows.groupby("depth")[[above, below]].sum().reindex(range(last_depth(rows) + 1))
    sums = sums.fillna(1.0)
    return column(sums, above) / column(sums, below)


def rank_among(value: pd.Series, others: pd.Series) -> tuple[float, int]:
    """How many random sets of the same seed lie below the chosen set; ties count half.

    Args:
        value: Of the chosen set, by (seed, intervention).
        others: Of the random sets, likewise.

    Returns:
        (sets below it, sets), over all seeds that have both.
    """
    below, count = 0.0, 0
    own_seeds, seeds = (s.index.get_level_values("seed") for s in (value, others))
    for seed, own in zip(own_seeds, value, strict=True):
        there = others.to_numpy()[seeds == seed]
        below += float((there < own).sum() + (there == own).sum() / 2)
        count += len(there)
    return below, count


def head_values(
    runs: Sequence[RunView], metric: str, value: str, *, split: str, is_ablated: bool
) -> Mapping[str, np.ndarray]:
    """One number a head: mean over seeds, and its interval.

    Args:
        runs: Of one model.
        metric: Name in the records.
        value: Column that holds the number.
        split: Which prompts.
        is_ablated: Whether rows of zero ablations of single heads are meant, or of the clean run.

    Returns:
        `value`, `low`, `high` by (layer, head), NaN where there is none. The interval of one seed
        is the record's; of several, Student's t over seeds, about the drawing of prompts.

    Raises:
        UndefinedError: There are no such rows.
    """
    tables = [table for run in runs if len(table := _of_heads(run, metric, split, is_ablated))]
    if not tables:
        raise UndefinedError(f"{metric} was not recorded by head on split '{split}'")
    rows = pd.concat(tables)
    layers, heads = int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1
    found = {name: np.full((layers, heads), np.nan) for name in ("value", "low", "high")}
    for at in sorted({(int(a), int(b)) for a, b in zip(rows["layer"], rows["head"], strict=True)}):
        own = rows[(rows["layer"] == at[0]) & (rows["head"] == at[1])]
        found["value"][at] = own[value].mean()
        ends = (own["ci_low"].iloc[0], own["ci_high"].iloc[0])
        if len(own) > 1:
            ends = (np.nan, np.nan)
            if np.ptp(own[value]) > 0:
                interval = st.t_interval(own[value].to_numpy(float), level=LEVEL)
                ends = interval.low, interval.high
        found["low"][at], found["high"][at] = ends
    return found


def _of_heads(run: RunView, metric: str, split: str, is_ablated: bool) -> pd.DataFrame:
    rows = run.interventions(metric, split=split)
    rows = rows[rows["layer"].notna() & rows["head"].notna()]
    return rows[rows["intervention"].notna() == is_ablated].drop_duplicates(["layer", "head"])


def selected(arms: Sequence[Arm]) -> Iterator[tuple[int, str, Mapping[str, object]]]:
    """What discovery chose: (seed, head, what is known of it), one run a seed."""
    seen: set[int] = set()
    for arm in sorted(arms, key=lambda arm: arm.condition != "critical"):
        for run in arm.runs:
            found = run.run.get("discovery") or {}
            if run.seed in seen or not found:
                continue
            seen.add(run.seed)
            for head in found.get("selected") or []:
                about = {k: v[head] for k, v in found.items() if isinstance(v, dict) and head in v}
                yield run.seed, str(head), about
