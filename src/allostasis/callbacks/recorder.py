"""Measures what the chosen metrics ask for, when it is due, and writes it to the records."""

from __future__ import annotations

import fnmatch
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor

from allostasis.callbacks.cadence import Plan
from allostasis.callbacks.panels import flat
from allostasis.core.records import (
    EXAMPLES_SCHEMA,
    METRICS_SCHEMA,
    TIMES_SCHEMA,
    concatenate,
    write_atomically,
    write_table,
)
from allostasis.metrics.base import Metric, Reading, Snapshot, discover

WEIGHT_NEEDS = {"params", "before", "grads", "modulus"}
MAX_KEPT = 200


class Observed(Protocol):
    """What a LightningModule offers so that it can be recorded."""

    model: Any
    """The model; its `hook_dict` names what can be hooked."""
    updates: int
    """Optimiser updates done: the `step` of every row."""
    is_finished: bool
    """Whether no further update is wanted."""
    offers: frozenset[str]
    """Pseudo-needs that its snapshots can meet, such as `logits` or `grid_logits`."""
    hindsight: frozenset[str]
    """Pseudo-needs that can be met only once the run is over."""

    def probe_accuracy(self, *, is_followed: bool = False) -> float:
        """Accuracy on the held-out probe: the cheap reading that drives the cadence.

        With `is_followed`, snapshots of the same weights are asked for next, whatever it says.
        """
        ...

    def snapshots(self, hooks: Sequence[str], *, full: bool) -> Iterable[Snapshot]:
        """The model as it stands, split by split; without `full` only what an evaluation needs."""
        ...

    def evaluated(self, readings: Mapping[tuple[str, str | None], float]) -> None:
        """Take note of an evaluation's readings, by metric and split."""
        ...

    def hindsight_snapshots(self, weights: Mapping[str, Tensor], step: int) -> Iterable[Snapshot]:
        """Snapshots of earlier weights, with what only the end of the run can tell."""
        ...


@dataclass(frozen=True)
class Identity:
    """The columns that every row of a run has in common."""

    run_id: str
    exp: str
    condition: str
    seed: int
    device: str


