"""Modular addition as sequences of three tokens: the second task of experiments on toy models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal

import lightning as L
import torch
from annotated_types import Gt, Lt
from jaxtyping import Float64
from torch import Tensor

from allostasis.core.seeding import derive
from allostasis.tasks.interleaved_patterns import Steps
from allostasis.tasks.modular_addition import ModularAddition, Pairs
from allostasis.tasks.sequences import Ceiling, Sequences

WATCHED = 512


class ModularSequences(L.LightningDataModule):
    """Every question 'a op b =', answered at '=' only; classes are the answers.

    Args:
        seed: The run's seed.
        p: The modulus. Tokens 0 to p - 1 are numbers, p is '='.
        vocab_size: p + 1, for the model's sake.
        seq_len: 3, likewise.
        train_frac: Share of the pairs that are trained on.
        op: `add` or `subtract`.
        batch_size: Pairs of a training batch; null: all of them.
        probe_size: Held-out pairs that routing is compared on from step to step.

    Raises:
        ValueError: vocab_size or seq_len do not fit, or a batch is larger than the training set.
    """

    def __init__(
        self,
        *,
        seed: int,
        p: Annotated[int, Gt(2)] = 113,
        vocab_size: int = 114,
        seq_len: int = 3,
        train_frac: Annotated[float, Gt(0), Lt(1)] = 0.6,
        op: Literal["add", "subtract"] = "add",
        batch_size: Annotated[int, Gt(0)] | None = None,
        probe_size: Annotated[int, Gt(1)] = 64,
    ) -> None:
        super().__init__()
        if (vocab_size, seq_len) != (p + 1, 3):
            raise ValueError(
                f"vocab_size={vocab_size} and seq_len={seq_len}: 'a {op} b =' has p + 1 = {p + 1} "
                "tokens and 3 positions"
            )
        self.seed, self.n_classes, self.batch_size = seed, p, batch_size
        self.pairs = ModularAddition(
            seed=seed, p=p, train_frac=train_frac, probe_size=probe_size, op=op
        )
        if batch_size is not None and batch_size > len(self.pairs.train):
            raise ValueError(
                f"batch_size={batch_size} is more than the {len(self.pairs.train)} training pairs"
            )
        self._everything = self._sequences(self.pairs.train)

    def _sequences(self, pairs: Pairs) -> Sequences:
        scored = torch.zeros(len(pairs), 3, dtype=torch.bool)
        scored[:, -1] = True
        targets = torch.zeros(len(pairs), 3, dtype=torch.int64)
        targets[:, -1] = pairs.answer
        return Sequences(
            tokens=pairs.tokens, targets=targets, scored=scored, groups={"all": scored},
            classes=pairs.answer, n_classes=self.n_classes,
        )  # fmt: skip

    def train_batch(self, step: int) -> Sequences:
        """All training pairs, or those that the update's own generator draws."""
        if self.batch_size is None:
            return self._everything
        generator = torch.Generator().manual_seed(derive(self.seed, "order") + step)
        drawn = torch.randperm(len(self._everything), generator=generator)[: self.batch_size]
        pairs = self.pairs.train
        chosen = Pairs(a=pairs.a[drawn], b=pairs.b[drawn], answer=pairs.answer[drawn], p=pairs.p)
        return self._sequences(chosen)

    @cached_property
    def held_out(self) -> Sequences:
        """All pairs that are never trained on."""
        return self._sequences(self.pairs.test)

    @cached_property
    def watched(self) -> Sequences:
        """Every k-th of them, about 512 in all."""
        every = -(-len(self.held_out) // WATCHED)
        return self.held_out.part(slice(None, None, every))

    @cached_property
    def probe(self) -> Sequences:
        """Held-out pairs in random order."""
        return self._sequences(self.pairs.probe)

    @property
    def calibration(self) -> Sequences:
        """The training pairs, which no result is read on."""
        return self._everything

    @property
    def class_probe(self) -> Sequences:
        """All held-out pairs, in classes by their answer."""
        return self.held_out

    def train_dataloader(self) -> Steps:
        """Steps without end: the module counts its updates and asks for their batches."""
        return Steps(None)

    def test_dataloader(self) -> Steps:
        """One step."""
        return Steps(1)

    def ceiling(self, sequences: Sequences) -> dict[str, Ceiling]:
        """Every answer follows from a and b: accuracy 1, cross-entropy 0 nats."""
        return dict.fromkeys(sequences.groups, Ceiling(accuracy=1.0, cross_entropy=0.0))

    def expected_accuracy(self, sequences: Sequences) -> Float64[Tensor, "sequence position"]:
        """1 everywhere."""
        return torch.ones(sequences.tokens.shape, dtype=torch.float64)

    def data(self) -> dict[str, Mapping[str, int | str]]:
        """What the run used, for run.json."""
        sets = {"train": self.pairs.train, "test": self.pairs.test, "probe": self.pairs.probe}
        return {name: {"n": len(pairs), "sha256": pairs.sha256} for name, pairs in sets.items()}
