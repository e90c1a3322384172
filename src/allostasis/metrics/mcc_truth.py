"""Mean correlation with the truth: how near an autoencoder's directions are to planted ones."""

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, precise


def mcc_truth(
    decoder: Float[Tensor, "latent d"], truth: Float[Tensor, "concept d"]
) -> Float[Tensor, " used"]:
    """Absolute cosines of the one-to-one assignment that makes their sum largest.

    Args:
        decoder: Directions that latents write; of any length.
        truth: Directions that were planted.

    Returns:
        One for each concept, or each latent where they are fewer, in [0, 1]. 1: found.

    Source:
        Sharkey et al. (2022), Taking features out of superposition with sparse autoencoders.

    Example:
        >>> mcc_truth(torch.eye(3)[[2, 0]], torch.eye(3)[:2]).tolist()
        [1.0, 0.0]
    """
    rows, columns = (_unit(precise(side)) for side in (decoder, truth))
    cosines = (columns @ rows.T).abs()
    concepts, latents = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    return cosines[concepts, latents]


def _unit(rows: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
    """Rows at length 1; one of length 0 stays."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


class MccTruth(Metric):
    """Mean absolute cosine between planted directions and the latents assigned to them.

    Parts:
        parents: Of parent concepts, where there are levels.
        children: Of the others.
        null: The main value for as many random directions.
    """

    symbol = "other"
    unit = "1"
    needs = ("decoder", "truth")
    parts = ("parents", "children", "null")
    scale_law = {"resid": "invariant"}
    direction = "1: every planted direction was found"
    source = "Sharkey et al. (2022)"

    def update(self, snapshot: Snapshot) -> None:
        """Add a snapshot's decoder; at each level all latents may be assigned."""
        decoder, truth = given(snapshot.decoder, "decoder"), given(snapshot.truth, "truth")
        found = mcc_truth(decoder, truth)
        self.add(found.mean(), n=len(found))
        levels = torch.tensor(snapshot.truth_parent, device=truth.device) < 0
        if len(levels):
            for part, chosen in (("parents", levels), ("children", ~levels)):
                there = mcc_truth(decoder, truth[chosen]) if chosen.any() else found[:0]
                mean = there.mean() if len(there) else found.new_zeros(())
                self.add(mean, n=len(there), part=part, otherwise=None)
        noise = torch.randn(decoder.shape, generator=torch.Generator().manual_seed(0))
        null = mcc_truth(noise.to(decoder.device), truth)
        self.add(null.mean(), n=len(null), part="null")
