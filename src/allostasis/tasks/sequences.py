"""A batch of token sequences: what a causal model reads, what it should say next, what counts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor


class Ceiling(NamedTuple):
    """The best that any predictor can reach.

    Attributes:
        accuracy: Share of answers that are right, in [0, 1].
        cross_entropy: Nats an answer, at least 0.
    """

    accuracy: float
    cross_entropy: float


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences with the answer to each position.

    Attributes:
        tokens: What the model reads.
        targets: What it should say next, position by position.
        scored: Positions whose loss is trained on.
        groups: Positions that accuracy is told of, by name.
        headline: The group that the experiment's main numbers are about.
        classes: One class a sequence, at the last position, for variance between and within
            classes; None where the batch is not for that.
        n_classes: How many classes there are.
    """

    tokens: Int64[Tensor, "sequence position"]
    targets: Int64[Tensor, "sequence position"]
    scored: Bool[Tensor, "sequence position"]
    groups: Mapping[str, Bool[Tensor, "sequence position"]] = field(default_factory=dict)
    headline: str = "all"
    classes: Int64[Tensor, " sequence"] | None = None
    n_classes: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """Positions in all sequences together."""
        return self.tokens.numel()

    @cached_property
    def sha256(self) -> str:
        """Hash of tokens and targets, so that two runs can prove that theirs were the same."""
        both = torch.stack((self.tokens, self.targets)).cpu().numpy().astype("<i8")
        return hashlib.sha256(both.tobytes()).hexdigest()

    def to(self, device: torch.device | str) -> Sequences:
        """The same sequences on a device; this very object where they are there already."""
        if self.tokens.device == torch.device(device):
            return self
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            scored=self.scored.to(device),
            groups={name: mask.to(device) for name, mask in self.groups.items()},
            classes=None if self.classes is None else self.classes.to(device),
        )

    def part(self, chosen: slice) -> Sequences:
        """Some of the sequences, in order."""
        return replace(
            self,
            tokens=self.tokens[chosen],
            targets=self.targets[chosen],
            scored=self.scored[chosen],
            groups={name: mask[chosen] for name, mask in self.groups.items()},
            classes=None if self.classes is None else self.classes[chosen],
        )


@runtime_checkable
class SequenceTask(Protocol):
    """What training on sequences asks of a task."""

    seed: int
    """The run's seed."""
    n_classes: int
    """How many answers the scored positions can have, from 0."""

    @property
    def held_out(self) -> Sequences:
        """All sequences that are never trained on."""
        ...

    @property
    def watched(self) -> Sequences:
        """Those of them that are looked at during training."""
        ...

    @property
    def probe(self) -> Sequences:
        """Fixed sequences on which routing is compared from step to step."""
        ...

    @property
    def calibration(self) -> Sequences:
        """Sequences that interventions take their numbers from."""
        ...

    @property
    def class_probe(self) -> Sequences:
        """Sequences in classes by the answer at the last position."""
        ...

    def train_batch(self, step: int) -> Sequences:
        """The batch of an update."""
        ...

    def ceiling(self, sequences: Sequences) -> dict[str, Ceiling]:
        """The best that any predictor can expect on these sequences, by group."""
        ...

    def expected_accuracy(self, sequences: Sequences) -> Float64[Tensor, "sequence position"]:
        """How often the best predictor is right at each position."""
        ...

    def data(self) -> dict[str, Mapping[str, int | str]]:
        """What the run used, for run.json."""
        ...
