"""When what is trained, at which rate, on which losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge

from allostasis.models.hsae_losses import check_stage

Weight = Annotated[float | int, Ge(0)]
LAST = 0.1  # of the learning rate, that a run ends with


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Weights of the losses beside the reconstruction error, whose weight is 1.

    Attributes:
        parents: Of the error of the parents alone.
        aux: Of what dead latents make of the error.
        l1: Of the selected codes; rises from 0 over the first updates.
        ortho: Of the parents' squared cosines.
        causal_ortho: Of the squared cosines of children with their parent.
    """

    parents: Weight = 0.1
    aux: Weight = 1 / 32
    l1: Weight = 0.0
    ortho: Weight = 0.0
    causal_ortho: Weight = 2e-4


@dataclass(frozen=True, kw_only=True)
class StageA:
    """The first stage of an arm that begins with given atoms.

    Attributes:
        steps: Updates.
        freeze: Tensors that keep their bits.
        ortho: Weight of `ortho`, which parents that are frozen cannot follow.
        causal_ortho: Weight of `causal_ortho`.
    """

    steps: Annotated[int, Ge(0)] = 0
    freeze: Sequence[Literal["D", "Pi_up", "Dc"]] = ("D",)
    ortho: Weight = 0.0
    causal_ortho: Weight = 2e-4


class Stage(NamedTuple):
    """Some updates in a row.

    Attributes:
        name: `A` or `B`.
        begin: The first update.
        end: The update that is no more of it.
        frozen: Tensors that keep their bits.
        weights: Of the losses; those at 0 are not computed.
    """

    name: str
    begin: int
    end: int
    frozen: frozenset[str]
    weights: dict[str, float]

    @property
    def enabled(self) -> frozenset[str]:
        """Losses that are trained on."""
        return frozenset(name for name, weight in self.weights.items() if weight > 0)


def stages(losses: Losses, stage_a: StageA | None, *, max_steps: int) -> tuple[Stage, ...]:
    """The stages of a run; without an A, all of it is B.

    Raises:
        ConfigError: A stage enables a loss that can move nothing.
    """
    own = {"mse": 1.0, **vars(losses)}
    begin = 0 if stage_a is None else min(stage_a.steps, max_steps)
    found = [Stage("B", begin, max_steps, frozenset(), own)]
    if stage_a is not None and begin:
        weights = own | {"ortho": stage_a.ortho, "causal_ortho": stage_a.causal_ortho}
        found.insert(0, Stage("A", 0, begin, frozenset(stage_a.freeze), weights))
    for stage in found:
        check_stage(stage.name, stage.weights, stage.frozen)
    return tuple(found)


def rate(update: int, *, warmup_steps: int, max_steps: int) -> float:
    """Share of the learning rate: a linear rise, then a cosine down to a tenth.

    Example:
        >>> [round(rate(update, warmup_steps=2, max_steps=10), 3) for update in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.55, 0.1]
    """
    if update < warmup_steps:
        return (update + 1) / warmup_steps
    done = (update - warmup_steps) / max(1, max_steps - warmup_steps)
    return LAST + (1 - LAST) * (1 + math.cos(math.pi * done)) / 2
