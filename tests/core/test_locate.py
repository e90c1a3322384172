"""Runs that read other runs: found by identity, made once, refused when they cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig


@pytest.fixture
def cfg() -> DictConfig:
    from hydra import compose, initialize_config_dir

    from allostasis.core.config import conf_dir, register

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        words = ["exp=constraint", "preset=quick", "condition=naive_clamp", "seed=3", "device=cpu"]
        return compose("config", [*words, "module.clamp.site=blocks.0.hook_resid_mid"])


def make(made: list[Path], status: str = "done"):
    def run(other: DictConfig, folder: Path) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"status": status, "condition": other.condition, "run_id": "r"}
        (folder / "run.json").write_text(json.dumps(content))
        made.append(folder)

    return run


def test_a_sibling_is_the_run_that_its_own_command_would_make(cfg: DictConfig) -> None:
    from hydra import compose, initialize_config_dir

    from allostasis.core.config import conf_dir, run_folder
    from allostasis.core.locate import sibling

    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        words = ["exp=constraint", "preset=quick", "condition=control", "seed=3", "device=cpu"]
        own = compose("config", words)
    assert run_folder(sibling(cfg, "control")) == run_folder(own)
    assert cfg.condition == "naive_clamp"


def test_the_other_run_is_made_once_in_the_same_outputs(cfg: DictConfig, tmp_path: Path) -> None:
    from allostasis.core.config import run_folder
    from allostasis.core.locate import finished, sibling

    made: list[Path] = []
    folder = tmp_path / run_folder(cfg)
    for _ in range(2):
        record = finished(cfg, "control", make(made), beside=folder)
        assert record.run["condition"] == "control"
    assert made == [tmp_path / run_folder(sibling(cfg, "control"))]


def test_a_run_that_another_process_is_at_is_waited_for(
    cfg: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allostasis.core import locate
    from allostasis.core.config import run_folder

    made: list[Path] = []
    busy = iter((True, True, False))

    def sometimes(other: DictConfig, folder: Path) -> None:
        if next(busy):
            raise locate.BusyError("another process")
        make(made)(other, folder)

    monkeypatch.setattr(locate, "WAIT", 0.0)
    locate.finished(cfg, "control", sometimes, beside=tmp_path / run_folder(cfg))
    assert len(made) == 1


def test_a_run_that_does_not_end_well_is_an_error(cfg: DictConfig, tmp_path: Path) -> None:
    from allostasis.core.config import run_folder
    from allostasis.core.locate import finished

    with pytest.raises(RuntimeError, match="control seed 3 was needed and ended as 'failed'"):
        finished(cfg, "control", make([], "failed"), beside=tmp_path / run_folder(cfg))


def test_a_condition_that_is_not_there_and_weights_that_are_gone(
    cfg: DictConfig, tmp_path: Path
) -> None:
    from allostasis.core.locate import last_weights, sibling
    from allostasis.core.records import RunRecord

    with pytest.raises(ValueError, match="condition 'contrl', which the design does not have"):
        sibling(cfg, "contrl")
    with pytest.raises(FileNotFoundError, match="keeps no weights"):
        last_weights(RunRecord(tmp_path, {}))
