"""Cross-entropy recovered: what a model still predicts when an autoencoder stands in its stream."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, given, precise

SMALLEST = 0.01  # nats that a replacement must cost, so that a share of them is one
KINDS = ("clean", "sae", "zero", "mean")


def ce_recovered(
    sae: Float[Tensor, ""], clean: Float[Tensor, ""], floor: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Share of the loss of a replacement that the reconstruction avoids.

    (CE_floor - CE_sae) / (CE_floor - CE_clean)

    Args:
        sae: Mean cross-entropy with the reconstruction, in nats.
        clean: With the activations themselves.
        floor: With 0, or with their mean, in their place.

    Returns:
        In (-inf, 1]. 1: nothing is lost; 0: as bad as the replacement. Above 1 where the
        reconstruction predicts better.

    Source:
        Karvonen et al. (2025), SAEBench, arXiv:2503.09532.

    Example:
        >>> ce_recovered(torch.tensor(4.0), torch.tensor(3.0), torch.tensor(8.0))
        tensor(0.8000)
    """
    return (floor - sae) / (floor - clean)


class CeRecovered(Metric):
    """Cross-entropy recovered, from means over all tokens.

    Parts:
        mean: The same with the mean of the activations as the floor.
        lost: 1 - the main value.
    """

    symbol = "other"
    unit = "1"
    needs = ("token_losses",)
    parts = ("mean", "lost")
    scale_law = {"logit_shift": "invariant"}
    direction = "1: nothing is lost; 0: as bad as the replacement"
    source = "Karvonen et al. (2025), SAEBench, arXiv:2503.09532"

    def update(self, snapshot: Snapshot) -> None:
        """Add the losses of a snapshot's tokens."""
        losses = snapshot.token_losses
        kept = [precise(given(losses.get(kind), f"token_losses[{kind!r}]")) for kind in KINDS]
        sums = [loss.sum() for loss in kept]
        self.accumulate("losses", torch.stack([*sums, torch.full_like(sums[0], len(kept[0]))]))

    def means(self) -> dict[Place, Mean]:
        """Give the shares, from the sums of all processes."""
        found: dict[Place, Mean] = {}
        for _, sums in self.kept("losses"):
            clean, sae, zero, mean = sums[:-1] / sums[-1].clamp(min=1)
            for part, floor in (("", zero), ("mean", mean)):
                cost = floor - clean
                n = torch.where(cost > SMALLEST, sums[-1], torch.zeros_like(cost)).long()
                share = ce_recovered(sae, torch.where(n > 0, clean, floor - 1), floor)
                why = f"the replacement costs no more than {SMALLEST} nats"
                found[Place(part)] = Mean(share, n, why)
                if not part:
                    found[Place("lost")] = Mean(1 - share, n, why)
        return found
