"""What sets the arms of `grokking` apart: their constants, references and proof of effect."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from safetensors.torch import load_file
from torch import Tensor

from allostasis.core.records import RunRecord
from allostasis.engines.optimisers import RowOptimiser, Rule
from allostasis.metrics.weight_norm import weight_norm
from allostasis.models.modular_step import PLAIN, Objective, Parameters
from allostasis.models.modular_transformer import ModularTransformer
from allostasis.tasks.modular_pairs import Pairs

REFERENCE = "high_wd"
"""The arm whose norm at t_grok is the unit of `norm_clamp`."""
GROKFAST = 2.0  # gain of the slow part of the gradient, as published
PROVEN_OVER = 3  # updates: under Adam, a gradient's scale shows from the second on


def norm_at_grok(record: RunRecord) -> float:
    """The norm of all parameters that a finished run had at its t_grok.

    Raises:
        ValueError: The run did not grok, so that there is no such norm.
        FileNotFoundError: The run's record keeps no weights.
    """
    step = record.run["summary"]["t_grok"]
    if step is None:
        raise ValueError(
            f"{record.run['run_id']} did not grok within {record.run['summary']['steps']} updates: "
            "it has no norm to hold; give it more with module.max_steps"
        )
    path = record.folder / "checkpoints" / f"{step}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; repeat that run with force=true")
    return float(weight_norm(load_file(path).values()))


@dataclass(frozen=True)
class Setting:
    """One way to train: the rule, what a pair costs, rate, decay, and the norm that is held."""

    rule: Rule
    objective: Objective
    lr: float
    weight_decay: float
    norm: float | None

    def after(self, model: ModularTransformer, train: Pairs) -> tuple[list[Tensor], float]:
        """Parameters of a copy of a model after some updates, and the first gradient's norm."""
        twin, first = copy.deepcopy(model), 0.0
        optimiser = RowOptimiser(
            [getattr(twin, name) for name in Parameters._fields],
            self.rule,
            lr=self.lr,
            weight_decay=self.weight_decay,
            norm=self.norm,
        )
        for step in range(PROVEN_OVER):
            optimiser.zero_grad()
            twin.loss(train, objective=self.objective).backward()
            if step == 0:
                first = float(weight_norm(p.grad for p in twin.parameters() if p.grad is not None))
            optimiser.step()
        return [parameter.detach() for parameter in twin.parameters()], first


def prove(own: Setting, model: ModularTransformer, train: Pairs) -> dict[str, float]:
    """See `Grokking.prove_effect`."""
    plain = Rule(betas=own.rule.betas, warmup_steps=own.rule.warmup_steps)
    twins = {
        "weight_decay_change": replace(own, weight_decay=0.0),
        "treatment_change": replace(own, rule=plain, objective=PLAIN, norm=None),
    }
    ends, norm = own.after(model, train)
    if norm <= 1e-8:
        raise RuntimeError(f"the loss has a gradient of norm {norm:.1e} at step 0; it cannot train")
    found = {"gradient_norm": norm}
    for name, twin in twins.items():
        untreated = copy.deepcopy(model)
        if name == "treatment_change":
            untreated.sphere = untreated.uniform_attention = False
        other, _ = twin.after(untreated, train)
        found[name] = max(float((a - b).abs().max()) for a, b in zip(ends, other, strict=True))
    if own.weight_decay and found["weight_decay_change"] <= 0:
        raise RuntimeError(f"weight_decay={own.weight_decay} changes no parameter; it is inert")
    is_treated = (
        own.rule != plain or own.objective != PLAIN or own.norm is not None or not model.is_plain
    )
    if is_treated and found["treatment_change"] <= 0:
        raise RuntimeError("the arm's updates are those of plain AdamW; its treatment is inert")
    return found
