"""Weights at a run's milestones, and the point from which an interrupted run goes on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Protocol

import lightning as L
from annotated_types import Gt
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import Tensor

from allostasis.core.records import write_atomically

RESUME = "resume.ckpt"
"""Name of the resume point in a run's checkpoints/."""


class Milestones(Protocol):
    """What a LightningModule offers so that its milestones are kept."""

    updates: int
    """Optimiser updates done."""
    is_finished: bool
    """Whether no further update is wanted."""

    def milestones(self) -> dict[int, dict[str, Tensor]]:
        """Weights to keep, by step, that were not handed out before."""
        ...


class Checkpoints(Callback):
    """Keeps weights as `checkpoints/<step>.safetensors` and a resume point as `resume.ckpt`.

    Weights are kept at step 0, every `every` steps, at the module's milestones and at the end.
    `resume.ckpt` holds the last regular one with the optimiser, all callbacks' state and the
    module's own; it is removed once a run is done.

    Args:
        folder: The run's folder.
        every: Steps between regular checkpoints.
    """

    def __init__(self, *, folder: Path, every: Annotated[int, Gt(0)]) -> None:
        self.folder, self.every = folder / "checkpoints", every
        self.sha256: dict[int, str] = {}
        self._saved_at = -1

    @property
    def resume_path(self) -> Path:
        """Where the resume point lies, if there is one."""
        return self.folder / RESUME

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Keep the weights before the first update."""
        # a run that goes on from step 0 has kept them, and would overwrite its first rows
        if pl_module.updates == 0 and self._saved_at < 0:
            self._keep(0, pl_module.model.state_dict())
            self._save(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, *_: object, **__: object
    ) -> None:
        """Keep what is due. Runs after the Recorder, whose rows the resume point counts on."""
        for step, weights in pl_module.milestones().items():
            self._keep(step, weights)
        if pl_module.is_finished or pl_module.updates - self._saved_at >= self.every:
            self._keep(pl_module.updates, pl_module.model.state_dict())
            self._save(trainer, pl_module)

    def _keep(self, step: int, weights: dict[str, Tensor]) -> None:
        path = self.folder / f"{step}.safetensors"
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        write_atomically(path, lambda file: save_file(tensors, file))
        self.sha256[step] = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()

    def _save(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._saved_at = pl_module.updates
        write_atomically(self.resume_path, lambda file: trainer.save_checkpoint(file))

    def state_dict(self) -> dict[str, Any]:
        """The hashes noted so far and when the last regular checkpoint was."""
        return {"sha256": dict(self.sha256), "saved_at": self._saved_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        self.sha256, self._saved_at = dict(state_dict["sha256"]), state_dict["saved_at"]
