"""Two jobs side by side: one that cannot run fails alone, the other is done and not done again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMAND = ["+exp=grokking", "preset=quick", "-m", "seed=0", "condition=high_wd", "stages=[fit]"]


JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


def sweep(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "allostasis", *COMMAND, "module.max_steps=20", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.rglob("run.json")]
    return {run["device"]: run for run in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], id="one after the other"),
        pytest.param(JOBLIB, id="joblib"),
        pytest.param(["hydra/launcher=submitit_local"], id="submitit"),
    ],
)
def test_a_job_that_fails_is_told_and_the_other_is_done(
    tmp_path: Path, launcher: list[str]
) -> None:
    done = sweep(tmp_path, "device=cuda:99,cpu", *launcher)
    assert done.returncode == 1, done.stderr
    runs = records(tmp_path)
    assert {device: run["status"] for device, run in runs.items()} == {
        "cuda:99": "failed",
        "cpu": "done",
    }
    assert runs["cuda:99"]["error"]["type"] == "ValueError"
    assert "cuda99-" in str(next(tmp_path.rglob("seed=0/cuda*")))
    table = [line for line in done.stdout.splitlines() if line.startswith("│ high_wd")]
    assert [("failed" in line, "done" in line) for line in table] == [(True, False), (False, True)]
    if launcher:
        cores = os.cpu_count() or 1
        share = max(1, cores // 2) if "joblib" in launcher[0] else 1
        assert runs["cpu"]["threads"] == share
    log = next(tmp_path.rglob("seed=0/cuda99-*/run.log")).read_text()
    assert "ValueError: device=cuda:99: this machine has" in log
    assert "Traceback (most recent call last)" in log
    assert "Traceback" not in done.stdout + done.stderr

    again = sweep(tmp_path, "device=cpu", *launcher)
    assert again.returncode == 0, again.stderr
    assert "1 run, 1 finished already" in again.stdout
    assert records(tmp_path)["cpu"]["finished"] == runs["cpu"]["finished"]
