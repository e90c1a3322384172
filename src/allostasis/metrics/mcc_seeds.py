"""Mean correlation between seeds: whether autoencoders of two seeds find the same directions."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given
from allostasis.metrics.mcc_truth import mcc_truth


def mcc_seeds(
    decoder: Float[Tensor, "latent d"], other: Float[Tensor, "other d"]
) -> Float[Tensor, " used"]:
    """Absolute cosines of two decoders' latents under the best one-to-one assignment.

    Args:
        decoder: Directions that latents write.
        other: The same of another seed; as many are compared as the smaller one has.

    Returns:
        One a pair, in [0, 1]. 1: the same direction in both.

    Source:
        Paulo & Belrose (2025), Sparse Autoencoders Trained on the Same Data, arXiv:2501.16615.

    Example:
        >>> mcc_seeds(torch.eye(2), torch.eye(2).flip(0)).tolist()
        [1.0, 1.0]
    """
    return mcc_truth(decoder, other)


class MccSeeds(Metric):
    """Mean absolute cosine of latents assigned one-to-one, over the other seeds' decoders.

    A run knows no other seed, so that none records it: the report of `hsae_train` gives it for runs
    that have kept their decoders.

    Parts:
        null: The same for as many random directions in place of the others'.
    """

    symbol = "other"
    unit = "1"
    needs = ("decoder", "other_decoders")
    parts = ("null",)
    scale_law = {"resid": "invariant"}
    direction = "1: both seeds found the same directions"
    source = "Paulo & Belrose (2025)"

    def update(self, snapshot: Snapshot) -> None:
        """Add a snapshot's decoder against each of the others."""
        decoder = given(snapshot.decoder, "decoder")
        for place, other in enumerate(snapshot.other_decoders):
            found = mcc_seeds(decoder, other)
            self.add(found.mean(), n=len(found))
            noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(place))
            null = mcc_seeds(decoder, noise.to(decoder.device))
            self.add(null.mean(), n=len(null), part="null")
