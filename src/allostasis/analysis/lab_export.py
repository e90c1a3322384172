"""A run of the head lab in the shapes that the source documents have: `--export lab`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from allostasis.analysis.cross_condition import MEASURED, over_seeds
from allostasis.core.records import RunRecord, write_json, write_table

HEADS = pa.schema([
    ("run_id", pa.string()), ("seed", pa.int64()), ("layer", pa.int64()), ("head", pa.int64()),
    ("scale", pa.float64()), ("metric", pa.string()), ("value", pa.float64()),
])  # fmt: skip
LAYERS = pa.schema([
    ("run_id", pa.string()), ("seed", pa.int64()), ("layer", pa.int64()),
    ("granularity", pa.string()), ("metric", pa.string()), ("value", pa.float64()),
])  # fmt: skip
METRICS = {
    "logit_diff": "logit_diff", "kl_divergence": "kl_div", "flip_rate": "acc_flip_rate",
    "prob_drop": "p_drop",
}  # fmt: skip
"""The four metrics of the documents, by our names; `flip_rate` is a flip rate here, not the error
rate that the documents' code computes, which is `top1_error`."""


def export(record: RunRecord, folder: Path) -> list[Path]:
    """Write head_impact, layer_impact, per_example, summary and manifest of one run.

    An interrupted run gives what it finished, as partial_summary.json in place of summary.json.

    Args:
        record: The run.
        folder: Where to; its own folder below it.

    Raises:
        ValueError: The run has no tables.
    """
    if not (record.folder / "metrics.parquet").is_file():
        raise ValueError(f"{record.folder}: the run is {record.run['status']} and has no tables")
    home = folder / str(record.run["run_id"])
    rows = record.units
    rows = rows[(rows["split"] == MEASURED) & rows["metric"].isin(METRICS)]
    rows = rows.assign(metric=rows["metric"].map(METRICS))
    kinds = pd.read_parquet(record.folder / "interventions.parquet")
    rows = rows.merge(kinds[["intervention", "site"]], on="intervention", how="left")
    heads = rows[rows["head"].notna()]
    layers = rows[rows["layer"].notna() & rows["head"].isna()].rename(
        columns={"site": "granularity"}
    )
    written = []
    for name, frame, schema in (("head_impact", heads, HEADS), ("layer_impact", layers, LAYERS)):
        table = pa.Table.from_pandas(
            frame.reindex(columns=schema.names), schema=schema, preserve_index=False
        )
        write_table(home / f"{name}.parquet", table, schema, nullable=True)
        written.append(home / f"{name}.parquet")
    examples = record.folder / "examples.parquet"
    if examples.is_file():
        table = pq.read_table(examples)
        write_table(home / "per_example.parquet", table, table.schema, nullable=True)
        written.append(home / "per_example.parquet")
    is_done = record.run["status"] == "done"
    name = "summary.json" if is_done else "partial_summary.json"
    write_json(home / name, _summary(record, rows[rows["intervention"].isna()]))
    written.append(home / name)
    manifest = {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None,
        }
        for path in written
    }
    write_json(home / "manifest.json", manifest)
    return [*written, home / "manifest.json"]


def _summary(record: RunRecord, clean: pd.DataFrame) -> dict[str, Any]:
    run = record.run
    made: dict[str, Any] = {"status": run["status"]}
    made |= {key: run[key] for key in ("completed_units", "planned_units") if key in run}
    return made | {
        str(metric): over_seeds(own["value"].to_numpy(float))
        for metric, own in clean.groupby("metric")
    }
