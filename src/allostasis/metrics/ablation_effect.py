"""Ablation effect (Psi): by how much the loss falls when a head is taken away."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise


def ablation_effect(
    losses: Float[Tensor, " sequence"], ablated: Float[Tensor, "*head sequence"]
) -> Float[Tensor, "*head sequence"]:
    """Fall of the loss of each sequence, head by head.

    loss clean - loss ablated

    Args:
        losses: Mean loss of each sequence with every head in place.
        ablated: The same with one head replaced.

    Returns:
        Nats a token, any real number. Positive: the model is better without the head, which is then
        a suppressor; negative: the head helps.

    Source:
        McDougall et al. (2023), Copy Suppression: Understanding an Attention Head, arXiv:2310.04625

    Example:
        >>> import torch
        >>> ablation_effect(torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 2.5]]))
        tensor([[ 0.5000, -0.5000]])
    """
    return losses - ablated


class AblationEffect(Metric):
    """Mean over sequences of the fall of the loss, head by head.

    Parts:
        p: One-sided p of "the head's effect is at most 0", by flipping signs of sequences; given by
            whoever scans all heads, never by a snapshot.
        q: The same, adjusted by Benjamini and Hochberg over all heads.
    """

    symbol = "Psi"
    unit = "nat"
    needs = ("ablated_losses",)
    axes = ("layer", "head")
    parts = ("p", "q")
    part_units = {"p": "1", "q": "1"}
    scale_law = invariant("vo", "qk", "relu", "stream", "rotation")
    direction = "positive: the model is better without the head; negative: the head helps"
    source = "McDougall et al. (2023), Copy Suppression: Understanding an Attention Head"

    def update(self, snapshot: Snapshot) -> None:
        """Add the sequences of a snapshot."""
        losses = precise(given(snapshot.losses, "losses"))
        ablated = precise(given(snapshot.ablated_losses, "ablated_losses"))
        effect = ablation_effect(losses, ablated)
        self.add(effect.mean(dim=-1), n=len(losses), over=("layer", "head"))
