"""On a GPU: every experiment that trains runs there, and begins as it does on a CPU."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GROKKING = [
    "+exp=grokking", "preset=quick", "task.p=23", "model.d_model=32", "model.d_mlp=64",
    "task.probe_size=64", "module.max_steps=300", "module.stop_after_grok=null",
    "metrics.drift_lag=50", "metrics.sparse_every=50", "logger=none",
]  # fmt: skip
SEQUENCES = [
    "preset=quick", "task.vocab_size=16", "task.n_val=96", "task.n_contexts=4",
    "task.n_calibration=6000", "model.d_model=16", "module.max_steps=60", "module.eval_every=20",
    "metrics.dense_every=20", "metrics.sparse_every=20", "logger=none",
]  # fmt: skip
CLAMPED = [
    "constraint", "naive_clamp", "mean_preserving_clamp_batch", "placebo_clamp", "class_clamp_bw",
    "class_shrink_w_shuffled",
]  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "allostasis", "threads=1", *words]


def run(folder: Path, *words: str) -> None:
    done = subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def runs(folder: Path) -> dict[tuple[str, str], Path]:
    """Run folders by condition and device."""
    found = {}
    for path in folder.rglob("run.json"):
        content = json.loads(path.read_text())
        assert content["status"] == "done", content["error"]
        found[content["condition"], content["device_resolved"]] = path.parent
    return found


def losses(folder: Path, until: int) -> pd.Series:
    table = pd.read_parquet(folder / "metrics.parquet")
    here = table[(table["metric"] == "cross_entropy") & (table["step"] <= until)]
    return here.set_index(["split", "step"])["value"].sort_index()


def test_grokking_begins_as_on_a_cpu(tmp_path: Path) -> None:
    run(tmp_path, *GROKKING, "condition=high_wd", "seed=0", "-m", "device=cpu,cuda")
    found = runs(tmp_path)
    cpu, cuda = (losses(found["high_wd", device], 100) for device in ("cpu", "cuda:0"))
    assert len(cpu) > 4
    pd.testing.assert_series_equal(cpu, cuda, rtol=1e-4)


def test_constraint_begins_as_on_a_cpu(tmp_path: Path) -> None:
    run(tmp_path, "+exp=constraint", *SEQUENCES, "condition=control", "seed=0",
        "-m", "device=cpu,cuda")  # fmt: skip
    found = runs(tmp_path)
    cpu, cuda = (losses(found["control", device], 20) for device in ("cpu", "cuda:0"))
    pd.testing.assert_series_equal(cpu, cuda, rtol=1e-3)


def test_every_kind_of_clamp_works(tmp_path: Path) -> None:
    run(tmp_path, "+exp=constraint", *SEQUENCES, "seed=0", "device=cuda", "-m",
        f"condition={','.join(CLAMPED)}")  # fmt: skip
    found = runs(tmp_path)
    assert {condition for condition, _ in found} == {"control", *CLAMPED}
    frozen = json.loads((found["constraint", "cuda:0"] / "run.json").read_text())["summary"]
    assert frozen["frozen_max_change"] == 0 < frozen["free_head_change"]


def test_superposition_runs(tmp_path: Path) -> None:
    run(tmp_path, "+exp=superposition", "preset=quick", "device=cuda", "seed=0",
        "condition=planted", "logger=none")  # fmt: skip
    assert runs(tmp_path)


def test_a_killed_run_goes_on_to_the_same_records(tmp_path: Path) -> None:
    words = [*GROKKING, "condition=high_wd", "seed=0", "device=cuda", "metrics.checkpoint_every=50"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    run(whole, *words)
    process = subprocess.Popen(command(*words), cwd=killed)
    deadline = time.monotonic() + 120
    while not list(killed.rglob("resume.ckpt")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(killed, *words)
    ours, theirs = (pd.read_parquet(next(f.rglob("metrics.parquet"))) for f in (killed, whole))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
