"""Rows on their way to the records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from allostasis.analysis.intervals import Interval


@dataclass
class Collected:
    """Gathers readings and single sequences of one run.

    Attributes:
        step: Updates that the model has had, the `step` of all readings that follow.
        readings: Rows of metrics.parquet.
        examples: Pieces of examples.parquet.
    """

    step: int = 0
    readings: list[dict[str, Any]] = field(default_factory=list)
    examples: list[pd.DataFrame] = field(default_factory=list)

    def read(
        self,
        metric: str,
        value: float,
        *,
        n: int,
        symbol: str,
        unit: str,
        interval: Interval | None = None,
        **columns: Any,
    ) -> None:
        """Add one row of metrics.parquet."""
        if interval is not None:
            columns |= {"ci_low": interval.low, "ci_high": interval.high}
        self.readings.append({
            "step": self.step, "metric": metric, "symbol": symbol, "unit": unit,
            "value": float(value), "n": n, **columns,
        })  # fmt: skip

    def add(self, columns: Mapping[str, Any]) -> None:
        """Add rows of examples.parquet, one for each entry of the longest column."""
        self.examples.append(pd.DataFrame(dict(columns)))

    def tables(self) -> dict[str, pd.DataFrame]:
        """By file name without its ending; what a row does not have is empty."""
        examples = pd.concat(self.examples, ignore_index=True)
        whole = {name: "Int64" for name in ("layer", "head", "plant") if name in examples}
        made = {"metrics": pd.DataFrame(self.readings), "examples": examples.astype(whole)}
        return {name: frame.replace([np.inf, -np.inf], np.nan) for name, frame in made.items()}
