"""Writes what an experiment that trains nothing gives: whole tables, after its test step."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.callbacks import Callback

from allostasis.callbacks.panels import flat_units
from allostasis.callbacks.recorder import Identity
from allostasis.core.records import (
    METRICS_SCHEMA,
    TIMES_SCHEMA,
    UNITS_SCHEMA,
    write_json,
    write_table,
)

STEP = 0
"""The `step` of a row that names none: nothing is trained."""


class Tables(Callback):
    """Writes `outputs["tables"]` of a test step, data frames by file name, and its "documents".

    `metrics` gets the columns of metrics.parquet and those that say which intervention a row is of,
    and its own `step` where an experiment trains a model on its way; every other table keeps its
    own, in single precision. What an experiment needs to go on after an interruption it keeps below
    `workspace`, which is set before the test and removed when the run is done.

    Args:
        folder: The run's folder.
        identity: The columns that all rows share.
    """

    def __init__(self, *, folder: Path, identity: Identity) -> None:
        self.folder, self.identity = folder, identity

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Tell the module where its unfinished work lies."""
        del trainer
        pl_module.workspace = self.folder / "parts"

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: object, **__: object
    ) -> None:
        """Write the tables."""
        del pl_module
        self._write(outputs["tables"])
        for name, content in outputs.get("documents", {}).items():
            write_json(self.folder / f"{name}.json", content)
        if trainer.loggers:
            rows = pq.read_table(self.folder / "metrics.parquet").to_pylist()
            for step in sorted({row["step"] for row in rows}):
                numbers = flat_units(row for row in rows if row["step"] == step)
                for logger in trainer.loggers:
                    logger.log_metrics(numbers, step)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write what is finished, where the module can tell; the run stays unfinished."""
        del trainer, exception
        finished = pl_module.partial() if hasattr(pl_module, "partial") else {}
        if finished:
            self._write(finished)

    def _write(self, tables: Mapping[str, pd.DataFrame]) -> None:
        steps = {STEP}
        for name, frame in tables.items():
            frame = frame.assign(**vars(self.identity))
            if name == "metrics":
                frame = frame if "step" in frame else frame.assign(step=STEP)
                steps = {*frame["step"]}
                frame = frame.reindex(columns=UNITS_SCHEMA.names)
                table = pa.Table.from_pandas(frame, schema=UNITS_SCHEMA, preserve_index=False)
            else:
                single = dict.fromkeys(frame.select_dtypes("float64"), "float32")
                frame = _leading(frame.astype(single))
                table = pa.Table.from_pandas(frame, preserve_index=False)
            write_table(self.folder / f"{name}.parquet", table, table.schema, nullable=True)
        now = [
            {"run_id": self.identity.run_id, "step": int(step), "time": time.time()}
            for step in sorted(steps)
        ]
        write_table(self.folder / "times.parquet", now, TIMES_SCHEMA)


def _leading(frame: pd.DataFrame) -> pd.DataFrame:
    """The run's columns first."""
    first = [name for name in METRICS_SCHEMA.names if name in frame]
    return frame[[*first, *(name for name in frame if name not in first)]]
