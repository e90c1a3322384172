"""What every run has, alone or in a block: it is opened, built, told of others, and closed."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock, Timeout
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from allostasis import instrument
from allostasis.analysis import claim_files
from allostasis.callbacks.checkpoints import RESUME
from allostasis.callbacks.recorder import Identity
from allostasis.core import audit, devices, locate
from allostasis.core.config import config_hash
from allostasis.core.provenance import RunFile, Status
from allostasis.core.records import RunRecord, read_run, write_atomically, write_json

Make = Callable[[DictConfig, Path], Any]
"""Does a run of a config in a folder."""


def locked(folder: Path) -> AbstractContextManager[Any]:
    """The lock of a run's folder, held until its block of `with` ends.

    Raises:
        BusyError: Another process holds it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder.parent / f".{folder.name}.lock").acquire(timeout=0)
    except Timeout:
        raise locate.BusyError(f"{folder}: another process is at work on this run") from None


def open_run(cfg: DictConfig, folder: Path, file: RunFile, command: str | None) -> Identity:
    """Write run.json, config.yaml and claims.json: everything that is fixed before a run."""
    digest = config_hash(cfg)
    device_word = str(cfg.device).replace(":", "")
    identity = Identity(
        run_id=f"{cfg.name}-{cfg.condition}-{cfg.seed}-{device_word}-{digest}",
        exp=cfg.name,
        condition=cfg.condition,
        seed=cfg.seed,
        device=cfg.device,
    )
    registered = claim_files.freeze(claim_files.load(_experiment(cfg), cfg.name))
    threads = file.content.get("threads") or cfg.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    # a loss near 0 has gradients below 1e-38, which a CPU computes with ten times slower; AdamW
    # divides them by at least its eps, so that to an update they are 0 in any case
    torch.set_flush_denormal(True)
    file.start({
        **vars(identity),
        "config_hash": digest,
        "claims_hash": registered["hash"],
        "claims": registered["hashes"],
        "threads": threads,
        "command": command,
    })
    OmegaConf.resolve(cfg)
    write_atomically(folder / "config.yaml", lambda path: OmegaConf.save(cfg, path))
    text = registered["text"]
    write_atomically(folder / "claims.json", lambda path: path.write_text(text, encoding="utf-8"))
    return identity


def _experiment(cfg: DictConfig) -> Path:
    """The folder of an experiment: where the module that its config names lies."""
    package = cfg.module["_target_"].rpartition(".")[0].rpartition(".")[0]
    return Path(importlib.import_module(package).__path__[0])


def read_first(cfg: DictConfig, folder: Path, make: Make) -> dict[str, RunRecord]:
    """The finished runs of other arms or experiments that this one reads; the missing are made.

    `module.reads` names arms of the same experiment, `module.reads_of` an arm of each of some other
    experiments, `module.top_k_from` an experiment whose arm has this one's name.

    This run is built once before, so that what is wrong with it is told before others are made.

    Args:
        cfg: The config as it was composed.
        folder: The run's folder.
        make: Does a run of a config in a folder.
    """
    conditions, exp = cfg.module.get("reads") or [], cfg.module.get("top_k_from")
    others = dict(cfg.module.get("reads_of") or {})
    if exp:
        others[exp] = cfg.condition
    if conditions or others:  # of a copy: a node that another one names is resolved where it stands
        build_all(copy.deepcopy(cfg), devices.resolve(cfg.device))
    found = {c: locate.finished(cfg, c, make, beside=folder) for c in conditions}
    for exp, condition in others.items():
        found[exp] = locate.finished(cfg, condition, make, beside=folder, exp=exp)
    return found


def run_gates(cfg: DictConfig) -> dict[str, Any]:
    """What run.json says of the instrument's gates, where the config asks for them."""
    if not cfg.gates:
        return {}
    gates = instrument.run_gates()
    return {"gates": {gate.name: vars(gate) | {"passed": gate.passed} for gate in gates}}


def build_all(cfg: DictConfig, device: devices.Device) -> tuple[Any, Any]:
    """The task, and the module around it and the model, on the device where they will work."""
    task, model = build(cfg.task), build(cfg.model)
    if isinstance(model, torch.nn.Module):  # drawn on the CPU, so that every device begins alike
        model = model.to(device.torch)
    return task, build(cfg.module, model=model, task=task).to(device.torch)


def build(node: DictConfig, **supplied: Any) -> Any:
    """Call a block's `_target_`; what it raises comes out as it was raised."""
    try:
        return instantiate(node, **supplied, _convert_="all")
    except InstantiationException as error:
        raise (error.__cause__ or error) from None


def make_trainer(
    cfg: DictConfig,
    folder: Path,
    device: devices.Device,
    logger: Any,
    callbacks: list[L.Callback],
) -> L.Trainer:
    """Lightning's Trainer with the config's arguments, on one device."""
    return L.Trainer(
        **{str(key): value for key, value in cfg.trainer.items()},
        accelerator=device.accelerator,
        devices=device.devices,
        default_root_dir=folder,
        logger=logger or False,
        callbacks=callbacks,
    )


def facts_read(earlier: dict[str, RunRecord]) -> dict[str, Any]:
    """What run.json says of the runs of other arms that this one read."""
    return {
        "read": {
            condition: {"run_id": record.run["run_id"], "checkpoints": record.run["checkpoints"]}
            for condition, record in earlier.items()
        }
    }


def close_records(folder: Path, file: RunFile, facts: dict[str, Any], module: Any) -> Status:
    """Write audit.json, remove what only an unfinished run needs; how the run ended."""
    facts["numerics"] = _numerics()  # the trainer sets some of them
    facts["summary"] = module.summary()
    facts["data"] = module.data()
    record = read_run(folder)
    seen = {**file.content, **facts, "wall_s": file.elapsed()}
    write_json(folder / "audit.json", audit.view(seen, record.metrics, record.times))
    (folder / "checkpoints" / RESUME).unlink(missing_ok=True)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    verified = all(gate["passed"] for gate in seen.get("gates", {}).values())
    verified = verified and seen.get("verify", {}).get("passed", True)
    return "done" if verified else "failed_verification"


def _numerics() -> dict[str, Any]:
    """Settings of torch that decide the last digits."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def clear(folder: Path) -> None:
    """Remove an earlier run's files; Hydra's own, which belong to this one, stay."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in {".hydra", "run.log"}:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
