"""Dashboards: one W&B run a run, never a prompt, never a failed run because of one."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import DictConfig, OmegaConf

from allostasis.callbacks import loggers
from allostasis.callbacks.recorder import Identity


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No key and no settings of the machine, and none of an earlier test, which W&B remembers."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


def build(kind: str, seed: int = 0, **settings: Any) -> Any:
    folder = Path("outputs", f"seed={seed}")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"seed: {seed}\nmodule: {{lr: 0.1}}\n")
    run_id = f"grokking-high_wd-{seed}-auto-abc"
    identity = Identity(
        run_id=run_id, exp="grokking", condition="high_wd", seed=seed, device="auto"
    )
    cfg = OmegaConf.create({"_target_": f"allostasis.callbacks.loggers.{kind}", **settings})
    assert isinstance(cfg, DictConfig)
    return loggers.build(cfg, identity=identity, folder=folder)


def offline_runs() -> list[dict[str, Any]]:
    """What `wandb leet` reads of the runs, oldest first."""
    leet = shutil.which("wandb", path=str(Path(sys.executable).parent))
    assert leet is not None
    found = []
    for folder in Path("wandb").glob("offline-run-*"):
        words = [leet, "leet", "inspect", "--summary", "--json", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    return sorted(found, key=lambda run: run["start_time"])


def test_two_runs_of_one_process_are_two_wandb_runs_and_a_failed_one_is_shown_failed() -> None:
    for seed, exit_code in ((0, 0), (1, 1)):
        logger = build("wandb", seed)
        logger.log_metrics({"test/accuracy": 0.5 + seed}, step=30)
        loggers.close(logger, exit_code=exit_code)
    runs = offline_runs()
    assert len({run["run_id"] for run in runs}) == 2
    assert [run["state"] for run in runs] == ["finished", "failed"]
    assert [run["name"][-10:] for run in runs] == ["0-auto-abc", "1-auto-abc"]
    assert [run["config"]["seed"] for run in runs] == [0, 1]
    assert [run["summary"]["test/accuracy"] for run in runs] == [0.5, 1.5]
    assert {run["summary"]["trainer/global_step"] for run in runs} == {30}


def test_a_key_without_a_server_gives_an_offline_run_and_one_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "5ec2e7" * 7
    monkeypatch.setenv("WANDB_API_KEY", secret[:40])
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens on this port
    with caplog.at_level(logging.INFO, logger="allostasis"):
        loggers.close(build("wandb", init_timeout=1.0), exit_code=0)
    ours = [record for record in caplog.records if record.name.startswith("allostasis")]
    notices = [record.message for record in ours if record.levelno >= logging.WARNING]
    assert len(notices) == 1
    assert notices[0].startswith("W&B is out of reach (")
    assert len(offline_runs()) == 1
    written = [path for path in Path("wandb").rglob("*") if path.is_file()]
    assert not [path for path in written if secret[:40].encode() in path.read_bytes()]


def test_wandb_mode_of_the_environment_is_heeded_and_that_of_the_config_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    loggers.close(build("wandb", 0), exit_code=0)
    assert not Path("wandb").exists()
    loggers.close(build("wandb", 1, mode="offline"), exit_code=0)
    assert len(offline_runs()) == 1


def test_csv_lies_in_the_runs_folder() -> None:
    logger = build("csv")
    logger.log_metrics({"test/accuracy": 0.25}, step=10)
    loggers.close(logger, exit_code=0)
    (table,) = Path("outputs").rglob("metrics.csv")
    assert table.read_text().splitlines() == ["step,test/accuracy", "10,0.25"]


def test_no_logger_is_no_logger() -> None:
    cfg = OmegaConf.create({})
    identity = Identity(run_id="x", exp="x", condition="x", seed=0, device="cpu")
    assert isinstance(cfg, DictConfig)
    assert loggers.build(cfg, identity=identity, folder=Path()) is None
    loggers.close(None, exit_code=1)


def test_lightning_says_nothing_twice() -> None:
    assert build("csv") is not None
    assert logging.getLogger("lightning").handlers == []
    assert not logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.INFO)
