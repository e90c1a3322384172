"""Instrument gates: exact statements that the measurements must meet before they are believed.

The numbers are those of the specification of observables. Each gate takes what it tests as an
argument, so that a test can hand it a broken one and see it fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from scipy.spatial.distance import jensenshannon
from torch import Tensor
from torch.nn import functional

from allostasis.core.spaces import LayerWeights, Weights
from allostasis.metrics.accuracy import accuracy
from allostasis.metrics.alignment import alignment
from allostasis.metrics.base import GAUGES, Metric, Reading, Snapshot, discover
from allostasis.metrics.calibration import Calibration
from allostasis.metrics.cross_entropy import cross_entropy, log_probabilities
from allostasis.metrics.dprime import dprime
from allostasis.metrics.logit_scale import logit_scale
from allostasis.metrics.margin import margin
from allostasis.metrics.residual_variance import residual_variance
from allostasis.metrics.routing_drift import jensen_shannon
from allostasis.models.modular_transformer import ModularTransformer

VISIBLE = 1e-3  # a law that says "changes" is blind below this relative change
SCALE = 2.0  # the factor c of every law of scale

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class GateResult:
    """What a gate found.

    Attributes:
        name: The gate's number and statement.
        worst: Largest deviation from the statement.
        tolerance: Largest deviation that is round-off.
    """

    name: str
    worst: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the statement holds."""
        return self.worst <= self.tolerance


def run_gates() -> list[GateResult]:
    """Pass every gate on this machine's CPU, in float64, in seconds.

    Example:
        >>> all(result.passed for result in run_gates())
        True
    """
    return [
        log_identity(),
        inertness(),
        linear_readout(),
        gauges(),
        variance_split(),
        dprime_split(),
        causality(),
        divergence(),
        self_label(),
        batch_independence(),
        device_reduction(),
    ]


# What a gate is tried on


def specimen() -> ModularTransformer:
    """A small random model without norms whose every parameter, biases too, is not 0."""
    model = ModularTransformer(seed=0, p=7, d_model=24, n_heads=2, d_mlp=32).double()
    generator = _generator(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise
    return model


def observe(model: ModularTransformer, *, earlier: ModularTransformer) -> Snapshot:
    """Everything that any metric may ask of a model, on every pair twice in random order."""
    p = model.p
    grid = torch.cartesian_prod(torch.arange(p), torch.arange(p)).repeat(2, 1)
    pairs = grid[torch.randperm(len(grid), generator=_generator(2))]
    tokens = torch.cat([pairs, torch.full((len(pairs), 1), p)], dim=1)
    with torch.no_grad():
        (logits, acts), (_, past) = (m.run_with_cache(tokens) for m in (model, earlier))
    answers = pairs.sum(dim=1) % p
    return Snapshot(
        step=500,
        logits=logits[:, 2],
        labels=answers,
        classes=answers,
        n_classes=p,
        acts=dict(acts),
        earlier=dict(past),
        initial=dict(past),
        weights=model.weights(),
        before=dict(earlier.named_parameters()),
        grads={name: torch.sin(tensor) for name, tensor in earlier.named_parameters()},
        grid_logits=model.grid_logits()[..., :p],
        train_pairs=torch.rand(p, p, generator=_generator(3)) < 0.5,
        key_frequencies=(1, 3),
        readout=2,
        ceiling={"": 1.0},
        floor=0.0,
    )


def perturbed(model: ModularTransformer) -> ModularTransformer:
    """A model close by, to stand for the same one earlier."""
    twin, generator = deepcopy(model), _generator(4)
    for parameter in twin.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.1 * noise
    return twin


def halves(snapshot: Snapshot) -> tuple[Snapshot, Snapshot]:
    """The first and the second half of a snapshot's examples."""
    assert snapshot.labels is not None
    middle = len(snapshot.labels) // 2
    return _examples(snapshot, slice(middle)), _examples(snapshot, slice(middle, None))


def _examples(snapshot: Snapshot, chosen: slice) -> Snapshot:
    rows = {name: getattr(snapshot, name) for name in ("logits", "labels", "classes")}
    acts = {name: getattr(snapshot, name) for name in ("acts", "earlier", "initial")}
    return replace(
        snapshot,
        **{name: None if value is None else value[chosen] for name, value in rows.items()},
        **{
            name: {hook: value[chosen] for hook, value in hooks.items()}
            for name, hooks in acts.items()
        },
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)
