"""One run, from a checked config to closed records."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig
from threadpoolctl import threadpool_limits

from allostasis import lifecycle
from allostasis.block import run_block
from allostasis.callbacks import loggers
from allostasis.callbacks.cadence import Plan
from allostasis.callbacks.checkpoints import RESUME, Checkpoints
from allostasis.callbacks.profile import sampled
from allostasis.callbacks.progress import Progress
from allostasis.callbacks.recorder import Identity, Recorder
from allostasis.callbacks.tables import Tables
from allostasis.core import devices
from allostasis.core.interrupt import Interrupted, interruptible
from allostasis.core.provenance import RunFile, Status
from allostasis.core.records import RunRecord


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
        return run_block(cfg, folder, run, command=command)
    with lifecycle.locked(folder), interruptible():
        if cfg.force:
            lifecycle.clear(folder)
        file = RunFile(folder)
        as_composed = copy.deepcopy(cfg)  # resolved, a seed is a number, and no longer every seed
        identity = lifecycle.open_run(cfg, folder, file, command)
        status: Status = "failed"
        facts: dict[str, Any] = {}
        error: BaseException | None = None
        logger = None
        try:
            earlier = lifecycle.read_first(as_composed, folder, run)
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
    facts |= lifecycle.run_gates(cfg)

    L.seed_everything(cfg.seed, verbose=False)
    task, module = lifecycle.build_all(cfg, device)
    if earlier:
        facts |= lifecycle.facts_read(earlier) | module.take(earlier)
    if not (folder / "checkpoints" / RESUME).is_file():  # else its first session has shown it
        facts["effect"] = module.prove_effect()
    file.note(facts)
    do = _train if "fit" in cfg.stages else _look
    do(cfg, folder, identity, device, logger, task, module, facts)
    return lifecycle.close_records(folder, file, facts, module)


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
    trainer = lifecycle.make_trainer(
        cfg, folder, device, logger, [Tables(folder=folder, identity=identity)]
    )
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
    plan: Plan = lifecycle.build(cfg.metrics)
    recorder = Recorder(
        folder=folder, identity=identity, plan=plan, eval_every=cfg.module.eval_every
    )
    checkpoints = Checkpoints(folder=folder, every=plan.checkpoint_every)
    progress = Progress(identity=identity, recorder=recorder)
    trainer = lifecycle.make_trainer(cfg, folder, device, logger, [recorder, checkpoints, progress])
    resume = checkpoints.resume_path if checkpoints.resume_path.is_file() else None
    if "fit" in cfg.stages:
        trainer.fit(module, datamodule=task, ckpt_path=resume, weights_only=True)
    if "test" in cfg.stages:
        trainer.test(module, datamodule=task, verbose=False)

    facts |= recorder.close()
    facts["checkpoints"] = {str(step): sha for step, sha in sorted(checkpoints.sha256.items())}
