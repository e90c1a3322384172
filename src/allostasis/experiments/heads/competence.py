"""Which cells of a corpus a model is competent in, seen on prompts that nothing is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from allostasis.analysis import statistics as st
from allostasis.engines.suffix import sweep
from allostasis.experiments.heads import tables
from allostasis.experiments.heads.asked import Asked, Corpus
from allostasis.experiments.heads.tables import Readings
from allostasis.models.blocks import Decoder

CHANCE = 0.5


@dataclass(frozen=True)
class Competence:
    """What the untouched model can do.

    Attributes:
        baseline: One row an example: those that are measured, and the val split.
        cells: One row a cell of the val split: accuracy with its interval, whether it is competent.
    """

    baseline: pd.DataFrame
    cells: pd.DataFrame

    def rows(self, readings: Readings, at: np.ndarray) -> np.ndarray:
        """Those of some examples that are of a competent cell."""
        competent = set(self.cells.loc[self.cells["is_competent"], "cell"])
        return np.array(
            [index for index in at if readings.asked.examples[index].cell in competent], dtype=int
        )

    def metric_rows(self) -> Iterator[dict[str, Any]]:
        """How the model does where it could go by which answer was mentioned last."""
        for split, rows in self.baseline.groupby("split"):
            told = rows[rows["recency"] != 0]
            if len(told):
                yield {
                    "metric": "logit_diff.recent", "symbol": "Psi", "unit": "logit",
                    "split": split, "n": len(told), "n_unique": told["row_id"].nunique(),
                    "value": float((told["ld"] * told["recency"]).mean()),
                }  # fmt: skip


def of(decoder: Decoder, corpus: Corpus, readings: Readings) -> Competence:
    """Run the untouched model on the val split, and look at every cell.

    A cell is competent whose accuracy has a lower limit above 1/2, exactly and at 95 %.
    """
    val = Asked(corpus, corpus.of("val"), seed=0)
    swept = sweep(decoder, val.rows, [])
    seen = tables.baseline(tables.readings(val, [], swept, with_span=False))
    cells = []
    for cell, rows in seen.groupby("cell"):
        right, n = int(rows["correct"].sum()), len(rows)
        limits = st.clopper_pearson(right, n)
        assert limits.low is not None
        cells.append({
            "cell": cell, "n": n, "accuracy": right / n, "ci_low": limits.low,
            "ci_high": limits.high, "logit_diff": rows["ld"].mean(),
            "is_competent": limits.low > CHANCE,
        })  # fmt: skip
    whole = pd.concat([tables.baseline(readings), seen], ignore_index=True)
    return Competence(whole, pd.DataFrame(cells))
