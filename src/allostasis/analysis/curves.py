"""What a run recorded, as curves over its steps and as events."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from allostasis.core.records import RunRecord

LOW, HIGH = 0.15, 0.85  # test accuracy at which the transition begins and ends
MIN_POINTS = 5  # of a curve within the transition, for a rank correlation
NO_TASK = "model does not do the task"
Table = Literal["examples", "depths"]
TABLES: tuple[Table, ...] = get_args(Table)
COLUMNS = ["step", "split", "metric", "unit", "layer", "head", "position", "value", "n"]
OF_INTERVENTIONS = ["intervention", "value_clean", "delta", "ci_low", "ci_high"]


class UndefinedError(Exception):
    """A run has no value of a summary; the message is the reason that the report prints."""


@dataclass(frozen=True)
class Curve:
    """One metric of one run over its recorded steps.

    Attributes:
        steps: Optimiser updates done, strictly increasing.
        values: The metric's value at each.
        n: How many examples each value is of; None where nobody asks.
    """

    steps: np.ndarray
    values: np.ndarray
    n: np.ndarray | None = None

    def at(self, step: float) -> float:
        """Value at a step, linear between records.

        Raises:
            UndefinedError: The step lies outside the recorded ones.
        """
        if not self.steps[0] <= step <= self.steps[-1]:
            raise UndefinedError(
                f"step {step:g} lies outside the recorded {self.steps[0]} to {self.steps[-1]}"
            )
        return float(np.interp(step, self.steps, self.values))

    def rises_through(self, level: float) -> float | None:
        """First step at which the curve reaches `level`, linear between records, or None."""
        above = np.flatnonzero(self.values >= level)
        if not len(above):
            return None
        first = above[0]
        if first == 0:
            return float(self.steps[0])
        return _between(self, int(first) - 1, level)


def _between(curve: Curve, left: int, level: float) -> float:
    """Step between records `left` and `left + 1` at which the curve passes `level`."""
    (s0, s1), (v0, v1) = curve.steps[left : left + 2], curve.values[left : left + 2]
    return float(s0 + (s1 - s0) * (level - v0) / (v1 - v0))


class RunView:
    """A run as analysis sees it: its arm, its events, its curves.

    Args:
        record: The run as it lies on disk; its tables are read when first asked for.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.run = record.run
        self.run_id: str = record.run["run_id"]
        self.exp: str = record.run["exp"]
        self.condition: str = record.run["condition"]
        self.seed: int = record.run["seed"]
        self.status: str = record.run["status"]
        self._curves: dict[tuple[object, ...], Curve] = {}
        self._prompts: dict[Table, pd.DataFrame] = {}

    @property
    def device(self) -> str:
        """Kind of device that it ran on: cpu, cuda or mps."""
        known = self.run.get("device_resolved") or self.run["device"]  # a run that failed at once
        return str(known).split(":")[0]

    @property
    def final_weights(self) -> str | None:
        """Hash of the last checkpoint, or None where none was kept."""
        checkpoints = self.run.get("checkpoints") or {}
        return checkpoints[max(checkpoints, key=int)] if checkpoints else None

    @property
    def is_matched(self) -> bool:
        """Whether it took a size from another arm's run, as flat autoencoders take an L0."""
        return bool(self.run.get("matched"))

    @property
    def why_unfinished(self) -> str:
        """How a run that is not done ended, with its error or the instrument gates it failed."""
        error = self.run.get("error")
        gates = self.run.get("gates") or {}
        failed = [name for name, gate in gates.items() if not gate["passed"]]
        details = [f"{error['type']}: {error['message']}"] if error else []
        details += [f"instrument gates failed: {', '.join(failed)}"] if failed else []
        return ": ".join([self.status, *details])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all readings in their order: equal only where a seed changed nothing."""
        return hashlib.sha256(self._rows["value"].to_numpy().tobytes()).hexdigest()

    @property
    def summary(self) -> Mapping[str, object]:
        """What the experiment wrote when the run ended."""
        return self.run.get("summary") or {}

    @property
    def gate(self) -> str:
        """Why no claim may be decided on this run; empty where nothing speaks against it."""
        return "" if self.summary.get("does_task", True) else NO_TASK

    @property
    def test_sha256(self) -> str | None:
        """Hash of the held-out sequences, where the run says which they were."""
        return ((self.run.get("data") or {}).get("test") or {}).get("sha256")

    def example_values(self, metrics: Sequence[str]) -> pd.DataFrame:
        """Values of single held-out examples at the end: a row each, a column a metric.

        Raises:
            UndefinedError: The record holds no single examples of these metrics.
        """
        table = self.record.examples
        if table is None:
            raise UndefinedError("examples.parquet was not recorded")
        there = table[table["metric"].isin(list(metrics)) & (table["split"] == "test")]
        found = there.pivot(index="example", columns="metric", values="value")
        if missing := set(metrics) - set(found):
            raise UndefinedError(f"examples.parquet holds no {', '.join(sorted(missing))}")
        return found

    @property
    def labels(self) -> tuple[str, ...]:
        """What the run says of the place and form of its intervention."""
        return tuple(str((self.run.get("effect") or {}).get("label") or "").split(", "))

    @property
    def is_inert(self) -> bool:
        """Whether the arm's intervention was seen to change nothing."""
        return "inert" in self.labels

    @property
    def is_argmax_inert(self) -> bool:
        """Whether the arm's intervention stands where it can change no prediction."""
        return "argmax_inert" in self.labels

    @property
    def model(self) -> Mapping[str, Any]:
        """What is known of the pretrained model; empty where the run trained its own."""
        return self.run.get("model") or {}

    @property
    def title(self) -> str:
        """The pretrained model in words, quantisation included."""
        return str(self.model.get("title") or self.model.get("name") or "this model")

    @property
    def subject(self) -> tuple[str, ...]:
        """What makes two pretrained models one: runs of different ones are never compared."""
        facts = ("title", "weights_sha256", "dtype", "prepend_bos", "attn_implementation")
        return tuple(f"{fact}={self.model[fact]}" for fact in facts if fact in self.model)

    @property
    def task(self) -> str:
        """The task's class."""
        task = self.record.config.get("task") or {}
        return str(task.get("_target_", self.exp)).rpartition(".")[2]

    @property
    def last_step(self) -> int:
        """The step at which the run ended; an event that has not come is censored here."""
        steps = self.summary.get("steps")
        return int(steps) if isinstance(steps, int) else int(self._rows["step"].max())

    @cached_property
    def _rows(self) -> pd.DataFrame:
        rows = self._every_row
        if "intervention" in rows:
            rows = rows[rows["intervention"].isna()]
        return rows[COLUMNS]

    @cached_property
    def _every_row(self) -> pd.DataFrame:
        path = self.record.folder / "metrics.parquet"
        there = set(pq.read_schema(path).names)
        columns = [*COLUMNS, *(column for column in OF_INTERVENTIONS if column in there)]
        table = pq.read_table(path, columns=columns, read_dictionary=["split", "metric", "unit"])
        return table.to_pandas()  # a missing layer, head or position is NaN here

    def interventions(self, metric: str, *, split: str) -> pd.DataFrame:
        """Rows of one metric with their intervention, which is None in the untouched model.

        Returns:
            Columns of `table`, and intervention, value_clean, delta, ci_low, ci_high; NaN where
            the record has none.
        """
        rows = self._every_row
        rows = rows[(rows["metric"] == metric) & (rows["split"] == split)]
        return rows.reindex(columns=[*COLUMNS, *OF_INTERVENTIONS])

    def records(self, metric: str) -> list[dict[str, Any]]:
        """Rows of one metric that no intervention is of, with their intervals."""
        rows = self._every_row
        rows = rows[(rows["metric"] == metric) & rows["intervention"].isna()]
        return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]

    def prompts(self, table: Table) -> pd.DataFrame:
        """Single prompts: one row a prompt and intervention, and a depth in `depths`.

        Raises:
            UndefinedError: The run recorded none.
        """
        if table not in self._prompts:
            path = self.record.folder / f"{table}.parquet"
            if not path.is_file():
                raise UndefinedError(f"{table}.parquet was not recorded")
            rows = pq.read_table(path).to_pandas()
            # the lab's records say group, as its corpora do
            rows = rows.rename(columns={"group": "cluster"})
            has_clusters = "cluster" in rows  # planted heads and features have none
            self._prompts[table] = rows.astype({"cluster": str}) if has_clusters else rows
        return self._prompts[table]

    @cached_property
    def _rows_of(self) -> dict[str, np.ndarray]:
        groups = self._rows.groupby("metric", observed=True).indices
        return {str(name): np.asarray(rows) for name, rows in groups.items()}

    @property
    def metrics(self) -> list[str]:
        """Names in the record's `metric` column, sorted."""
        return sorted(self._rows_of)

    def table(self, metric: str, *, split: str | None = None) -> pd.DataFrame:
        """Rows of one metric and split.

        Args:
            metric: Name in the `metric` column.
            split: Which data; ignored where the metric reads weights and so has no split.

        Returns:
            Columns step, layer, head, position, value; empty where nothing was recorded.
        """
        rows = self._rows.iloc[self._rows_of.get(metric, np.array([], dtype=int))]
        if split is not None:
            rows = rows[(rows["split"] == split) | rows["split"].isna()]
        return rows

    def curve(self, metric: str, *, split: str | None = None, **index: int | None) -> Curve:
        """One metric as a curve.

        Args:
            metric: Name in the `metric` column.
            split: Which data; see `table`.
            **index: layer, head or position, where the metric is recorded by them.

        Raises:
            UndefinedError: The run has no such rows.
            ValueError: A step has more than one row, so that something is left to choose.
        """
        key = (metric, split, *sorted(index.items()))
        if key not in self._curves:
            self._curves[key] = self._curve(metric, split, index)
        return self._curves[key]

    def _curve(self, metric: str, split: str | None, index: Mapping[str, int | None]) -> Curve:
        rows = self.table(metric, split=split)
        for column, wanted in index.items():
            if wanted is not None:
                rows = rows[rows[column] == wanted]
        if rows.empty:
            where = "" if split is None else f" on split '{split}'"
            raise UndefinedError(f"{metric} was not recorded{where}")
        rows = rows.drop_duplicates().sort_values("step", kind="stable")
        if rows["step"].duplicated().any():
            columns = ("split", "layer", "head", "position")
            open_columns = [c for c in columns if rows[c].nunique(dropna=False) > 1]
            raise ValueError(
                f"{self.run_id}: {metric} has several rows a step; "
                f"select one by {', '.join(open_columns) or 'a rerun: its rows repeat'}"
            )
        columns = (rows[name].to_numpy(kind) for name, kind in (
            ("step", np.int64), ("value", np.float64), ("n", np.int64),
        ))  # fmt: skip
        return Curve(*columns)

    def total(self, metric: str, *, split: str | None = None) -> Curve:
        """Sum of a metric over layers and heads, as a curve.

        Raises:
            UndefinedError: The run has no such rows.
        """
        rows = self.table(metric, split=split).drop_duplicates()
        if rows.empty:
            raise UndefinedError(f"{metric} was not recorded")
        summed = rows.groupby("step")["value"].sum()
        return Curve(summed.index.to_numpy(np.int64), summed.to_numpy(np.float64))

    def scalar_curves(self) -> Iterator[tuple[str, str | None, str, Curve]]:
        """Every metric that has one number a step and split, as (metric, split, unit, curve)."""
        rows = self._rows
        scalar = rows[rows[["layer", "head", "position"]].isna().all(axis=1)]
        keys = ["metric", "split", "unit"]
        for _, group in scalar.groupby(keys, observed=True, dropna=False):
            once = group.drop_duplicates("step").sort_values("step", kind="stable")
            metric, split, unit = once[keys].iloc[0]
            curve = Curve(once["step"].to_numpy(np.int64), once["value"].to_numpy(np.float64))
            yield metric, split if isinstance(split, str) else None, unit, curve

    def event(self, name: str) -> float | None:
        """Step of an event, or None where it has not come.

        Args:
            name: One of the summary's `t_...`, or `t_low`, `t_high`: the ends of the transition.
        """
        if name in {"t_low", "t_high"}:
            ends = self._transition
            return None if ends is None else ends[name == "t_high"]
        if name not in self.summary:
            raise UndefinedError(f"run.json's summary has no event '{name}'")
        step = self.summary[name]
        return float(step) if isinstance(step, int | float) else None

    def at_event(self, name: str) -> float:
        """Step of an event that must have come.

        Raises:
            UndefinedError: It has not.
        """
        step = self.event(name)
        if step is None:
            raise UndefinedError(f"{name} was not reached by step {self.last_step}")
        return step

    @cached_property
    def _transition(self) -> tuple[float, float] | None:
        """Last step below 15 % test accuracy before it first reaches 85 %, and that step."""
        accuracy = self.curve("accuracy", split="test")
        end = accuracy.rises_through(HIGH)
        if end is None:
            return None
        below = np.flatnonzero((accuracy.values < LOW) & (accuracy.steps < end))
        start = (
            float(accuracy.steps[0]) if not len(below) else _between(accuracy, int(below[-1]), LOW)
        )
        return start, end

    def published_velocities(self, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
        """`np.gradient` of test accuracy and of a curve at records with 15 % < accuracy < 85 %.

        As the source has it: without the steps' spacing, over records of unlike distance.

        Raises:
            UndefinedError: Too few records lie in the window.
        """
        accuracy, values, _ = self.beside_accuracy(curve)
        inside = (accuracy > LOW) & (accuracy < HIGH)
        if inside.sum() < MIN_POINTS:
            raise UndefinedError(f"{inside.sum()} records in the transition, under {MIN_POINTS}")
        return np.gradient(accuracy)[inside], np.gradient(values)[inside]

    def over_transition(self, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
        """Test accuracy and a curve over the transition, on a uniform grid of steps.

        The grid is as coarse as the coarsest cadence there; both are linear between records.

        Raises:
            UndefinedError: There is no transition, or it holds too few points.
        """
        start, end = self.at_event("t_low"), self.at_event("t_high")
        accuracy, values, steps = self.beside_accuracy(curve)
        inside = np.flatnonzero((steps[1:] > start) & (steps[:-1] < end))
        grid = np.arange(start, end, np.diff(steps)[inside].max())
        if len(grid) < MIN_POINTS:
            raise UndefinedError(
                f"the transition holds {len(grid)} points of a uniform grid, under {MIN_POINTS}"
            )
        return np.interp(grid, steps, accuracy), np.interp(grid, steps, values)

    def beside_accuracy(self, curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Test accuracy and a curve at the steps that both have, and these steps."""
        accuracy = self.curve("accuracy", split="test")
        steps, left, right = np.intersect1d(
            accuracy.steps, curve.steps, assume_unique=True, return_indices=True
        )
        return accuracy.values[left], curve.values[right], steps
