"""Runs that are trained side by side, each with records and checkpoints of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from allostasis.callbacks.checkpoints import Checkpoints
from allostasis.callbacks.progress import Progress
from allostasis.callbacks.recorder import Recorder
from allostasis.core.records import write_atomically


class MemberCheckpoints(Checkpoints):
    """Weights of one run of a block; the resume point is the block's."""

    def _save(self, trainer: L.Trainer, pl_module: Any) -> None:
        del trainer
        self._saved_at = pl_module.updates


@dataclass
class Member:
    """One run of a block.

    Attributes:
        seed: Its seed.
        slot: Its place in the block.
        module: Its own module.
        recorder: Writes its records.
        checkpoints: Keeps its weights.
        progress: Says where it stands.
    """

    seed: int
    slot: int
    module: Any
    recorder: Recorder
    checkpoints: MemberCheckpoints
    progress: Progress

    @property
    def watchers(self) -> tuple[Callback, ...]:
        """What looks at it, in the order in which it does."""
        return self.recorder, self.checkpoints, self.progress

    def state(self, trainer: L.Trainer) -> dict[str, Any]:
        """What decides the rest of the run beside the block's memory."""
        state: dict[str, Any] = {"checkpoints": self.checkpoints.state_dict()}
        self.recorder.on_save_checkpoint(trainer, self.module, state)
        self.module.on_save_checkpoint(state)
        return state

    def resume(self, trainer: L.Trainer, state: dict[str, Any]) -> None:
        """Take up where `state` left off."""
        self.checkpoints.load_state_dict(state["checkpoints"])
        self.recorder.on_load_checkpoint(trainer, self.module, state)
        self.module.on_load_checkpoint(state)


class Members(Callback):
    """Calls what looks at each run of a block, closes runs as they end, keeps the resume point.

    Args:
        members: The runs that have not ended.
        close: Called with a run that has ended.
        resume_path: Where the block's resume point lies.
        every: Updates between resume points.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        close: Callable[[L.Trainer, Member], None],
        resume_path: Path,
        every: int,
    ) -> None:
        self.open, self.close = list(members), close
        self.resume_path, self.every = resume_path, every
        self._saved_at = -1

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Let each run choose its metrics."""
        del pl_module
        for member in self.open:
            member.recorder.setup(trainer, member.module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Look at each run as it begins."""
        for member in self.open:
            for watcher in member.watchers:
                watcher.on_train_start(trainer, member.module)
        self._close_ended(trainer)
        trainer.should_stop = not self.open
        if pl_module.updates == 0:
            self._save(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object
    ) -> None:
        """Look at each run; close those that have ended."""
        for member in self.open:
            for watcher in member.watchers:
                watcher.on_train_batch_end(trainer, member.module, None, None, 0)
        self._close_ended(trainer)
        if self.open and pl_module.updates - self._saved_at >= self.every:
            self._save(trainer, pl_module)

    def _close_ended(self, trainer: L.Trainer) -> None:
        for member in [member for member in self.open if member.module.is_finished]:
            self.open.remove(member)
            self.close(trainer, member)

    def _save(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._saved_at = pl_module.updates
        write_atomically(self.resume_path, lambda file: trainer.save_checkpoint(file))

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Add what each run needs to go on."""
        del pl_module
        checkpoint["members"] = {member.seed: member.state(trainer) for member in self.open}
        checkpoint["saved_at"] = self._saved_at

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Take up the runs that have not ended since."""
        del pl_module
        self._saved_at = checkpoint["saved_at"]
        for member in self.open:
            member.resume(trainer, checkpoint["members"][member.seed])
