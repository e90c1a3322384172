"""audit.json: a run's records in the source documents' log format; nothing reads it back."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pandas as pd

LETTERS = {"constraint": "a", "ioi": "b", "grokking": "c", "superposition": "d"}

# key: (metric, split, one key a layer as well)
KEYS: dict[str, tuple[str, str | None, bool]] = {
    "psi_accuracy": ("accuracy", "test", False),
    "psi_logit_diff": ("logit_diff.clean", "evaluation", False),
    "A_learned": ("amplitude_learned.published", None, False),
    "A_activation": ("amplitude_activation.published", "probe", True),
    "A_param": ("amplitude_param.published", None, False),
    "A_logit_scale": ("logit_scale", "test", False),
    "A_prenorm": ("amplitude_activation", "probe", True),
    "A_ov": ("amplitude_param", None, False),
    "sigma_sq": ("residual_variance.published", "probe", True),
    "sigma_between": ("residual_variance.between", "probe", True),
    "sigma_within": ("residual_variance.within", "probe", True),
    "G": ("routing_stability.published", "probe", False),
    "G_entropy": ("attention_entropy.nats", "probe", False),
    "G_drift": ("routing_drift", "probe", False),
    "G_alignment": ("alignment", "test", False),
}


def name_of(run: Mapping[str, Any]) -> str:
    """The documents' name of an experiment's arm, for example `exp_c_high_wd`."""
    return f"exp_{LETTERS.get(run['exp'], run['exp'])}_{run['condition']}"


def file_name(run: Mapping[str, Any]) -> str:
    """The documents' file name, for example `audit_log_exp_c_high_wd_seed_42.json`."""
    return f"audit_log_{name_of(run)}_seed_{run['seed']}.json"


def view(run: Mapping[str, Any], metrics: pd.DataFrame, times: pd.DataFrame) -> dict[str, Any]:
    """Build the log from a run's tables.

    A key's value at a step is the mean over layers and heads of its metric; a key with layers also
    has one entry a layer, such as `A_activation_L0`. A metric that has no row at a step has no key.

    Args:
        run: Content of run.json.
        metrics: metrics.parquet.
        times: times.parquet.

    Returns:
        `metadata`, `metrics`, `checkpoints` and `summary`, as the documents show them.
    """
    stamps = {
        int(step): datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")
        for step, time in zip(times["step"], times["time"], strict=True)
    }
    rows: dict[int, dict[str, Any]] = {
        step: {"step": step, "timestamp": stamp} for step, stamp in sorted(stamps.items())
    }
    for key, (metric, split, has_layers) in KEYS.items():
        here = metrics["split"].isna() if split is None else metrics["split"] == split
        table = metrics[here & (metrics["metric"] == metric)]
        for mean in table.groupby("step", as_index=False)["value"].mean().itertuples():
            rows[mean.step][key] = float(mean.value)
        if has_layers:
            by_layer = table.groupby(["step", "layer"], as_index=False)["value"].mean()
            for mean in by_layer.itertuples():
                rows[mean.step][f"{key}_L{mean.layer}"] = float(mean.value)
    return {
        "metadata": {
            "experiment": name_of(run),
            "seed": run["seed"],
            "start_time": run["started"],
            "git_commit": run["commit"],
        },
        "metrics": list(rows.values()),
        "checkpoints": dict(run.get("checkpoints", {})),
        "summary": {
            "total_steps": max(rows, default=0),
            "duration_seconds": run["wall_s"],
            **run.get("summary", {}),
        },
    }
