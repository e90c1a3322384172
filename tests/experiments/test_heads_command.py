"""The head lab from the command line: jobs are isolated, and what is finished is not run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

BROKEN = """
import sys
from allostasis.tasks.probes.task import Probes

build = Probes.build

def fail(self, *given):
    if self.corpus == "negation":
        raise ValueError("this corpus is broken")
    return build(self, *given)

Probes.build = fail
sys.argv[0] = "allostasis"
from allostasis.__main__ import main
sys.exit(main())
"""
WORDS = (
    "+exp=heads_zero", "-m", "preset=quick", "model=tiny", "model.arch=llama", "threads=1",
    "module.layers=1", "module.verify.units=2",
)  # fmt: skip


def _records(folder: Path) -> dict[str, dict]:
    found = folder.glob("outputs/heads_zero/*/seed=0/*/run.json")
    return {path.parts[-4]: json.loads(path.read_text()) for path in found}


def test_failed_corpus_leaves_three_complete(tmp_path: Path) -> None:
    """Trap 24; and the same command then runs the one that is missing, and no other."""
    first = subprocess.run(
        [sys.executable, "-c", BROKEN, *WORDS], cwd=tmp_path, capture_output=True, text=True
    )
    assert first.returncode == 1, first.stderr[-2000:]
    records = _records(tmp_path)
    assert {name: record["status"] for name, record in records.items()} == {
        "facts": "done", "negation": "failed", "counterfactual": "done", "logical": "done",
    }  # fmt: skip
    assert "this corpus is broken" in first.stdout + first.stderr
    again = subprocess.run(
        [sys.executable, "-m", "allostasis", *WORDS], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr[-2000:]
    assert "3 finished already" in again.stdout + again.stderr
    later = _records(tmp_path)
    assert later["negation"]["status"] == "done"
    assert all(len(later[name]["sessions"]) == 1 for name in ("facts", "counterfactual", "logical"))
    report = subprocess.run(
        [sys.executable, "-m", "allostasis.report", "outputs/heads_zero"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert report.returncode == 0, report.stderr[-2000:]
    (matrix,) = tmp_path.glob("outputs/heads_zero/report/cross_condition/*/head_matrix.parquet")
    assert set(pd.read_parquet(matrix)["condition"]) == {*records}
    text = (tmp_path / "outputs/heads_zero/report/REPORT.md").read_text()
    assert "What the corpora have in common" in text
    assert "the drawing of prompts" in text
