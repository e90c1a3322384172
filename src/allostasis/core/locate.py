"""Finds the finished run that another run reads, or has it made first."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from allostasis.core.config import conf_dir, run_folder
from allostasis.core.records import RunRecord, read_run

log = logging.getLogger(__name__)

WAIT = 5.0  # seconds between two looks at a run that another process is at


class BusyError(RuntimeError):
    """Another process is at work on a run."""


def sibling(cfg: DictConfig, condition: str) -> DictConfig:
    """The config of another arm of the same design, at the same seed and other settings.

    What sets arms apart stands in `conditions`: the entries of one are values of `module`, by the
    same names. So the sibling has that condition's entries, and everything else as it is here.

    Raises:
        ValueError: The design has no such condition.
    """
    if condition not in cfg.conditions:
        raise ValueError(
            f"this run reads a run of condition '{condition}', which the design does not have; "
            f"it has {', '.join(cfg.conditions)}"
        )
    other = copy.deepcopy(cfg)
    with flag_override(other, ["struct", "readonly"], [False, False]):
        other.condition, other.force = condition, False
        other.module = OmegaConf.merge(other.module, other.conditions[condition])
    return other


SHARED = ("ablation", "n_donors", "positions", "span", "trajectory", "selection")
"""Settings that an experiment hands to the one whose run it reads, if both have them."""


def of_experiment(cfg: DictConfig, exp: str, condition: str) -> DictConfig:
    """The config of another experiment on the same model, seed and device.

    It is composed with the preset of the command, and takes over what is `SHARED`, and the task
    where both have one of the same kind.

    Args:
        cfg: The config of the run that reads, as it was composed.
        exp: The other experiment's name in conf/exp/.
        condition: The arm of it.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    words = [f"exp={exp}", f"condition='{condition}'", f"seed={cfg.seed}"]
    if HydraConfig.initialized():
        words.append(f"preset={HydraConfig.get().runtime.choices['preset']}")
    if GlobalHydra.instance().is_initialized():
        other = compose("config", words)
    else:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            other = compose("config", words)
    with flag_override(other, ["struct", "readonly"], [False, False]):
        is_same_task = other.task["_target_"] == cfg.task["_target_"]
        task = ("task",) if is_same_task else ()
        for field in (*task, "model", "device", "threads", "gates", "allow"):
            other[field] = copy.deepcopy(cfg[field])
        for name in SHARED:
            if name in cfg.module and name in other.module:
                other.module[name] = cfg.module[name]
    return other


def finished(
    cfg: DictConfig,
    condition: str,
    make: Callable[[DictConfig, Path], Any],
    *,
    beside: Path,
    exp: str | None = None,
) -> RunRecord:
    """The finished run of another arm or experiment; made first where there is none.

    Where another process is at that run, this one waits for it.

    Args:
        cfg: The config of the run that reads, as it was composed: interpolations not resolved.
        condition: The arm that is read.
        exp: The experiment that is read, where it is another one.
        make: Does a run of a config in a folder; raises BusyError where another process does.
        beside: The folder of the run that reads; the other one lies in the same outputs/.

    Raises:
        RuntimeError: The run was made and did not end as `done`.
    """
    other = sibling(cfg, condition) if exp is None else of_experiment(cfg, exp, condition)
    own = run_folder(cfg)
    is_usual = beside.parts[-len(own.parts) :] == own.parts
    root = beside.parents[len(own.parts) - 1] if is_usual else beside.parent
    folder = root / run_folder(other)
    name = f"{other.name} {condition} seed {other.seed}"
    while not _is_done(folder):
        log.info("%s is needed first", name)
        try:
            make(other, folder)
        except BusyError:
            log.info("waiting for %s, which another process is at", name)
            time.sleep(WAIT)
            continue
        if not _is_done(folder):
            status = read_run(folder).run["status"]
            raise RuntimeError(
                f"{name} was needed and ended as '{status}'; see {folder}/run.json. Once it is "
                "mended the same command goes on."
            )
    return read_run(folder)


def _is_done(folder: Path) -> bool:
    path = folder / "run.json"
    return path.is_file() and read_run(folder).run["status"] == "done"


def last_weights(record: RunRecord) -> Path:
    """The file of a run's last weights.

    Raises:
        FileNotFoundError: They are not there, for example in a study's records, which keep none.
    """
    files = (record.folder / "checkpoints").glob("*.safetensors")
    found = sorted(files, key=lambda path: int(path.stem))
    if not found:
        raise FileNotFoundError(
            f"{record.folder} keeps no weights; repeat that run with force=true"
        )
    return found[-1]
