"""Trackers: one tracked run a run, never a prompt, never a failed run because of one."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import wandb
from omegaconf import DictConfig, OmegaConf

from allostasis.callbacks import loggers, panels
from allostasis.callbacks.recorder import Identity
from allostasis.core.provenance import RunFile
from allostasis.core.records import METRICS_SCHEMA, TIMES_SCHEMA, write_table


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
    facts = {"config_hash": "abc", "claims_hash": "def", "threads": 1, "command": "python"}
    RunFile(folder).start(facts | vars(identity))
    cfg = OmegaConf.create({"_target_": f"allostasis.callbacks.loggers.{kind}", **settings})
    assert isinstance(cfg, DictConfig)
    return loggers.build(cfg, identity=identity, folder=folder)


def close(logger: Any, seed: int = 0, *, error: Exception | None = None) -> None:
    """End a run as run.py does, at step 30 if it is done."""
    folder = Path("outputs", f"seed={seed}")
    columns = {"run_id": ["x"], "step": [30], "time": [0.0]}
    write_table(folder / "times.parquet", pa.table(columns), TIMES_SCHEMA)
    rows = [row("amplitude_param", 0.1 * (1 + head), layer=0, head=head) for head in range(4)]
    write_table(folder / "metrics.parquet", rows, METRICS_SCHEMA)
    summary = {"t_grok": 20, "grokked": True, "censored_at": None, "top": "zero:0.6"}
    RunFile(folder).finish("failed" if error else "done", {"summary": summary}, error)
    loggers.close(logger, folder=folder)


def row(metric: str, value: float, **index: int) -> dict[str, Any]:
    return {
        "run_id": "x", "exp": "x", "condition": "x", "seed": 0, "device": "cpu", "step": 30,
        "metric": metric, "symbol": "A", "unit": "1", "value": value, "n": 1, **index,
    }  # fmt: skip


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
    for seed, error in ((0, None), (1, RuntimeError("boom"))):
        logger = build("wandb", seed)
        logger.log_metrics({"test/accuracy": 0.5 + seed}, step=30)
        close(logger, seed, error=error)
    runs = offline_runs()
    assert len({run["run_id"] for run in runs}) == 2
    assert [run["state"] for run in runs] == ["finished", "failed"]
    assert [run["name"][-10:] for run in runs] == ["0-auto-abc", "1-auto-abc"]
    assert [run["config"]["seed"] for run in runs] == [0, 1]
    assert {run["config"]["provenance"]["config_hash"] for run in runs} == {"abc"}
    assert [run["summary"]["test/accuracy"] for run in runs] == [0.5, 1.5]
    assert {run["summary"]["trainer/global_step"] for run in runs} == {30}
    assert [run["summary"].get("summary/t_grok") for run in runs] == [20, None]
    assert [run["summary"]["status"] for run in runs] == ["done", "failed"]
    assert runs[0]["summary"]["summary/top"] == "zero:0.6"
    assert runs[1]["summary"]["error"] == "RuntimeError: boom"
    maps = list(Path("wandb").glob("offline-run-*/files/media/images/maps/amplitude_param*.png"))
    assert len(maps) == 1


def test_a_key_without_a_server_gives_an_offline_run_and_one_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "5ec2e7" * 7
    monkeypatch.setenv("WANDB_API_KEY", secret[:40])
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens on this port
    with caplog.at_level(logging.INFO, logger="allostasis"):
        close(build("wandb", init_timeout=1.0))
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
    close(build("wandb", 0), 0)
    assert not Path("wandb").exists()
    close(build("wandb", 1, mode="offline"), 1)
    assert len(offline_runs()) == 1


def test_csv_lies_in_the_runs_folder() -> None:
    logger = build("csv")
    logger.log_metrics({"test/accuracy": 0.25}, step=10)
    close(logger)
    (table,) = Path("outputs").rglob("metrics.csv")
    assert table.read_text().splitlines() == ["step,test/accuracy", "10,0.25"]


def test_tensorboard_has_the_panels_the_maps_and_the_summary() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    logger = build("tensorboard")
    logger.log_metrics({"test/accuracy": 0.5}, step=30)
    close(logger)
    events = EventAccumulator("outputs/seed=0/tensorboard", size_guidance={"tensors": 0})
    events.Reload()
    (at,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(at.tensor_proto.string_val[0])
    assert [tab.title for tab in layout.category] == list(panels.WORDS.values())
    assert sum(len(tab.chart) for tab in layout.category) == len(panels.PANELS)
    accuracy = layout.category[0].chart[0].multiline.tag[0]
    assert re.match(accuracy, "test/accuracy")
    assert not re.match(accuracy, "test/accuracy.over_ceiling")
    assert events.Scalars("test/accuracy")[0].value == 0.5
    assert events.Scalars("summary/t_grok")[0].value == 20
    assert events.Tags()["images"] == ["maps/amplitude_param"]


@pytest.mark.filterwarnings("ignore")  # its own, of SQLAlchemy and pydantic
def test_mlflow_run_has_parameters_metrics_and_records(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow_run = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = build("mlflow", store="mlruns")
    logger.log_metrics({"test/logit_diff_mean": 0.5, "test/logit_diff_ci_lower": 0.4}, step=30)
    close(logger)
    client = mlflow_run(f"sqlite:///{Path('mlruns/mlflow.db').resolve()}")
    (run,) = client.search_runs([client.get_experiment_by_name("grokking").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "grokking-high_wd-0-auto-abc"
    assert run.data.params["module/lr"] == "0.1"
    assert run.data.params["provenance/config_hash"] == "abc"
    assert run.data.params["provenance/versions/torch"]
    assert run.data.metrics["test/logit_diff_ci_lower"] == 0.4
    assert run.data.metrics["summary/t_grok"] == 20
    assert run.data.tags["status"] == "done"
    assert run.data.tags["arm"] == "grokking-high_wd-abc"
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept == {"run.json", "config.yaml", "metrics.parquet", "times.parquet", "maps"}


@pytest.mark.filterwarnings("ignore")  # its own, of SQLAlchemy and pydantic
def test_mlflow_run_is_closed_on_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow_run = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    close(build("mlflow", 0, store="mlruns"), 0, error=RuntimeError("boom"))
    assert "MLFLOW_TRACKING_URI" not in os.environ
    close(build("mlflow", 1, store="mlruns"), 1)
    client = mlflow_run(f"sqlite:///{Path('mlruns/mlflow.db').resolve()}")
    runs = client.search_runs([client.get_experiment_by_name("grokking").experiment_id])
    assert {run.data.tags["seed"]: run.info.status for run in runs} == {
        "0": "FAILED",
        "1": "FINISHED",
    }
    failed = next(run for run in runs if run.info.status == "FAILED")
    assert failed.data.tags["error"] == "RuntimeError: boom"


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is here")
def test_mlflow_that_is_missing_is_told_with_the_command_that_gets_it() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'allostasis\[mlflow\]'"):
        build("mlflow")


def test_no_logger_is_no_logger() -> None:
    cfg = OmegaConf.create({})
    identity = Identity(run_id="x", exp="x", condition="x", seed=0, device="cpu")
    assert isinstance(cfg, DictConfig)
    assert loggers.build(cfg, identity=identity, folder=Path()) is None
    loggers.close(None, folder=Path())


def test_lightning_says_nothing_twice() -> None:
    assert build("csv") is not None
    assert logging.getLogger("lightning").handlers == []
    assert not logging.getLogger("lightning.pytorch.utilities.rank_zero").isEnabledFor(logging.INFO)
