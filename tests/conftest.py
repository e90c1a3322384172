"""Fixtures that several test files need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Writer = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> Writer:
    """A function that writes one run that looks like grokking under `tmp_path / "outputs"`.

    Its curves are closed forms of the seed: training accuracy rises at step 1,000; where the run
    groks, test accuracy rises at 9,000 + 250 * (seed - 3.5), the logit scale peaks before and falls
    through it, alignment rises.
    """
    import numpy as np

    from allostasis.analysis import claims
    from allostasis.core.records import METRICS_SCHEMA, TIMES_SCHEMA, write_json, write_table
    from allostasis.experiments import grokking

    registered = claims.freeze(claims.load(Path(grokking.__path__[0]), "grokking"))

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-np.clip(x, -500, 500)))

    def write(
        condition: str = "high_wd",
        seed: int = 0,
        *,
        groks: bool | None = None,
        status: str = "done",
        max_steps: int = 20_000,
        every: int = 100,
        **changes: Any,
    ) -> Path:
        groks = condition == "high_wd" if groks is None else groks
        rng = np.random.default_rng([seed, groks])
        middle = 9_000 + 250 * (seed - 3.5)
        steps = np.arange(0, max_steps + 1, every)
        dense = np.arange(middle - 800, middle + 800, every // 2).astype(int) // 10 * 10
        steps = np.unique(np.concatenate([steps, dense])) if groks else steps
        rise = sigmoid((steps - middle) / 300) if groks else np.zeros(len(steps))
        memory = sigmoid((steps - 700) / 60)
        wobble = 0.01 * np.cumsum(rng.normal(size=len(steps))) / np.sqrt(len(steps))
        run_id = f"grokking-{condition}-{seed}-auto-{changes.get('config_hash', 'abc')}"
        columns = {
            "run_id": run_id, "exp": "grokking", "condition": condition, "seed": seed,
            "device": "auto",
        }  # fmt: skip
        rows: list[dict[str, Any]] = []

        def add(metric: str, values: np.ndarray, unit: str, split: str | None = None,
                at: np.ndarray = steps, **index: int) -> None:  # fmt: skip
            rows.extend(
                {**columns, "step": int(step), "split": split, "metric": metric, "symbol": "A",
                 "unit": unit, "layer": None, "head": None, "position": None,
                 "value": float(value), "n": 1, **index}
                for step, value in zip(at, values, strict=True)
            )  # fmt: skip

        log_scale = 2 + 1.5 * memory - (0.9 if groks else 0.0) * rise + 0.02 * steps / max_steps
        log_scale = log_scale + wobble + 0.3 * sigmoid((steps - middle / 2) / 900)
        log_alignment = -2.2 + 0.4 * memory + 0.9 * rise - wobble / 2
        add("accuracy", memory, "1", "train")
        add("accuracy", 0.01 + 0.985 * rise, "1", "test")
        add("cross_entropy", 4.7 * (1 - memory) + 1e-7, "nat", "train")
        add("cross_entropy", 4.7 + 12 * memory * (1 - rise) - 4.69 * rise, "nat", "test")
        for split in ("train", "test"):
            add("logit_scale", np.exp(log_scale), "logit", split)
            add("log_margin.scale", log_scale, "nat", split)
            add("log_margin.alignment", log_alignment, "nat", split)
            add("log_margin", log_scale + log_alignment, "nat", split)
        decay = np.exp(-steps / 4_000) if condition == "high_wd" else np.ones(len(steps))
        grown = 12 + 3 * memory - 5 * rise
        add("amplitude_param.published", grown + 2 * decay + wobble, "param")
        add("weight_norm.ov", 1.6 * grown + 3 * decay, "param")
        for head in range(4):
            trained = 0.2 + head * 0.15 * rise
            add("amplitude_param", 4 * decay + trained, "1", layer=0, head=head)
            add("qk_norm", 2 * decay + trained, "logit/resid^2", layer=0, head=head)
        for k in range(1, 57):
            key = k in {14, 35, 41, 52}
            power = 1.1 + 0.05 * np.sin(k) + (3 * rise if key else -0.9 * rise)
            add("fourier_power", power, "param", position=k)
        thin = slice(None, None, 4)
        restricted = 4.7 - 4.6 * sigmoid((steps - middle + 2_000) / 900) * groks
        excluded = 4.7 * (1 - memory) + 3 * rise + 1e-3
        add("restricted_loss", restricted[thin], "nat", "all", at=steps[thin])
        null = 4.9 + 0.1 * rng.random(len(steps[thin]))
        add("restricted_loss.null_mean", null, "nat", "all", at=steps[thin])
        add("excluded_loss", excluded[thin], "nat", "all", at=steps[thin])

        def first(holds: np.ndarray) -> int | None:
            return int(steps[holds.argmax()]) if holds.any() else None

        test = 0.01 + 0.985 * rise
        t_grok = first(test >= 0.95)
        summary = {
            "steps": max_steps, "grokked": t_grok is not None, "t_mem": first(memory >= 0.99),
            "t_clean": None if t_grok is None else int(steps[steps < middle][-1]),
            "t_grok": t_grok, "t_loss": first(4.7 + 12 * (1 - rise) - 4.69 * rise < 0.1),
            "censored_at": max_steps if t_grok is None else None,
        }  # fmt: skip
        decay_rate = {"high_wd": 1.0, "no_wd": 0.0}.get(condition, 0.5)
        config = changes.pop("config", {})
        module = {
            "_target_": "allostasis.experiments.grokking.module.Grokking", "lr": 1e-3,
            "weight_decay": decay_rate, "max_steps": 50_000, "optimiser": "adamw",
        }  # fmt: skip
        run = {
            "schema_version": 1, **columns, "run_id": run_id, "device_resolved": "cpu",
            "device_name": "test", "status": status, "started": "2026-01-01T00:00:00+00:00",
            "finished": "2026-01-01T00:10:00+00:00", "wall_s": 600.0, "commit": None,
            "dirty": None, "versions": {"python": "3.11"}, "config_hash": "abc",
            "claims": registered["hashes"], "claims_hash": registered["hash"],
            "checkpoints": {str(max_steps): f"sha256:{condition}-{seed}"},
            "metrics": {"accuracy": {"symbol": "Psi", "unit": "1", "source": "plain",
                                     "functional": True, "direction": "up is better"}},
            "skipped": {}, "summary": summary, "error": None,
        }  # fmt: skip
        run |= changes
        folder = (
            tmp_path
            / "outputs/grokking"
            / condition
            / f"seed={seed}"
            / f"auto-{run['config_hash']}"
        )
        write_json(folder / "run.json", run)
        full = {
            "name": "grokking", "condition": condition, "seed": seed,
            "task": {"p": 113, "train_frac": 0.3}, "model": {"d_model": 128}, "module": module,
        }  # fmt: skip
        for name, value in config.items():
            block, _, key = name.partition(".")
            full[block][key] = value
        # JSON is YAML
        write_json(folder / "config.yaml", full)
        write_json(folder / "audit.json", {"metadata": {"seed": seed}})
        write_table(folder / "metrics.parquet", rows, METRICS_SCHEMA)
        write_table(folder / "times.parquet", [], TIMES_SCHEMA)
        return folder

    return write
