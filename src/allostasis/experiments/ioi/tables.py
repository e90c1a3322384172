"""The tables of an audit: one row an example and intervention, and one a depth of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from allostasis.interventions.ablate import Unit
from allostasis.tasks.ioi import Prompt


@dataclass
class Collected:
    """Gathers rows group by group; `tables` gives them in one order, whatever the groups were."""

    examples: list[pd.DataFrame] = field(default_factory=list)
    depths: list[pd.DataFrame] = field(default_factory=list)
    readings: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        prompts: Sequence[Prompt],
        name: str,
        unit: Unit | None,
        columns: Mapping[str, np.ndarray],
        depths: Sequence[Mapping[str, np.ndarray]],
    ) -> None:
        """Add an intervention's columns for one group; `unit` None is the untouched model."""
        key = "none" if unit is None else unit.key
        what = {
            "ablation": "none" if unit is None else _ablation(unit),
            "intervention": key,
            "set": name,
            "n_members": 0 if unit is None else len(unit.members),
        }
        said = pd.DataFrame([
            {
                "example": p.example, "split": p.split, "template": p.template, "order": p.order,
                "io": p.io, "s": p.s, "cluster": p.cluster,
            }
            for p in prompts
        ])  # fmt: skip
        self.examples.append(said.assign(**what, **columns))
        for row in depths:
            frame = said[["example", "cluster"]].assign(**what, **row)
            self.depths.append(frame.astype({"depth": int}).drop(columns="n_members"))

    def read(
        self,
        metric: str,
        value: float,
        *,
        n: int,
        symbol: str = "Psi",
        unit: str = "logit",
        split: str | None = "evaluation",
        **columns: Any,
    ) -> None:
        """Add one row of metrics.parquet."""
        self.readings.append({
            "metric": metric, "symbol": symbol, "unit": unit, "split": split, "step": 0,
            "value": value, "n": n, **columns,
        })  # fmt: skip

    def summarise(self) -> None:
        """Add to metrics.parquet the mean readouts and the norm ratios of each intervention."""
        table = pd.concat(self.examples)
        for key, rows in table.groupby("intervention", sort=False):
            n, unique = len(rows), rows["example"].nunique()
            for metric, column, unit in (
                ("logit_diff", "ld", "logit"),
                ("accuracy", "correct", "1"),
            ):
                now, then = float(rows[column].mean()), float(rows[f"{column}_clean"].mean())
                if key == "none":
                    self.read(f"{metric}.clean", now, n=n, unit=unit, n_unique=unique)
                else:
                    self.read(
                        metric, now, n=n, unit=unit, n_unique=unique, intervention=key,
                        value_clean=then, delta=now - then,
                    )  # fmt: skip
        if self.depths:
            by = pd.concat(self.depths).groupby(["intervention", "depth"], sort=False)
            for (key, depth), rows in by:
                for part, ratio in _ratios(rows).items():
                    name = f"compensation_ratio.{part}" if part else "compensation_ratio"
                    self.read(
                        name,
                        ratio,
                        n=len(rows),
                        symbol="A",
                        unit="1",
                        intervention=key,
                        layer=depth,
                    )

    def tables(self) -> dict[str, pd.DataFrame]:
        """By file name without its ending, sorted; what is not finite is empty."""
        made = {"metrics": pd.DataFrame(self.readings)}
        orders = {"examples": ["intervention", "example"],
                  "depths": ["intervention", "example", "depth"]}  # fmt: skip
        for name, order in orders.items():
            pieces: list[pd.DataFrame] = getattr(self, name)
            if pieces:
                made[name] = pd.concat(pieces).sort_values(order).reset_index(drop=True)
        return {name: frame.replace([np.inf, -np.inf], np.nan) for name, frame in made.items()}


def _ratios(rows: pd.DataFrame) -> dict[str, float]:
    """Norms after an ablation over those before it, as sums over prompts, beside their nulls."""
    sums = rows.filter(like="norm_").sum()
    ratios = {
        "": sums["norm_end"] / sums["norm_end_clean"],
        "published": sums["norm_all"] / sums["norm_all_clean"],
        "no_first": sums["norm_rest"] / sums["norm_rest_clean"],
        "null_exact": sums["norm_end_null"] / sums["norm_end_clean"],
        "null_published": sums["norm_all_null"] / sums["norm_all_clean"],
        "end_median": rows["norm_end"].median() / rows["norm_end_clean"].median(),
        "excess": np.log(sums["norm_end"] / sums["norm_end_null"]),
    }
    return {part: float(ratio) for part, ratio in ratios.items()}


def _ablation(unit: Unit) -> str:
    return "zero" if unit.op == "scale" and unit.scale == 0 else unit.op
