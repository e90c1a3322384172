"""Tables that the head lab's experiments share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from allostasis.analysis.competence import competence
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

if TYPE_CHECKING:
    from allostasis.analysis.aggregate import Arm
    from allostasis.analysis.curves import RunView

SEEDS = (
    "A seed draws which prompts are measured, donors, random controls and resamples; the model is "
    "one and the same, so that what differs between seeds is the drawing of prompts."
)


def made(makers: Sequence[Callable[[Sequence[Arm]], Table]], arms: Sequence[Arm]) -> list[Table]:
    """Tables by their makers; one that lacks its records says so."""
    found = []
    for make in makers:
        try:
            found.append(make(arms))
        except UndefinedError as error:
            title = make.__name__.replace("_", " ").capitalize()
            found.append(Table(title, ("missing",), ((str(error),),)))
    return found


def runs(arms: Sequence[Arm]) -> Iterator[tuple[str, RunView]]:
    """Every finished run, with its condition."""
    for arm in arms:
        for run in arm.runs:
            yield arm.condition, run


def competence_table(arms: Sequence[Arm]) -> Table:
    """Accuracy and logit difference of the untouched model by cell, on the val split."""
    rows = []
    for arm in arms:
        if not arm.runs:
            continue
        path = arm.runs[0].record.folder / "baseline.parquet"
        if not path.is_file():
            raise UndefinedError("baseline.parquet was not recorded")
        seen = pd.read_parquet(path)
        cells = competence(seen[seen["split"] == "val"])
        rows += [
            (
                arm.condition, str(row["cell"]), str(row["n"]),
                _with(row["accuracy"], row["accuracy_low"], row["accuracy_high"]),
                _with(row["ld"], row["ld_low"], row["ld_high"]), str(row["state"]),
            )
            for row in cells.to_dict("records")
        ]  # fmt: skip
    return Table(
        "What the untouched model can do",
        ("corpus", "cell", "n", "accuracy", "logit difference, logit", "competence"),
        tuple(rows),
        "On the val split, which nothing else is measured on; brackets: 95 %. A cell is competent "
        "whose accuracy has a lower limit above 0.5. Effects are told for all rows and, where the "
        "model is competent in a cell, for those alone (split test_competent).",
    )


def recency_table(arms: Sequence[Arm]) -> Table:
    """How far the untouched model says what it read last."""
    rows = []
    for condition, run in runs(arms):
        found = run.record.units
        for row in found[found["metric"] == "logit_diff.recent"].to_dict("records"):
            ends = row["value"], row["ci_low"], row["ci_high"]
            at = condition, str(run.seed), str(row["split"]), str(row["n"])
            rows.append((*at, _with(*ends)))
    return Table(
        "Recency",
        ("corpus", "seed", "split", "n", "logit difference, most recent answer minus the other"),
        tuple(rows),
        "Of prompts that mention an answer. Above 0 the model prefers what it read last, right or "
        "wrong.",
    )


def cost_table(arms: Sequence[Arm]) -> Table:
    """What each run cost, and whether its re-check agreed."""
    rows = []
    for condition, run in runs(arms):
        facts = {**(run.run.get("profile") or {})}
        facts |= {f"verify {k}": v for k, v in (run.run.get("verify") or {}).items()}
        rows += [(condition, str(run.seed), name, _said(value)) for name, value in facts.items()]
    if not rows:
        raise UndefinedError("run.json has neither profile nor verify")
    return Table(
        "Cost and verification",
        ("corpus", "seed", "quantity", "value"),
        tuple(rows),
        "Of the session that finished the run. A token that goes through all layers counts 1; "
        "naive is one full pass for every intervention and prompt, without deduplication. " + SEEDS,
    )


def _said(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return number(float(value))


def _with(value: Any, low: Any, high: Any) -> str:
    """A number with its interval, where it has one."""
    if pd.isna(low) or pd.isna(high):
        return f"{number(float(value))} [no interval]"
    return f"{number(float(value))} [{number(float(low))}, {number(float(high))}]"


def effect_rows(run: RunView, metric: str, split: str) -> pd.DataFrame:
    """One row an intervention: value, change with interval, and the ranks and p that it has."""
    rows = run.interventions(metric, split=split)
    rows = rows[rows["intervention"].notna()].set_index("intervention")
    rows.index = rows.index.astype(str)
    for name in ("p", "p_max", "q", "percentile_layer", "percentile_model", "null_p"):
        beside = run.interventions(f"effect.{name}", split=split).set_index("intervention")
        rows[name] = beside["value"].reindex(rows.index)
    return rows.sort_values("delta", ascending=False)


def effect(row: Mapping[Any, Any]) -> str:
    """A change with its interval."""
    return _with(row["delta"], row["ci_low"], row["ci_high"])


def optional(value: float, digits: str = ".3g") -> str:
    """A number that may be missing."""
    return "" if not np.isfinite(value) else f"{value:{digits}}"
