"""What sets the arms of `grokking` apart: their constants, references and proof of effect."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from allostasis.core.records import RunRecord
from allostasis.engines.optimisers import RowOptimiser, Rule
from allostasis.metrics.weight_norm import weight_norm
from allostasis.models.modular_step import PLAIN, Objective, Parameters
from allostasis.models.modular_transformer import ModularTransformer

if TYPE_CHECKING:
    from allostasis.experiments.grokking.module import Grokking

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


def prove(module: Grokking) -> dict[str, float]:
    """See `Grokking.prove_effect`."""
    own = Setting(module.rule, module.objective, module.weight_decay, module.norm)
    plain = Rule(betas=module.rule.betas, warmup_steps=module.rule.warmup_steps)
    twins = {
        "weight_decay_change": Setting(module.rule, module.objective, 0.0, module.norm),
        "treatment_change": Setting(plain, PLAIN, module.weight_decay, None),
    }
    ends, norm = own.after(module, module.model)
    if norm <= 1e-8:
        raise RuntimeError(f"the loss has a gradient of norm {norm:.1e} at step 0; it cannot train")
    found = {"gradient_norm": norm}
    for name, twin in twins.items():
        model = copy.deepcopy(module.model)
        if name == "treatment_change":
            model.sphere = model.uniform_attention = False
        other, _ = twin.after(module, model)
        found[name] = max(float((a - b).abs().max()) for a, b in zip(ends, other, strict=True))
    if module.weight_decay and found["weight_decay_change"] <= 0:
        raise RuntimeError(f"weight_decay={module.weight_decay} changes no parameter; it is inert")
    is_treated = (
        module.rule != plain
        or module.objective != PLAIN
        or module.norm is not None
        or not module.model.is_plain
    )
    if is_treated and found["treatment_change"] <= 0:
        raise RuntimeError("the arm's updates are those of plain AdamW; its treatment is inert")
    return found


class Setting:
    """One way to train: the rule, what a pair costs, the decay, and the norm that is held."""

    def __init__(
        self, rule: Rule, objective: Objective, weight_decay: float, norm: float | None
    ) -> None:
        self.rule, self.objective = rule, objective
        self.weight_decay, self.norm = weight_decay, norm

    def after(self, module: Grokking, model: ModularTransformer) -> tuple[list[Tensor], float]:
        """Parameters of a copy of a model after some updates, and the first gradient's norm."""
        twin, first = copy.deepcopy(model), 0.0
        optimiser = RowOptimiser(
            [getattr(twin, name) for name in Parameters._fields],
            self.rule,
            lr=module.lr,
            weight_decay=self.weight_decay,
            norm=self.norm,
        )
        train = module.task.train.to(module.device)
        for step in range(PROVEN_OVER):
            optimiser.zero_grad()
            twin.loss(train, objective=self.objective).backward()
            if step == 0:
                first = float(weight_norm(p.grad for p in twin.parameters() if p.grad is not None))
            optimiser.step()
        return [parameter.detach() for parameter in twin.parameters()], first
