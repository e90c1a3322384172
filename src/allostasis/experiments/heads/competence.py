"""Which cells of a corpus a model is competent in, seen on prompts that nothing is measured on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from allostasis.analysis.competence import competence as cells_of
from allostasis.analysis.competence import recency
from allostasis.engines.suffix import sweep
from allostasis.experiments.heads import tables
from allostasis.experiments.heads.asked import Asked
from allostasis.experiments.heads.tables import Readings
from allostasis.models.blocks import Decoder
from allostasis.tasks.probes.encoded import Encoded


@dataclass(frozen=True)
class Competence:
    """What the untouched model can do.

    Attributes:
        baseline: One row an example: those that are measured, and the val split.
        cells: One row a cell of the val split; see `analysis.competence`.
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
            told = recency(rows)
            if told["n"]:
                yield {
                    "metric": "logit_diff.recent", "symbol": "Psi", "unit": "logit",
                    "split": split, "n": told["n"], "value": told["ld"],
                    "ci_low": told["ld_low"], "ci_high": told["ld_high"],
                }  # fmt: skip


def of(decoder: Decoder, corpus: Encoded, readings: Readings) -> Competence:
    """Run the untouched model on the val split, and look at every cell."""
    val = Asked(corpus, corpus.of("val"), seed=0)
    swept = sweep(decoder, val.rows, [])
    seen = tables.baseline(tables.readings(val, [], swept, with_span=False))
    whole = pd.concat([tables.baseline(readings), seen], ignore_index=True)
    return Competence(whole, cells_of(seen))
