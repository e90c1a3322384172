"""Several runs of one arm as one LightningModule: their updates are done side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from allostasis.engines.replicas import Block, Replica
from allostasis.experiments.grokking.module import Grokking, Shared
from allostasis.models.modular_step import Parameters
from allostasis.tasks.modular_addition import FullBatch


class ReplicaBlock(L.LightningModule):
    """Runs that differ in their seed alone, trained in the slots of one block.

    Each run keeps its own module, whose parameters and gradients are the block's memory; what it
    records, when, and where it ends is its own affair. A run that has ended goes on stepping in the
    block, where nobody looks at it any more.

    Args:
        members: The runs' modules, on `device`, in the order of slots.
        open_slots: Slots whose run has not ended.
        device: Where.
    """

    def __init__(
        self, members: Sequence[Grokking], *, open_slots: Sequence[int], device: torch.device
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        first = members[0]
        self.members, self.updates = list(members), 0
        self.open = {slot: members[slot] for slot in open_slots}
        self.engine = Block(
            [_replica(member) for member in members],
            width=first.replicas,
            rule=first.rule,
            loss=first.objective.loss,
            op=first.task.op,
            sphere=first.model.sphere,
            is_uniform=first.model.uniform_attention,
            device=device,
            is_captured=device.type == "cuda" and first.cuda_graph,
        )
        self._grid: Tensor | None = None
        self._accuracies: list[float] | None = None
        probes = [member.task.probe.to(device) for member in members]
        self._asked = torch.stack([probe.a * probe.p + probe.b for probe in probes])
        self._answers = torch.stack([probe.answer for probe in probes])
        for slot, member in self.open.items():
            self._bind(slot, member)

    def _bind(self, slot: int, member: Grokking) -> None:
        """Make the block's memory the parameters of a run's model."""
        for name, values in self.engine.parameters._asdict().items():
            getattr(member.model, name).data = values[slot]
        member.shared = Shared(
            grid_logits=lambda: self.grid_logits()[slot],
            probe_accuracy=lambda: self.probe_accuracies()[slot],
        )

    def release(self, slot: int) -> None:
        """Give a run that has ended its own copy of its weights."""
        member = self.open.pop(slot)
        for parameter in member.model.parameters():
            parameter.data = parameter.detach().clone()
            parameter.grad = None
        member.shared = None

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do the next chunk of updates of all runs."""
        del batch, batch_idx
        first, engine = self.members[0], self.engine
        before = engine.layout.views(engine.theta.clone())
        n_updates = min(first.chunk, first.max_steps - self.updates)
        engine.advance(n_updates)
        self.updates += n_updates
        self._grid = self._accuracies = None
        grads = engine.layout.views(engine.grad)
        for slot, member in self.open.items():
            member.advanced(
                self.updates, before={name: v[slot] for name, v in before._asdict().items()}
            )
            for name, values in grads._asdict().items():
                getattr(member.model, name).grad = values[slot]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Stop once every run has ended; runs after all callbacks."""
        self.trainer.should_stop = not self.open

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None of Lightning's: the block updates its own memory."""
        return []

    def train_dataloader(self) -> FullBatch:
        """Batches without end; each run's pairs lie in the block."""
        return FullBatch(self.members[0].task.train, times=None)

    # ------------------------------------------------------------------ looking

    def grid_logits(self) -> Tensor:
        """Every run's logits at '=' of every pair, worked out once a chunk."""
        if self._grid is None:
            self._grid = self.engine.grid_logits()
        return self._grid

    def probe_accuracies(self) -> list[float]:
        """Every run's accuracy on its own probe."""
        if self._accuracies is None:
            grid = self.grid_logits().flatten(1, 2).argmax(dim=-1)[: len(self.members)]
            hits = grid.gather(1, self._asked) == self._answers
            self._accuracies = hits.double().mean(dim=1).tolist()
        return self._accuracies

    # ------------------------------------------------------------------ survival

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the block's memory."""
        checkpoint["block"] = {"updates": self.updates, "engine": self.engine.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up where `on_save_checkpoint` left off."""
        self.updates = checkpoint["block"]["updates"]
        self.engine.load_state_dict(checkpoint["block"]["engine"])


def _replica(member: Grokking) -> Replica:
    model = member.model
    return Replica(
        theta=Parameters(*(getattr(model, name).detach() for name in Parameters._fields)),
        train=member.task.train,
        lr=member.lr,
        weight_decay=member.weight_decay,
        temperature=member.objective.temperature,
        norm=member.norm,
    )
