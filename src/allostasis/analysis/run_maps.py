"""Maps of one run, of single heads and of layers over time, for a tracker's picture browser."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from allostasis.analysis.heatmap import HeadMap
from allostasis.core.records import RunRecord


def head_maps(record: RunRecord, names: Iterable[str]) -> dict[str, HeadMap]:
    """Those of some quantities that the run has by layer and head, at their last step.

    Where a row is of an intervention on its head, the map shows what that changes: the row's
    `delta`, of an ablation to 0 where several scales were tried.

    Args:
        record: The run.
        names: `<split>/<metric>`, or the metric alone where its rows have no split.
    """
    is_units = "intervention" in pq.read_schema(record.folder / "metrics.parquet").names
    rows = record.units if is_units else record.metrics
    rows = rows[rows["layer"].notna() & rows["head"].notna() & rows["position"].isna()]
    found: dict[str, HeadMap] = {}
    for name in names:
        split, _, metric = name.rpartition("/")
        is_split = rows["split"] == split if split else rows["split"].isna()
        own = rows[is_split & (rows["metric"] == metric)]
        own = own[own["step"] == own["step"].max()]
        what = f"{name}, step {own['step'].max()}"
        if is_units and own["intervention"].notna().any():
            own = own[own["intervention"].notna() & ~(own["scale"] > 0)]
            own = own.drop(columns=["value", "ci_low", "ci_high"]).rename(
                columns={"delta": "value"}
            )
            what = f"change of {name}"
        if len(own) and not own.duplicated(["layer", "head"]).any():
            found[name] = _map(own, what)
    return found


def _map(rows: pd.DataFrame, title: str) -> HeadMap:
    layers, heads = rows["layer"].to_numpy(int), rows["head"].to_numpy(int)
    values = np.full((layers.max() + 1, heads.max() + 1), np.nan)
    values[layers, heads] = rows["value"]
    none = np.full_like(values, np.nan)
    return HeadMap(title=title, unit=rows["unit"].iloc[0], values=values, low=none, high=none)
