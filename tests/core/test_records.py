import json
from pathlib import Path

import pyarrow as pa
import pytest

from allostasis.core import audit
from allostasis.core.records import (
    METRICS_SCHEMA,
    TIMES_SCHEMA,
    concatenate,
    read_run,
    read_runs,
    write_atomically,
    write_json,
    write_table,
)

RUN = {
    "exp": "grokking", "condition": "high_wd", "seed": 42, "commit": "abc", "wall_s": 3.0,
    "started": "2026-01-01T00:00:00+00:00", "checkpoints": {"0": "sha256:aa"},
}  # fmt: skip


def row(step: int, metric: str, value: float, **index: object) -> dict[str, object]:
    return {
        "run_id": "r", "exp": "grokking", "condition": "high_wd", "seed": 42, "device": "cpu",
        "step": step, "split": None, "metric": metric, "symbol": "A", "unit": "1", "layer": None,
        "head": None, "position": None, "value": value, "n": 1,
    } | index  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "grokking" / "high_wd" / "seed=42" / "cpu-0"
    write_json(folder / "run.json", RUN)
    rows = [
        row(0, "accuracy", 0.25, split="test"),
        row(0, "accuracy", 1.0, split="train"),
        row(0, "amplitude_activation.published", 2.0, split="probe", layer=0),
        row(0, "amplitude_activation.published", 4.0, split="probe", layer=1),
        row(100, "accuracy", 0.5, split="test"),
    ]
    write_table(folder / "metrics.parquet", rows, METRICS_SCHEMA)
    times = [{"run_id": "r", "step": step, "time": 1.7e9 + step} for step in (0, 100)]
    write_table(folder / "times.parquet", times, TIMES_SCHEMA)
    return folder


def test_a_table_comes_back_with_nullable_index_columns(run: Path) -> None:
    metrics = read_run(run).metrics
    assert list(metrics.columns) == METRICS_SCHEMA.names
    assert str(metrics["layer"].dtype) == "Int64"
    assert metrics["layer"].isna().sum() == 3


def test_runs_are_found_below_any_folder(run: Path, tmp_path: Path) -> None:
    assert [record.folder for record in read_runs(tmp_path)] == [run]
    with pytest.raises(FileNotFoundError, match="holds no run.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        write_table(tmp_path / "m.parquet", [row(0, "accuracy", value)], METRICS_SCHEMA)
    assert not list(tmp_path.iterdir())


def test_a_row_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column 'step' has 1 empty"):
        write_table(tmp_path / "m.parquet", [row(0, "a", 1.0) | {"step": None}], METRICS_SCHEMA)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"status": "running"})

    def fail(file: Path) -> None:
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"status": "running"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_parts_join_in_the_order_given(tmp_path: Path) -> None:
    paths = [tmp_path / f"{step}.parquet" for step in (100, 0)]
    for path in paths:
        write_table(path, [row(int(path.stem), "a", 1.0)], METRICS_SCHEMA)
    assert concatenate(paths, METRICS_SCHEMA)["step"].to_pylist() == [100, 0]
    assert concatenate([], METRICS_SCHEMA) == pa.Table.from_pylist([], METRICS_SCHEMA)


def test_audit_has_the_documents_shape_and_no_key_without_a_record(run: Path) -> None:
    record = read_run(run)
    log = audit.view(record.run, record.metrics, record.times)
    assert list(log) == ["metadata", "metrics", "checkpoints", "summary"]
    assert log["metadata"]["experiment"] == "exp_c_high_wd"
    assert audit.file_name(record.run) == "audit_log_exp_c_high_wd_seed_42.json"
    first, second = log["metrics"]
    assert first["timestamp"] == "2023-11-14T22:13:20+00:00"
    assert first["psi_accuracy"] == 0.25
    assert (first["A_activation"], first["A_activation_L0"], first["A_activation_L1"]) == (3, 2, 4)
    assert second.keys() == {"step", "timestamp", "psi_accuracy"}
    assert log["summary"]["total_steps"] == 100
