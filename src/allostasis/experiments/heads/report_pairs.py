"""What the report of `heads_pairs` shows: lattices, interactions, what one head brings back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from allostasis.analysis import lab_tables
from allostasis.analysis.ablations import estimate
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import BLUE, GREY, RED, Figure, style
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.prompts import recovery
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

SHOWN = 8
KINDS = {1: "heads", 2: "pairs", 3: "triples"}


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """All sets of every size, with the named one marked."""
    return [
        Figure(
            "lattice",
            "All sets of heads by size",
            "Change of the logit difference on test, first seed of each corpus; one point a set. "
            "Marked: the set that was named by the source or chosen on train, and its parts. The "
            "null of a set is all sets of its own size, never sums of single heads.",
            partial(_draw, arms),
        )
    ]


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Named sets with their exact ranks, interactions, recoveries."""
    return lab_tables.made([named_table, interactions_table, recovery_table], arms)


def _draw(arms: Sequence[Arm]) -> Any:
    found = [arm for arm in arms if arm.runs]
    with style() as plt:
        figure, axes = plt.subplots(
            1, len(found), figsize=(2.6 * len(found) + 1.2, 3.6), squeeze=False, sharey=True
        )
        for axis, arm in zip(axes[0], found, strict=True):
            rows = _sets(arm.runs[0])
            for size in sorted(set(rows["size"])):
                own = rows[rows["size"] == size]
                values = own["delta"].to_numpy(float)
                spread = 0.3 * np.sin(np.arange(len(values)) * 2.4)  # beside each other, not random
                axis.scatter(size + spread, values, s=7, color=GREY, alpha=0.6, lw=0)
                marked = own["set"].isin(["named", "named pair"]).to_numpy()
                colour = RED if (own["set"] == "named").any() else BLUE
                axis.scatter(np.full(marked.sum(), size), values[marked], s=34, color=colour)
            sizes = sorted(set(rows["size"]))
            axis.axhline(0, color=GREY, lw=0.8)
            axis.set_xticks(sizes, [KINDS.get(size, f"{size} heads") for size in sizes])
            axis.set_title(arm.condition)
        axes[0, 0].set_ylabel("change of the logit difference (logit)")
    return figure


def _sets(run: Any) -> pd.DataFrame:
    kinds = pd.read_parquet(run.record.folder / "interventions.parquet")
    rows = lab_tables.effect_rows(run, "logit_diff", "test")
    beside = kinds.set_index("intervention")[["set", "size", "members"]]
    found = rows.join(beside)
    if found.empty:
        raise UndefinedError("no set was measured")
    return found


def named_table(arms: Sequence[Arm]) -> Table:
    """The named set and its parts among all sets of their size."""
    rows = []
    for condition, run in lab_tables.runs(arms):
        found = _sets(run)
        named = found[found["set"].isin(["named", "named pair"])]
        named = named.sort_values("size", ascending=False)  # a set of two is its own pair
        if named.empty:
            continue
        whole = set(str(named["members"].iloc[0]).split("+"))
        parts = found[[set(str(m).split("+")) <= whole for m in found["members"]]]
        rows += [
            (condition, str(run.seed), str(key), lab_tables.effect(row),
             lab_tables.optional(row["null_p"]))
            for key, row in parts.sort_values("size").to_dict("index").items()
        ]  # fmt: skip
    if not rows:
        raise UndefinedError("no set was named, by the source or by what its heads do on train")
    return Table(
        "The named set and its parts",
        ("corpus", "seed", "intervention", "change of the logit difference", "exact p"),
        tuple(rows),
        "On test. Exact p: the share of all sets of the same size in the layer that do at least as "
        "much, ties half; the set itself is one of them.",
    )


def interactions_table(arms: Sequence[Arm]) -> Table:
    """Largest interactions on test."""
    rows = []
    for condition, run in lab_tables.runs(arms):
        found = run.interventions("interaction", split="test").set_index("intervention")
        ratio = run.interventions("super_additivity", split="test").set_index("intervention")
        order = found["value"].abs().sort_values(ascending=False, kind="stable").index[:SHOWN]
        for key in order:
            row = found.loc[key]
            ends = "no interval"
            if np.isfinite(row["ci_low"]):
                ends = f"[{number(row['ci_low'])}, {number(row['ci_high'])}]"
            more = ""
            if key in ratio.index:
                there = ratio.loc[key]
                more = f"{number(there['value'])} [{number(there['ci_low'])}, "
                more += f"{number(there['ci_high'])}]"
            rows.append((
                condition,
                str(run.seed),
                str(key),
                f"{number(row['value'])} {ends}",
                more,
            ))
    return Table(
        "Largest interactions",
        ("corpus", "seed", "intervention", "interaction I, logit", "set over sum of its heads"),
        tuple(rows),
        "On test. I(ab) = v(ab) - v(a) - v(b), of triples the Moebius inverse; above 0 the heads "
        "do more together than one by one. The ratio stands only where its denominator is more "
        "than two standard errors from 0. The largest of many: their intervals are not corrected.",
    )


def recovery_table(arms: Sequence[Arm]) -> Table:
    """What putting one head of the named set back undoes."""
    rows = []
    for condition, run in lab_tables.runs(arms):
        examples = run.prompts("examples")
        restored = examples[(examples["set"] == "restored") & (examples["split"] == "test")]
        for key, own in restored.groupby("intervention", observed=True):
            rows.append((condition, str(run.seed), str(key), estimate(own, recovery(own)).text))
    if not rows:
        raise UndefinedError("no set of one layer was named")
    return Table(
        "One head put back",
        ("corpus", "seed", "what", "recovery"),
        tuple(rows),
        "Zero a set, restore one head: within a layer that is, by algebra, the set less that head, "
        "so it is read from the lattice and not run again. recovery = (v(S - a) - v(S)) / (0 - "
        "v(S)), a ratio of sums. It is a difference of two sets, not mediation through another "
        "layer.",
    )
