"""One run, from a checked config to closed records."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock, Timeout
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from threadpoolctl import threadpool_limits

from allostasis import instrument
from allostasis.analysis import claim_files
from allostasis.callbacks import loggers
from allostasis.callbacks.cadence import Plan
from allostasis.callbacks.checkpoints import RESUME, Checkpoints
from allostasis.callbacks.profile import sampled
from allostasis.callbacks.progress import Progress
from allostasis.callbacks.recorder import Identity, Recorder
from allostasis.callbacks.tables import Tables
from allostasis.core import audit, devices, locate
from allostasis.core.config import config_hash
from allostasis.core.interrupt import Interrupted, interruptible
from allostasis.core.provenance import RunFile, Status
from allostasis.core.records import RunRecord, read_run, write_atomically, write_json


def run(cfg: DictConfig, folder: Path, *, command: str | None = None) -> dict[str, Any]:
    """Do one run, or go on with it where an interrupted one stopped.

    Args:
        cfg: A config that `core.validate` found good.
        folder: The run's folder; what an unfinished run left there is taken up.
        command: The words that make this one run, for run.json.

    Returns:
        Content of run.json.

    Raises:
        Interrupted: By Ctrl-C or SIGTERM; the same command resumes the run.
        BusyError: Another process is at work in the folder.
        ValueError: The device is not there.
    """
    if cfg.module.get("replicas", 1) > 1:
        from allostasis.block import run_block  # which is made of this module's parts

        return run_block(cfg, folder, command=command)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise locate.BusyError(f"{folder}: another process is at work on this run") from None
    with lock, interruptible():
        if cfg.force:
            clear(folder)
        file = RunFile(folder)
        as_composed = copy.deepcopy(cfg)  # resolved, a seed is a number, and no longer every seed
        identity = open_run(cfg, folder, file, command)
        status: Status = "failed"
        facts: dict[str, Any] = {}
        error: BaseException | None = None
        logger = None
        try:
            earlier = read_first(as_composed, folder)
            logger = loggers.build(cfg.logger, identity=identity, folder=folder)
            # NumPy's own BLAS threads would spin against torch's for the same cores
            with threadpool_limits(1, user_api="blas"):
                status = _work(cfg, folder, file, identity, logger, earlier, facts)
        except Interrupted as exception:
            status, error = "interrupted", exception
            raise
        except Exception as exception:
            error = exception
            raise
        finally:
            file.finish(status, facts, error)
            loggers.close(logger, folder=folder)
        return file.content


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


def read_first(cfg: DictConfig, folder: Path) -> dict[str, RunRecord]:
    """The finished runs of other arms or experiments that this one reads; the missing are made.

    `module.reads` names arms of the same experiment, `module.reads_of` an arm of each of some other
    experiments, `module.top_k_from` an experiment whose arm has this one's name.

    This run is built once before, so that what is wrong with it is told before others are made.
    """
    conditions, exp = cfg.module.get("reads") or [], cfg.module.get("top_k_from")
    others = dict(cfg.module.get("reads_of") or {})
    if exp:
        others[exp] = cfg.condition
    if conditions or others:  # of a copy: a node that another one names is resolved where it stands
        build_all(copy.deepcopy(cfg), devices.resolve(cfg.device))
    found = {c: locate.finished(cfg, c, run, beside=folder) for c in conditions}
    for exp, condition in others.items():
        found[exp] = locate.finished(cfg, condition, run, beside=folder, exp=exp)
    return found


def _work(
    cfg: DictConfig,
    folder: Path,
    file: RunFile,
    identity: Identity,
    logger: Any,
    earlier: dict[str, RunRecord],
    facts: dict[str, Any],
) -> Status:
    """Build everything, train and test, close the tables; `facts` is filled on the way."""
    device = devices.resolve(cfg.device)
    facts |= {"device_resolved": device.name, "device_name": device.model}
    if cfg.gates:
        gates = instrument.run_gates()
        facts["gates"] = {gate.name: vars(gate) | {"passed": gate.passed} for gate in gates}

    L.seed_everything(cfg.seed, verbose=False)
    task, module = build_all(cfg, device)
    if earlier:
        facts |= facts_read(earlier) | module.take(earlier)
    if not (folder / "checkpoints" / RESUME).is_file():  # else its first session has shown it
        facts["effect"] = module.prove_effect()
    file.note(facts)
    do = _train if "fit" in cfg.stages else _look
    do(cfg, folder, identity, device, logger, task, module, facts)
    facts["numerics"] = _numerics()  # the trainer sets some of them
    return close_records(folder, file, facts, module)


def _numerics() -> dict[str, Any]:
    """Settings of torch that decide the last digits."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


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


def _look(
    cfg: DictConfig,
    folder: Path,
    identity: Identity,
    device: devices.Device,
    logger: Any,
    task: L.LightningDataModule,
    module: Any,
    facts: dict[str, Any],
) -> None:
    """Test a module that trains nothing; it makes its own tables and facts."""
    trainer = make_trainer(cfg, folder, device, logger, [Tables(folder=folder, identity=identity)])
    try:
        with sampled(folder):
            trainer.test(module, datamodule=task, verbose=False)
    finally:
        facts |= {"metrics": {}, "skipped": {}, "checkpoints": {}, **module.facts}


def _train(
    cfg: DictConfig,
    folder: Path,
    identity: Identity,
    device: devices.Device,
    logger: Any,
    task: L.LightningDataModule,
    module: Any,
    facts: dict[str, Any],
) -> None:
    """Train a module, or go on where a resume point says; what is recorded is the Recorder's."""
    plan: Plan = build(cfg.metrics)
    recorder = Recorder(
        folder=folder, identity=identity, plan=plan, eval_every=cfg.module.eval_every
    )
    checkpoints = Checkpoints(folder=folder, every=plan.checkpoint_every)
    progress = Progress(identity=identity, recorder=recorder)
    trainer = make_trainer(cfg, folder, device, logger, [recorder, checkpoints, progress])
    resume = checkpoints.resume_path if checkpoints.resume_path.is_file() else None
    if "fit" in cfg.stages:
        trainer.fit(module, datamodule=task, ckpt_path=resume, weights_only=True)
    if "test" in cfg.stages:
        trainer.test(module, datamodule=task, verbose=False)

    facts |= recorder.close()
    facts["checkpoints"] = {str(step): sha for step, sha in sorted(checkpoints.sha256.items())}


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


def _experiment(cfg: DictConfig) -> Path:
    """The folder of an experiment: where the module that its config names lies."""
    package = cfg.module["_target_"].rpartition(".")[0].rpartition(".")[0]
    return Path(importlib.import_module(package).__path__[0])


def clear(folder: Path) -> None:
    """Remove an earlier run's files; Hydra's own, which belong to this one, stay."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in {".hydra", "run.log"}:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
