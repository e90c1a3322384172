"""Fixtures that several test files need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# what a draw costs on a busy machine says nothing about the property
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

Writer = Callable[..., Path]


@pytest.fixture(scope="session")
def write_run() -> Writer:
    """A function that writes one run that looks like grokking into `root / "grokking"`.

    Its curves are closed forms of the seed: training accuracy rises at step 700; where the run
    groks, test accuracy rises at 9,000 + 250 * (seed - 3.5), the logit scale peaks before and falls
    through it, alignment rises.
    """
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    from allostasis.analysis import claim_files
    from allostasis.core.records import METRICS_SCHEMA, TIMES_SCHEMA, write_json, write_table
    from allostasis.experiments import grokking

    registered = claim_files.freeze(claim_files.load(Path(grokking.__path__[0]), "grokking"))

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(x, -500, 500)))

    def write(
        root: Path,
        condition: str = "high_wd",
        seed: int = 0,
        *,
        groks: bool | None = None,
        config: dict[str, Any] | None = None,
        every: int = 100,
        **run_json: Any,
    ) -> Path:
        groks = condition == "high_wd" if groks is None else groks
        rng = np.random.default_rng([seed, groks])
        last, middle = 20_000, 9_000 + 250 * (seed - 3.5)
        steps = np.arange(0, last + 1, every)
        dense = np.arange(middle - 800, middle + 800, every / 2).astype(int) // 10 * 10
        steps = np.unique(np.concatenate([steps, dense])) if groks else steps
        rise = sigmoid((steps - middle) / 300) * groks
        memory = sigmoid((steps - 700) / 60)
        wobble = 0.03 * rng.normal(size=len(steps)).cumsum() / np.sqrt(len(steps))
        digest = run_json.get("config_hash", "abc")
        identity = {
            "run_id": f"grokking-{condition}-{seed}-auto-{digest}",
            "exp": "grokking", "condition": condition, "seed": seed, "device": "auto",
        }  # fmt: skip
        tables: list[pd.DataFrame] = []

        def add(metric: str, values: np.ndarray, unit: str, split: str | None = None,
                at: np.ndarray = steps, **index: int) -> None:  # fmt: skip
            columns = {
                **identity, "step": at, "split": split, "metric": metric, "symbol": "A",
                "unit": unit, "layer": None, "head": None, "position": None, "value": values,
                "n": 1, **index,
            }  # fmt: skip
            tables.append(pd.DataFrame(columns).astype(object))

        log_scale = 2 + 1.5 * memory + 0.3 * sigmoid((steps - middle / 2) / 900) - 0.9 * rise
        log_scale += wobble
        log_alignment = -2.2 + 0.4 * memory + 0.9 * rise - wobble / 2
        test_loss = 4.7 + 12 * memory * (1 - rise) - 4.69 * rise
        add("accuracy", memory, "1", "train")
        add("accuracy", 0.01 + 0.985 * rise, "1", "test")
        add("cross_entropy", 4.7 * (1 - memory) + 1e-7, "nat", "train")
        add("cross_entropy", test_loss, "nat", "test")
        for split in ("train", "test"):
            add("logit_scale", np.exp(log_scale), "logit", split)
            add("log_margin.scale", log_scale, "nat", split)
            add("log_margin.alignment", log_alignment, "nat", split)
            add("log_margin", log_scale + log_alignment, "nat", split)
        decay = np.exp(-steps / 4_000) if condition == "high_wd" else np.ones(len(steps))
        add("amplitude_param.published", 12 + 3 * memory - 5 * rise + 2 * decay + wobble, "param")
        for head in range(4):
            trained = 0.2 + head * 0.15 * rise
            add("amplitude_param", 4 * decay + trained, "1", layer=0, head=head)
            add("qk_norm", 2 * decay + trained, "logit/resid^2", layer=0, head=head)
        for k in range(1, 57):
            gain = 3 * rise if k in {14, 35, 41, 52} else -0.9 * rise
            add("fourier_power", 1.1 + 0.05 * np.sin(k) + gain, "param", position=k)
        few = slice(None, None, 4)
        restricted = 4.7 - 4.6 * groks * sigmoid((steps - middle + 2_000) / 900)
        add("restricted_loss", restricted[few], "nat", "all", at=steps[few])
        null = 4.9 + 0.1 * rng.random(len(steps[few]))
        add("restricted_loss.null_mean", null, "nat", "all", at=steps[few])
        excluded = 4.7 * (1 - memory) + 3 * rise + 1e-3
        add("excluded_loss", excluded[few], "nat", "all", at=steps[few])

        def first(holds: np.ndarray) -> int | None:
            return int(steps[holds.argmax()]) if holds.any() else None

        t_grok = first(0.01 + 0.985 * rise >= 0.95)
        summary = {
            "steps": last, "grokked": t_grok is not None, "t_mem": first(memory >= 0.99),
            "t_clean": int(steps[steps < middle][-1]) if groks else None, "t_grok": t_grok,
            "t_loss": first(test_loss < 0.1), "censored_at": None if t_grok else last,
        }  # fmt: skip
        run = {
            "schema_version": 1, **identity, "device_resolved": "cpu", "device_name": "test",
            "status": "done", "started": "2026-01-01T00:00:00+00:00",
            "finished": "2026-01-01T00:10:00+00:00", "wall_s": 600.0, "commit": None,
            "dirty": None, "versions": {"python": "3.11"}, "config_hash": "abc",
            "claims": registered["hashes"], "claims_hash": registered["hash"],
            "checkpoints": {str(last): f"sha256:{condition}-{seed}"},
            "metrics": {
                "accuracy": {"symbol": "Psi", "unit": "1", "source": "CS", "functional": True,
                             "direction": "up is better"},
            },
            "skipped": {}, "summary": summary, "error": None,
        } | run_json  # fmt: skip
        settings = {
            "name": "grokking", "condition": condition, "seed": seed,
            "task": {"p": 113, "train_frac": 0.3}, "model": {"d_model": 128},
            "module": {
                "_target_": "allostasis.experiments.grokking.module.Grokking", "lr": 1e-3,
                "weight_decay": {"high_wd": 1.0, "no_wd": 0.0}.get(condition, 0.5),
                "max_steps": 50_000, "optimiser": "adamw",
            },
        }  # fmt: skip
        for name, value in (config or {}).items():
            block, _, key = name.partition(".")
            settings[block][key] = value
        folder = root / "grokking" / condition / f"seed={seed}" / f"auto-{digest}"
        rows = pd.concat(tables, ignore_index=True)
        table = pa.Table.from_pandas(rows, schema=METRICS_SCHEMA, preserve_index=False)
        write_table(folder / "metrics.parquet", table, METRICS_SCHEMA)
        write_table(folder / "times.parquet", [], TIMES_SCHEMA)
        write_json(folder / "config.yaml", settings)  # JSON is YAML
        write_json(folder / "audit.json", {"metadata": {"seed": seed}})
        write_json(folder / "run.json", run)
        return folder

    return write


@pytest.fixture(scope="session")
def study(write_run: Writer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seeds of both conditions and a failed run, to be read, never written to."""
    root = tmp_path_factory.mktemp("study")
    for seed in range(8):
        write_run(root, "high_wd", seed)
        write_run(root, "no_wd", seed)
    error = {
        "type": "RuntimeError",
        "message": "<script>alert(1)</script> | & boom",
        "traceback": "",
    }
    write_run(root, "high_wd", 8, status="failed", error=error, summary=None)
    return root
