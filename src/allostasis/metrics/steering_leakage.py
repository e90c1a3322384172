"""Steering leakage: what a steering vector does to the tokens that it is not for."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, given, precise


def steering_leakage(
    before: Float[Tensor, "context vocab"],
    after: Float[Tensor, "context vocab"],
    targets: Bool[Tensor, " vocab"],
) -> Float[Tensor, " context"]:
    """KL(before || after) over the tokens that are no targets, renormalised.

    Args:
        before: Logits without steering.
        after: Logits with it.
        targets: The tokens that it is for.

    Returns:
        Nats, in [0, inf). 0: the others keep their share of what is left to them; better low, at
        equal gain of the targets only.

    Source:
        PH, at matched gain and with a direction that is stated.

    Example:
        >>> before, after = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 0.0]])
        >>> steering_leakage(before, after, torch.tensor([True, False, False]))
        tensor([0.], dtype=torch.float64)
    """
    log_p, log_q = (precise(logits)[:, ~targets].log_softmax(dim=-1) for logits in (before, after))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp(min=0)


class SteeringLeakage(Metric):
    """Steering leakage, its mean over contexts.

    Parts:
        logit_share: Mean absolute change of the control tokens' logits over the mean change of the
            targets', logits centred over the vocabulary; from sums over contexts.
        gain: Mean change of the targets' log-probability, in nats.
    """

    symbol = "other"
    unit = "nat"
    needs = ("logits", "clean_logits", "targets")
    parts = ("logit_share", "gain")
    part_units = {"logit_share": "1"}
    scale_law = {"logit_shift": "invariant"}
    direction = "0: the other tokens keep their shares"
    source = "PH"

    def update(self, snapshot: Snapshot) -> None:
        """Add a snapshot's contexts."""
        before = precise(given(snapshot.clean_logits, "clean_logits"))
        after = precise(given(snapshot.logits, "logits"))
        targets = given(snapshot.targets, "targets")
        self.add(steering_leakage(before, after, targets).mean(), n=len(before))
        gain = (after.log_softmax(-1) - before.log_softmax(-1))[:, targets].mean()
        self.add(gain, n=len(before), part="gain")
        if snapshot.controls is not None:
            change = after - before
            change = change - change.mean(dim=-1, keepdim=True)
            own = change[:, targets].mean(dim=1).sum()
            others = change[:, snapshot.controls].abs().mean(dim=1).sum()
            self.accumulate(
                "changes", torch.stack([others, own, torch.full_like(own, len(before))])
            )

    def means(self) -> dict[Place, Mean]:
        """Add the share, from the sums of all processes."""
        found = super().means()
        for _, (others, own, n) in self.kept("changes"):
            is_raised = own.abs() > 0
            share = others / torch.where(is_raised, own, torch.ones_like(own))
            found[Place("logit_share")] = Mean(
                share, (n * is_raised).long(), "the targets' logits did not move"
            )
        return found
