"""Which cells of a corpus a model can do, and how far it just says what it read last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from allostasis.analysis.intervals import Interval
from allostasis.analysis.resampling import RatioBootstrap

CHANCE = 0.5
FEWEST = 2  # groups from which an interval can be had


def clustered_proportion(
    right: np.ndarray, groups: Sequence[str], *, level: float = 0.95
) -> Interval:
    """Interval of a proportion over rows of which those of a group may all be alike.

    Clopper-Pearson with as many trials as there are groups: x = p n, with p the share of right
    rows and n the number of groups. Exact where each group has one row; too wide, never too narrow,
    where each has more. It stays open where all rows are right, unlike a bootstrap.

    Args:
        right: Whether each row is right.
        groups: The group of each row.
        level: Coverage.

    Returns:
        Shares, in [0, 1].

    Source:
        Korn & Graubard (1998), Confidence intervals for proportions with small expected number of
        positive counts estimated from survey data, Survey Methodology 24, at their largest design
        effect.

    Example:
        >>> round(clustered_proportion(np.ones(6, bool), list("abcdef")).low, 3)
        0.541
    """
    n, tail = len(set(groups)), (1 - level) / 2
    count = float(np.mean(right)) * n
    low = stats.beta.ppf(tail, count, n - count + 1) if count > 0 else 0.0
    high = stats.beta.ppf(1 - tail, count + 1, n - count) if count < n else 1.0
    return Interval(float(low), float(high), level, "Clopper-Pearson over groups")


def competence(rows: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Accuracy and logit difference of the untouched model, cell by cell.

    Args:
        rows: `ld`, `cell` and `group` of each row of the validation split.
        level: Of the intervals.

    Returns:
        A row a cell, in order of their names: `cell`, `n`, `n_groups`; `accuracy`, the share of
        rows with ld > 0, `accuracy_low` and `accuracy_high`; `ld`, its mean in logits, `ld_low` and
        `ld_high` (null with fewer than two groups or where all are alike); `state`: `competent`
        where the lower limit of accuracy exceeds 0.5, `not competent` where the upper limit does
        not reach it, else `undecided`; `is_competent`.
    """
    return pd.DataFrame([
        _cell(str(name), part, level) for name, part in rows.groupby("cell", sort=True)
    ])


def _cell(name: str, rows: pd.DataFrame, level: float) -> dict[str, object]:
    right = (rows["ld"] > 0).to_numpy()
    limits = clustered_proportion(right, [*rows["group"]], level=level)
    low, high = limits.low, limits.high
    assert low is not None
    assert high is not None
    is_competent = low > CHANCE
    undecided = "undecided" if high >= CHANCE else "not competent"
    return {
        "cell": name,
        "n": len(rows),
        "n_groups": rows["group"].nunique(),
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        **_mean(rows["ld"], rows["group"], level),
        "state": "competent" if is_competent else undecided,
        "is_competent": is_competent,
    }


def recency(rows: pd.DataFrame, *, level: float = 0.95) -> dict[str, object]:
    """Logit difference of the answer mentioned last minus the other one.

    Args:
        rows: `ld`, `recency` (1: the target is mentioned last, -1: the foil, 0: neither) and
            `group` of each row.
        level: Of the interval.

    Returns:
        `n`, the rows that mention an answer; `ld` in logits, positive where the model prefers what
        it read last, `ld_low` and `ld_high`; `chosen`, the share of these rows in which it does.
        All but `n` are null where no row mentions an answer.
    """
    some = rows[rows["recency"] != 0]
    if some.empty:
        return {"n": 0, "chosen": None, "ld": None, "ld_low": None, "ld_high": None}
    towards = some["ld"] * some["recency"]
    return {
        "n": len(some),
        "chosen": float((towards > 0).mean()),
        **_mean(towards, some["group"], level),
    }


def _mean(values: pd.Series, groups: pd.Series, level: float) -> dict[str, object]:
    """A mean over rows with the cluster bootstrap's interval."""
    by_group = values.groupby(groups.to_numpy()).agg(["sum", "count"])
    found: dict[str, object] = {"ld": float(values.mean()), "ld_low": None, "ld_high": None}
    if len(by_group) >= FEWEST and values.nunique() > 1:
        sums, counts = (by_group[name].to_numpy(float) for name in ("sum", "count"))
        limits = RatioBootstrap(sums, counts).interval(level)
        found |= {"ld_low": limits.low, "ld_high": limits.high}
    return found
