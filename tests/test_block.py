"""Runs that are trained side by side leave the records that they would leave alone."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

WORDS = [
    "exp=grokking", "preset=quick", "threads=1", "device=cpu", "task.p=23", "task.train_frac=0.7",
    "task.probe_size=64", "model.d_model=32", "model.d_mlp=64", "module.max_steps=40",
    "metrics.drift_lag=20", "metrics.sparse_every=20", "metrics.checkpoint_every=20",
]  # fmt: skip
BLOCK = ["module.replicas=3", "module.n_seeds=2", "seed=4"]
KEYS = ["step", "split", "metric", "layer", "head", "position"]


def compose(*words: str):
    from allostasis.core.config import conf_dir, register

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra_compose("config", [*WORDS, *words])


def do(root: Path, *words: str) -> Path:
    from allostasis.core.config import run_folder
    from allostasis.run import run

    cfg = compose(*words)
    folder = root / run_folder(cfg)
    run(cfg, folder)
    return folder


def of_seed(folder: Path, seed: int) -> Path:
    return folder.parents[1] / f"seed={seed}" / folder.name


def run_json(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return do(tmp_path_factory.mktemp("block"), *BLOCK)


@pytest.mark.parametrize("seed", [4, 5])
def test_each_seed_has_the_record_of_its_single_run(block: Path, seed: int, tmp_path: Path) -> None:
    alone, together = do(tmp_path, f"seed={seed}"), of_seed(block, seed)
    ours, theirs = run_json(together), run_json(alone)
    assert ours["status"] == theirs["status"] == "done"
    assert (ours["engine"], ours["width"], ours["slot"]) == ("replicas", 3, seed - 4)
    assert ours["wall_s_amortised"] == pytest.approx(ours["wall_s"] / 3, abs=1)
    assert ours["data"] == theirs["data"]
    assert ours["checkpoints"]["0"] == theirs["checkpoints"]["0"]  # the same bits at the start
    assert ours["checkpoints"].keys() == theirs["checkpoints"].keys()
    assert ours["skipped"] == theirs["skipped"]
    assert ours["effect"] == theirs["effect"]
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}
    left, right = (pd.read_parquet(f / "metrics.parquet") for f in (together, alone))
    both = left.merge(right, on=KEYS, how="outer", indicator=True, suffixes=("", "_alone"))
    assert set(both["_merge"]) == {"both"}
    losses = both[both["metric"].eq("cross_entropy") & both["split"].eq("train")]
    assert len(losses) >= 3
    assert losses["value"].to_numpy() == pytest.approx(losses["value_alone"].to_numpy(), rel=1e-4)


def test_only_the_seeds_asked_for_leave_a_record(block: Path) -> None:
    assert {path.name for path in block.parents[1].iterdir() if path.is_dir()} == {
        "seed=4", "seed=5",
    }  # fmt: skip


def test_a_finished_run_is_left_alone_and_a_missing_one_is_the_same_in_another_slot(
    block: Path, tmp_path: Path
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(block.parents[4], root)
    first = root / block.relative_to(block.parents[4])
    second = of_seed(first, 5)
    before = (first / "run.json").read_bytes()
    shutil.rmtree(second)
    assert do(root, *BLOCK) == first
    assert (first / "run.json").read_bytes() == before
    again, once = run_json(second), run_json(of_seed(block, 5))
    assert again["slot"] == 0
    assert again["checkpoints"] == once["checkpoints"]
    ours, theirs = (pq.read_table(f / "metrics.parquet") for f in (second, of_seed(block, 5)))
    assert ours.equals(theirs)


def test_the_width_is_part_of_a_runs_identity_and_the_number_of_seeds_is_not() -> None:
    from allostasis.core.config import config_hash

    eight = config_hash(compose("module.replicas=8"))
    assert eight != config_hash(compose("module.replicas=4"))
    assert eight == config_hash(compose("module.replicas=8", "module.n_seeds=3"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["module.replicas=2", "module.n_seeds=3"], "n_seeds=3 seeds do not fit"),
        (["module.replicas=2", "module.engine=naive"], "engine=structured and matmul=float32"),
        (["module.replicas=2", "logger=csv"], "runs of a block share no dashboard"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    words: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        do(tmp_path, *words)


@pytest.mark.slow
def test_a_block_that_is_killed_goes_on_to_the_same_records(tmp_path: Path) -> None:
    longer = ["module.max_steps=200", "module.stop_after_grok=null", *BLOCK]
    whole = do(tmp_path / "whole", *longer)
    command = [sys.executable, "-m", "allostasis", *WORDS, *longer]
    folder = tmp_path / "stopped"
    folder.mkdir()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    stopped = folder / whole.relative_to(tmp_path / "whole")
    deadline = time.monotonic() + 120
    while not (stopped / "checkpoints" / "60.safetensors").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert run_json(stopped)["status"] != "done"
    output = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr[-2000:]
    assert "resumed at step" in output.stdout + output.stderr
    for seed in (4, 5):
        ours, theirs = of_seed(stopped, seed), of_seed(whole, seed)
        for name in ("metrics.parquet", "examples.parquet"):
            assert pq.read_table(ours / name).equals(pq.read_table(theirs / name))
        for key in ("checkpoints", "summary", "skipped"):
            assert run_json(ours)[key] == run_json(theirs)[key]
    assert not list(stopped.parents[1].glob(".block-*"))
