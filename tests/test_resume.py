"""A run that is killed goes on where it was, to the records that it would have had."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow

INTERVAL = 50
COMMAND = [
    sys.executable, "-m", "allostasis", "+exp=grokking", "preset=quick", "threads=1",
    "task.p=23", "model.d_model=32", "model.d_mlp=64", "task.probe_size=64",
    "module.max_steps=600", "module.stop_after_grok=null", f"metrics.checkpoint_every={INTERVAL}",
    "metrics.drift_lag=50", "metrics.sparse_every=50",
]  # fmt: skip


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *more], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_folder(folder: Path) -> Path:
    return next(folder.glob("outputs/grokking/high_wd/seed=0/auto-*"))


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path, after: int) -> None:
    """Wait until weights later than `after` are kept, which is after their resume point."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        kept = folder.glob("outputs/grokking/high_wd/seed=0/*/checkpoints/*.safetensors")
        if any(int(path.stem) > after for path in kept):
            return
        time.sleep(0.01)
    pytest.fail(f"no checkpoint after step {after}: {process.communicate()[0][-2000:]}")


def run_json(folder: Path) -> dict[str, object]:
    return json.loads((run_folder(folder) / "run.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return folder


def assert_same_records(folder: Path, uninterrupted: Path) -> None:
    for name in ("metrics.parquet", "examples.parquet"):
        ours, theirs = (pq.read_table(run_folder(f) / name) for f in (folder, uninterrupted))
        assert ours.num_rows == theirs.num_rows
        assert ours.equals(theirs)
    ours, theirs = run_json(folder), run_json(uninterrupted)
    assert ours["checkpoints"] == theirs["checkpoints"]
    assert ours["summary"] == theirs["summary"]
    assert ours["skipped"] == theirs["skipped"]


def test_kill_9_at_three_random_moments_changes_no_record(
    tmp_path: Path, uninterrupted: Path
) -> None:
    chance = random.Random(0)
    reached = 0
    for _ in range(3):
        process = start(tmp_path)
        wait_for_checkpoint(process, tmp_path, after=reached)
        time.sleep(chance.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert run_json(tmp_path)["status"] == "running"
        kept = (run_folder(tmp_path) / "checkpoints").glob("*.safetensors")
        reached = max(int(path.stem) for path in kept)
    process = start(tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    resumed = re.search(r"resumed at step ([\d ]+)", output)
    assert resumed is not None
    step = int(resumed[1].replace(" ", ""))
    assert step > 0
    assert reached - step <= INTERVAL
    assert_same_records(tmp_path, uninterrupted)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_its_status_and_the_run_goes_on(
    number: signal.Signals, status: int, tmp_path: Path, uninterrupted: Path
) -> None:
    process = start(tmp_path)
    wait_for_checkpoint(process, tmp_path, after=INTERVAL)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output[-3000:]
    assert "Traceback" not in output
    assert run_json(tmp_path)["status"] == "interrupted"
    process = start(tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert_same_records(tmp_path, uninterrupted)


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    first = start(tmp_path, "module.max_steps=100_000")
    wait_for_checkpoint(first, tmp_path, after=0)
    second = start(tmp_path, "module.max_steps=100_000")
    output, _ = second.communicate(timeout=120)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert second.returncode == 1
    assert "another process is at work on this run" in output
    assert run_folder(tmp_path).name in output