class Recorder(Callback):
    """Records metrics on a cadence; its records survive a kill and do not depend on one.

    Rows wait in memory until a resume point is saved, and are then written to `parts/`. A resumed
    run drops parts that are younger than its resume point and goes on, so that the final tables
    equal an uninterrupted run's row by row.

    Args:
        folder: The run's folder.
        identity: The columns that all rows share.
        plan: What is recorded and how often.
        eval_every: Steps between evaluations, which the module's phases need.
    """

    def __init__(self, *, folder: Path, identity: Identity, plan: Plan, eval_every: int) -> None:
        self.folder, self.identity = folder, identity
        self.plan, self.cadence, self.eval_every = plan, plan.cadence, eval_every
        self.latest: dict[tuple[str, str | None], float] = {}
        self.skipped: dict[str, Counter[str]] = {}
        self.metrics: dict[str, Metric] = {}
        self._hooks: tuple[str, ...] = ()
        self._rows: list[dict[str, Any]] = []
        self._times: list[dict[str, Any]] = []
        self._initial: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] = {}
        self._reference_step = -1
        self._kept: list[int] = []
        self._thinned: list[int] = []
        self._flushed: list[int] = []

    # ------------------------------------------------------------------ selection

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Choose the metrics whose needs the module meets; list the others once."""
        if self.metrics:
            return
        known = discover()
        for pattern in self.plan.record:
            if not fnmatch.filter(known, pattern.removeprefix("!")):
                raise ValueError(
                    f"metrics.record: no metric is called '{pattern}'; there are {', '.join(known)}"
                )
        hookable = tuple(pl_module.model.hook_dict)
        hooks: set[str] = set()
        for name, cls in known.items():
            if not self.plan.has(name):
                continue
            wanted = {need for need in cls.needs if "hook_" in need}
            offered = pl_module.offers | pl_module.hindsight
            found = {need: fnmatch.filter(hookable, _bare(need)) for need in wanted}
            missing = [n for n in cls.needs if not (found.get(n) or n in offered)]
            if missing:
                self.skipped[name] = Counter({f"the model offers no {', '.join(missing)}": 1})
                continue
            self.metrics[name] = cls().to(pl_module.device)
            hooks |= {hook for names in found.values() for hook in names}
            hooks |= {hook for also in cls.reads_also for hook in fnmatch.filter(hookable, also)}
        self._hooks = tuple(sorted(hooks))

    def _is_hindsight(self, metric: Metric, pl_module: Any) -> bool:
        return bool(pl_module.hindsight & set(metric.needs))

    # ------------------------------------------------------------------ when

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Record the model as it begins."""
        if not self._times and not self._flushed:  # nothing yet: step 0, or a model that was read
            self.cadence.is_due(pl_module.updates, pl_module.probe_accuracy())
            self._observe(trainer, pl_module, full=True)
            pl_module.evaluated(self.latest)
        if pl_module.is_finished:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object
    ) -> None:
        """Probe; record or evaluate if it is time to."""
        step = pl_module.updates
        evaluates, is_lag = step % self.eval_every == 0, step % self.plan.drift_lag == 0
        is_followed = evaluates or is_lag or self.cadence.is_dense
        probed = pl_module.probe_accuracy(is_followed=is_followed)
        due = self.cadence.is_due(step, probed) or is_lag
        if due or evaluates or pl_module.is_finished:
            full = due or pl_module.is_finished
            self._observe(trainer, pl_module, full=full)
            if evaluates:
                pl_module.evaluated(self.latest)
            if pl_module.is_finished and not full:  # the evaluation ended the run
                self._forget(step)
                self._observe(trainer, pl_module, full=True)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: object, **__: object
    ) -> None:
        """Write single examples of the metrics that offer them."""
        del trainer, pl_module
        snapshot: Snapshot = outputs["snapshot"]
        rows: list[dict[str, Any]] = []
        for name, metric in self.metrics.items():
            per_example = getattr(metric, "per_example", None)
            if per_example is None or not _applies(metric, snapshot):
                continue
            for part, values in per_example(snapshot).items():
                for example, value in enumerate(values.tolist()):
                    reading = Reading(part, value, 1, None, None, None, metric.symbol, metric.unit)
                    if math.isfinite(value):
                        row = self._row(name, snapshot, reading)
                        rows.append(row | {"example": example})
        if rows:
            write_table(self.folder / "examples.parquet", rows, EXAMPLES_SCHEMA)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Read what only the end of the run can tell, from weights kept on the way."""
        del trainer
        hindsight = {k: m for k, m in self.metrics.items() if self._is_hindsight(m, pl_module)}
        rows: list[dict[str, Any]] = []
        for step in self._kept if hindsight else ():
            weights = load_file(self._kept_path(step))
            for snapshot in pl_module.hindsight_snapshots(weights, step):
                rows += self._measure([snapshot], hindsight, note=False)
        if rows:
            write_table(self.folder / "parts" / "hindsight.parquet", rows, METRICS_SCHEMA)

    # ------------------------------------------------------------------ what

    def _observe(self, trainer: L.Trainer, pl_module: Any, *, full: bool) -> None:
        step = pl_module.updates
        live = {k: m for k, m in self.metrics.items() if not self._is_hindsight(m, pl_module)}
        if not full:
            live = {k: m for k, m in live.items() if k in self.plan.evaluate}
        snapshots = self._with_references(pl_module.snapshots(self._hooks, full=full), step)
        rows = self._measure(snapshots, live, note=True)
        self._rows += rows
        self._times.append({"run_id": self.identity.run_id, "step": step, "time": time.time()})
        if full and len(live) < len(self.metrics):
            self._keep_weights(pl_module, step)
        for logger in trainer.loggers:
            logger.log_metrics(flat(rows), step)

    def _forget(self, step: int) -> None:
        """Drop a step's rows, which a full record is about to repeat."""
        self._rows = [row for row in self._rows if row["step"] != step]
        self._times = [row for row in self._times if row["step"] != step]

    def _with_references(self, snapshots: Iterable[Snapshot], step: int) -> Iterator[Snapshot]:
        for snapshot in snapshots:
            if not snapshot.acts or snapshot.split != "probe":
                yield snapshot  # only the probe is compared with its own past
                continue
            acts = {name: tensor.detach() for name, tensor in snapshot.acts.items()}
            if step == 0:
                self._initial = acts
            on_grid = step % self.plan.drift_lag == 0
            is_lagged = on_grid and self._reference_step == step - self.plan.drift_lag
            earlier = self._reference if is_lagged else {}
            yield replace(snapshot, earlier=earlier, initial=self._initial)
            if on_grid:
                self._reference, self._reference_step = acts, step

    def _measure(
        self,
        snapshots: Iterable[Snapshot],
        metrics: Mapping[str, Metric],
        *,
        note: bool,
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for _, group in groupby(snapshots, key=lambda s: s.split):
            used: dict[str, Metric] = {}
            snapshot = None
            for snapshot in group:
                with _one_thread():
                    for name, metric in metrics.items():
                        if _applies(metric, snapshot):
                            metric.update(snapshot)
                            used[name] = metric
            for name, metric in used.items():
                assert snapshot is not None
                with _one_thread():
                    readings = metric.readings()
                for reading in readings:
                    row = self._row(name, snapshot, reading)
                    rows.append(row)
                    if note and reading.layer is None and reading.position is None:
                        self.latest[row["metric"], row["split"]] = reading.value
                if metric.skipped:
                    self.skipped.setdefault(name, Counter()).update(metric.skipped)
                metric.reset()
        return rows

    def _row(self, name: str, snapshot: Snapshot, reading: Reading) -> dict[str, Any]:
        return {
            **vars(self.identity),
            "step": snapshot.step,
            "split": snapshot.split,
            "metric": f"{name}.{reading.part}" if reading.part else name,
            "symbol": reading.symbol,
            "unit": reading.unit,
            "layer": reading.layer,
            "head": reading.head,
            "position": reading.position,
            "value": reading.value,
            "n": reading.n,
        }

    # ------------------------------------------------------------------ weights for hindsight

    def _kept_path(self, step: int) -> Path:
        return self.folder / "parts" / f"weights-{step}.safetensors"

    def _keep_weights(self, pl_module: Any, step: int) -> None:
        if self._kept and self._kept[-1] == step:
            return
        weights = {
            k: v.detach().cpu().contiguous() for k, v in pl_module.model.state_dict().items()
        }
        path = self._kept_path(step)
        write_atomically(path, lambda file: save_file(weights, file), is_durable=False)
        self._kept.append(step)

    # ------------------------------------------------------------------ survival

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Write the rows that wait, so that the resume point has them behind it.

        The state is added here and not in `state_dict`, which Lightning calls before this.
        """
        del trainer
        self._flush(pl_module.updates)
        for dropped in self._thinned:  # the resume point that still named them is past
            self._kept_path(dropped).unlink(missing_ok=True)
        before = self._kept
        while len(self._kept) > MAX_KEPT:
            self._kept = self._kept[:-1:2] + self._kept[-1:]
        self._thinned = [kept for kept in before if kept not in self._kept]
        checkpoint["recorder"] = {
            "cadence": self.cadence.state_dict(),
            "initial": dict(self._initial),
            "reference": dict(self._reference),
            "reference_step": self._reference_step,
            "kept": list(self._kept),
            "flushed": list(self._flushed),
            "skipped": {name: dict(counts) for name, counts in self.skipped.items()},
            "latest": [[metric, split, value] for (metric, split), value in self.latest.items()],
        }

    def _flush(self, step: int) -> None:
        parts = self.folder / "parts"
        write_table(parts / f"metrics-{step}.parquet", self._rows, METRICS_SCHEMA)
        write_table(parts / f"times-{step}.parquet", self._times, TIMES_SCHEMA)
        self._flushed.append(step)
        self._rows, self._times = [], []

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Take up at a resume point; forget what was written after it."""
        del trainer
        state_dict = checkpoint["recorder"]
        self.cadence.load_state_dict(state_dict["cadence"])
        self._initial, self._reference = (
            {name: acts.to(pl_module.device) for name, acts in state_dict[kind].items()}
            for kind in ("initial", "reference")
        )
        self._reference_step = state_dict["reference_step"]
        self._kept, self._flushed = list(state_dict["kept"]), list(state_dict["flushed"])
        self.skipped = {name: Counter(counts) for name, counts in state_dict["skipped"].items()}
        self.latest = {(metric, split): value for metric, split, value in state_dict["latest"]}
        keep = {self._kept_path(step).name for step in self._kept}
        keep |= {
            f"{kind}-{step}.parquet" for step in self._flushed for kind in ("metrics", "times")
        }
        for path in (self.folder / "parts").iterdir():
            if path.name not in keep:
                path.unlink()

    def close(self) -> dict[str, Any]:
        """Join the parts to the run's tables.

        Returns:
            What run.json says of the metrics: `metrics` and `skipped`.
        """
        if self._rows:  # of a run without resume points, which trained nothing
            self._flush(self._rows[-1]["step"])
        parts = self.folder / "parts"
        for kind, schema in (("metrics", METRICS_SCHEMA), ("times", TIMES_SCHEMA)):
            paths = [parts / f"{kind}-{step}.parquet" for step in self._flushed]
            extra = parts / "hindsight.parquet"
            paths += [extra] if kind == "metrics" and extra.is_file() else []
            write_table(self.folder / f"{kind}.parquet", concatenate(paths, schema), schema)
        return {
            "metrics": {name: describe(metric) for name, metric in self.metrics.items()},
            "skipped": {name: dict(counts) for name, counts in sorted(self.skipped.items())},
        }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Metrics do many small things, for which threads wait on each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _provides(snapshot: Snapshot) -> set[str]:
    fields = {
        "logits": snapshot.logits is not None,
        "labels": snapshot.labels is not None,
        "foils": snapshot.foils is not None,
        "clean_logits": snapshot.clean_logits is not None,
        "classes": snapshot.classes is not None,
        "params": snapshot.weights is not None,
        "before": bool(snapshot.before),
        "grads": bool(snapshot.grads),
        "modulus": snapshot.modulus is not None,
        "grid_logits": snapshot.grid_logits is not None,
        "train_pairs": snapshot.train_pairs is not None,
        "key_frequencies": snapshot.key_frequencies is not None,
        "coding": snapshot.coding is not None,
        "members": snapshot.members is not None,
        "matches": snapshot.matches is not None,
        "decoder": snapshot.decoder is not None,
        "truth": snapshot.truth is not None,
        "token_losses": bool(snapshot.token_losses),
    }
    return {name for name, is_there in fields.items() if is_there}


def _applies(metric: Metric, snapshot: Snapshot) -> bool:
    """Whether a snapshot meets a metric's needs; weights alone are read once, without a split."""
    needs = {need for need in metric.needs if "hook_" not in need}
    if needs == set(metric.needs) and needs <= WEIGHT_NEEDS and snapshot.split is not None:
        return False
    return needs <= _provides(snapshot) and (needs == set(metric.needs) or bool(snapshot.acts))


def _bare(need: str) -> str:
    return need.removeprefix("earlier.").removeprefix("initial.")


def describe(metric: Metric | type[Metric]) -> dict[str, Any]:
    """What run.json says of a metric."""
    keys = ("symbol", "unit", "source", "functional", "direction", "audit_key")
    return {key: getattr(metric, key) for key in keys}
