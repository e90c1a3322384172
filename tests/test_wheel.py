"""The wheel holds all that a run needs, outside the checkout."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_installed_wheel_runs_the_same_command_outside_the_checkout(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", *wheels.glob("*.whl")]
    subprocess.run(install, check=True, capture_output=True)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    # the dependencies of this environment, but not its editable install: .pth files are not read
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    outside = tmp_path / "elsewhere"
    outside.mkdir()
    where = subprocess.run(
        [python, "-c", "import allostasis; print(allostasis.__file__)"],
        cwd=outside, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(site) in where
    words = ["+exp=grokking", "-m", "seed=0,1", "preset=quick", "condition=high_wd"]
    words += ["module.max_steps=20", "threads=1"]
    sweep = [python, "-m", "allostasis", *words]
    done = subprocess.run(sweep, cwd=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    records = list(outside.glob("outputs/grokking/high_wd/seed=*/*/run.json"))
    assert len(records) == 2
    assert all(json.loads(path.read_text())["commit"] is None for path in records)
    report = [python, "-m", "allostasis.report", "outputs/grokking"]
    done = subprocess.run(report, cwd=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (outside / "outputs" / "grokking" / "report" / "report.html").is_file()
