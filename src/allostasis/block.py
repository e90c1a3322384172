"""Runs of consecutive seeds that are trained side by side, each with a folder of its own."""

from __future__ import annotations

import copy
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, flag_override
from threadpoolctl import threadpool_limits

from allostasis import lifecycle
from allostasis.callbacks.members import Member, MemberCheckpoints, Members
from allostasis.callbacks.progress import Progress
from allostasis.callbacks.recorder import Identity, Recorder
from allostasis.core import devices
from allostasis.core.config import run_folders
from allostasis.core.interrupt import Interrupted, interruptible
from allostasis.core.provenance import RunFile, Status
from allostasis.lifecycle import Make


@dataclass
class Seat:
    """One run of a block: its config as composed, its folder, what is known of it."""

    cfg: DictConfig
    folder: Path
    file: RunFile
    identity: Identity | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    task: Any = None
    module: Any = None

    @property
    def is_done(self) -> bool:
        """Whether its record is closed."""
        return self.file.status == "done"


def seats(cfg: DictConfig, folder: Path) -> list[Seat]:
    """The runs of a block: its seeds from the config's own on, each in its own folder."""
    places = run_folders(cfg, folder)
    made = []
    for i, place in enumerate(places):
        own = copy.deepcopy(cfg)
        with flag_override(own, ["struct", "readonly"], [False, False]):
            own.seed, own.module.n_seeds = cfg.seed + i, len(places) - i
        made.append(Seat(own, place, RunFile(place)))
    return made


def run_block(
    cfg: DictConfig, folder: Path, make: Make, *, command: str | None = None
) -> dict[str, Any]:
    """Do the runs of a block that are not done, or go on where an interrupted block stopped.

    Args:
        cfg: A config that `core.validate` found good, with `module.replicas` above 1.
        folder: The folder of its first seed's run; the others lie beside it.
        make: Does a run that these ones read.
        command: The words that make this block, for each run.json.

    Returns:
        Content of the first run's run.json.

    Raises:
        Interrupted: By Ctrl-C or SIGTERM; the same command resumes the block.
        BusyError: Another process is at work on one of the runs.
        ValueError: The device is not there, or a dashboard is wanted.
    """
    if cfg.logger:
        raise ValueError("runs of a block share no dashboard; take logger=none")
    places = seats(cfg, folder)
    with ExitStack() as stack:
        for seat in places:
            stack.enter_context(lifecycle.locked(seat.folder))
        stack.enter_context(interruptible())
        resume = _resume_path(places)
        if cfg.force:
            shutil.rmtree(resume.parent, ignore_errors=True)
            for seat in places:
                lifecycle.clear(seat.folder)
                seat.file = RunFile(seat.folder)
        todo = [seat for seat in places if not seat.is_done]
        if todo:
            stack.enter_context(threadpool_limits(1, user_api="blas"))
            _do(places, todo, resume, make, command)
    return places[0].file.content


def _resume_path(places: list[Seat]) -> Path:
    """Where the block's own files lie: beside its runs, since each of those may end first."""
    first = places[0]
    name = f".block-{first.cfg.seed}-{places[-1].cfg.seed}-{first.folder.name}"
    return first.folder.parents[1] / name / "resume.ckpt"


def _do(
    places: list[Seat], todo: list[Seat], resume: Path, make: Make, command: str | None
) -> None:
    """Open the runs, train them side by side, and say of each how it ended."""
    error: BaseException | None = None
    status: Status = "failed"
    composed = {id(seat): copy.deepcopy(seat.cfg) for seat in todo}
    for seat in todo:
        seat.identity = lifecycle.open_run(seat.cfg, seat.folder, seat.file, command)
    try:
        _train(places, todo, composed, resume, make)
        shutil.rmtree(resume.parent, ignore_errors=True)
    except Interrupted as exception:
        status, error = "interrupted", exception
        raise
    except Exception as exception:
        error = exception
        raise
    finally:
        for seat in todo:
            if seat.file.status == "running":
                seat.file.finish(status, seat.facts, error)


def _train(
    places: list[Seat],
    todo: list[Seat],
    composed: dict[int, DictConfig],
    resume: Path,
    make: Make,
) -> None:
    cfg = todo[0].cfg
    earlier = {
        id(seat): lifecycle.read_first(composed[id(seat)], seat.folder, make) for seat in todo
    }
    device = devices.resolve(cfg.device)
    shared: dict[str, Any] = {"device_resolved": device.name, "device_name": device.model}
    shared |= lifecycle.run_gates(cfg)
    # a run that had not ended at the resume point has a slot, whether or not it ended since
    is_resumed = resume.is_file()
    slots = places if is_resumed else todo
    width, every = cfg.module.replicas, cfg.metrics.checkpoint_every
    L.seed_everything(cfg.seed, verbose=False)
    members: list[Member] = []
    for slot, seat in enumerate(slots):
        seat.task, seat.module = lifecycle.build_all(seat.cfg, device)
        if seat.is_done:
            continue
        seat.facts = dict(shared)
        read = earlier[id(seat)]
        if read:
            seat.facts |= lifecycle.facts_read(read) | seat.module.take(read)
        if not is_resumed:
            seat.facts["effect"] = seat.module.prove_effect()
        seat.file.note(seat.facts)
        seat.facts |= {"engine": "replicas", "width": width, "slot": slot}
        members.append(_member(seat, slot))

    def close(trainer: L.Trainer, member: Member) -> None:
        block.release(member.slot)
        _close(slots[member.slot], member, trainer, width)

    callback = Members(members, close=close, resume_path=resume, every=every)
    trainer = lifecycle.make_trainer(cfg, resume.parent, device, None, [callback])
    block = type(todo[0].module).together(
        [seat.module for seat in slots],
        open_slots=[member.slot for member in members],
        device=device.torch,
    )
    ckpt = resume if is_resumed else None
    trainer.fit(block, ckpt_path=ckpt, weights_only=True)


def _member(seat: Seat, slot: int) -> Member:
    assert seat.identity is not None
    plan = lifecycle.build(seat.cfg.metrics)  # one each: a cadence has a memory
    recorder = Recorder(
        folder=seat.folder,
        identity=seat.identity,
        plan=plan,
        eval_every=seat.cfg.module.eval_every,
    )
    return Member(
        seed=seat.cfg.seed,
        slot=slot,
        module=seat.module,
        recorder=recorder,
        checkpoints=MemberCheckpoints(folder=seat.folder, every=plan.checkpoint_every),
        progress=Progress(identity=seat.identity, recorder=recorder),
    )


def _close(seat: Seat, member: Member, trainer: L.Trainer, width: int) -> None:
    """Test a run that has ended, and close its record."""
    module, recorder = seat.module, member.recorder
    if "test" in seat.cfg.stages:
        with torch.no_grad():
            outputs = module.test_step(seat.task.test.to(module.device), 0)
            recorder.on_test_batch_end(trainer, module, outputs)
            recorder.on_test_end(trainer, module)
    seat.facts |= recorder.close()
    sha256 = member.checkpoints.sha256
    seat.facts["checkpoints"] = {str(step): sha for step, sha in sorted(sha256.items())}
    seat.facts["wall_s_amortised"] = seat.file.elapsed() / width
    status = lifecycle.close_records(seat.folder, seat.file, seat.facts, module)
    seat.file.finish(status, seat.facts, None)
