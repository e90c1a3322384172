"""The tidy tables of a run: their schema, writer and reader; audit.json as a view of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

METRICS_SCHEMA = pa.schema([
    ("run_id", pa.string()),
    ("exp", pa.string()),
    ("condition", pa.string()),
    ("seed", pa.int64()),
    ("device", pa.string()),
    ("step", pa.int64()),
    ("split", pa.string()),
    ("metric", pa.string()),
    ("symbol", pa.string()),
    ("unit", pa.string()),
    ("layer", pa.int64()),
    ("head", pa.int64()),
    ("position", pa.int64()),
    ("value", pa.float64()),
    ("n", pa.int64()),
])
UNITS_SCHEMA = pa.schema([
    *METRICS_SCHEMA,
    ("intervention", pa.string()),
    ("scale", pa.float64()),
    ("n_unique", pa.int64()),
    ("value_clean", pa.float64()),
    ("delta", pa.float64()),
    ("ci_low", pa.float64()),
    ("ci_high", pa.float64()),
])
"""metrics.parquet of an experiment that intervenes: which intervention a row is of."""
EXAMPLES_SCHEMA = METRICS_SCHEMA.append(pa.field("example", pa.int64()))
TIMES_SCHEMA = pa.schema([("run_id", pa.string()), ("step", pa.int64()), ("time", pa.float64())])

NULLABLE = {"split", "layer", "head", "position"}


def write_atomically(path: Path, write: Callable[[Path], Any], *, is_durable: bool = True) -> None:
    """Write a file under a temporary name in its own folder, then rename it into place.

    Args:
        path: Where the file shall be. Its folder is made if it is missing.
        write: Called with the temporary path.
        is_durable: Whether to wait until the disk has it. Without, a file survives a kill of the
            process but not a loss of power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        if is_durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: two-space indent, keys in the order given, no NaN."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_table(
    path: Path,
    rows: list[dict[str, Any]] | pa.Table,
    schema: pa.Schema,
    *,
    nullable: bool = False,
) -> None:
    """Write rows as Parquet atomically.

    Args:
        path: Where.
        rows: What.
        schema: Its columns.
        nullable: Whether any number may be missing; else only those in `NULLABLE`.

    Raises:
        ValueError: A value is NaN or infinite, or a column that may not be empty is.
    """
    table = pa.Table.from_pylist(rows, schema=schema) if isinstance(rows, list) else rows
    for field in schema:
        column = table.column(field.name)
        if not nullable and field.name not in NULLABLE and column.null_count:
            raise ValueError(
                f"{path.name}: column '{field.name}' has {column.null_count} empty rows"
            )
        if pa.types.is_floating(field.type):
            values = column.fill_null(0.0).to_numpy()  # what may be missing was looked at above
            bad = table.filter(pa.array(~np.isfinite(values)))
            if len(bad):
                raise ValueError(
                    f"{path.name}: a value is not finite: {bad.to_pylist()[0]}. "
                    "A quantity that is undefined has no row; see run.json's `skipped`."
                )
    write_atomically(path, lambda file: pq.write_table(table, file, compression="zstd"))


def concatenate(paths: Iterable[Path], schema: pa.Schema) -> pa.Table:
    """Read Parquet files of one schema, in the order given, as one table."""
    tables = [pq.read_table(path, schema=schema) for path in paths]
    return pa.concat_tables(tables) if tables else schema.empty_table()


@dataclass(frozen=True)
class RunRecord:
    """One run as it lies on disk.

    Attributes:
        folder: The run's folder.
        run: Content of run.json.
    """

    folder: Path
    run: dict[str, Any]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config that the run was started with."""
        from omegaconf import OmegaConf

        content = OmegaConf.to_container(OmegaConf.load(self.folder / "config.yaml"))
        if not isinstance(content, dict):
            raise ValueError(f"{self.folder / 'config.yaml'} does not hold a mapping")
        return {str(key): value for key, value in content.items()}

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """metrics.parquet: one row a reading, index columns as nullable integers."""
        return _frame(self.folder / "metrics.parquet", METRICS_SCHEMA)

    @cached_property
    def units(self) -> pd.DataFrame:
        """metrics.parquet of an experiment that intervenes, with what each row is of."""
        return _frame(self.folder / "metrics.parquet", UNITS_SCHEMA)

    @cached_property
    def times(self) -> pd.DataFrame:
        """times.parquet: when each recorded step was reached, in Unix seconds."""
        return _frame(self.folder / "times.parquet", TIMES_SCHEMA)

    @cached_property
    def examples(self) -> pd.DataFrame | None:
        """examples.parquet, or None where the run recorded no single examples."""
        path = self.folder / "examples.parquet"
        return _frame(path, EXAMPLES_SCHEMA) if path.is_file() else None


def _frame(path: Path, schema: pa.Schema) -> pd.DataFrame:
    nullable = {pa.int64(): pd.Int64Dtype()}
    return pq.read_table(path, schema=schema).to_pandas(types_mapper=nullable.get)


def read_run(folder: Path) -> RunRecord:
    """Read one run's folder.

    Raises:
        FileNotFoundError: The folder holds no run.json.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no run.json, so it is not a run. "
            "A run's folder is outputs/<exp>/<condition>/seed=<n>/<device>-<hash>/."
        )
    return RunRecord(folder=folder, run=json.loads(path.read_text(encoding="utf-8")))


def read_runs(root: Path) -> list[RunRecord]:
    """Read every run below a folder, in the order of condition and seed."""
    runs = [read_run(path.parent) for path in root.rglob("run.json")]
    return sorted(runs, key=lambda r: (r.run["exp"], r.run["condition"], r.run["seed"], r.folder))
