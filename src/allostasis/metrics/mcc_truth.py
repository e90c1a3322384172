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
        parents: Of parent concepts, where there are levels; any latent may be assigned.
        children: Of the others, likewise.
        parents_alone: Of parent concepts, where the autoencoder has levels too: its parents alone
            may be assigned.
        children_alone: Of the others, its children alone.
        null: The main value for as many random directions.
    """

    symbol = "other"
    unit = "1"
    needs = ("decoder", "truth")
    parts = ("parents", "children", "parents_alone", "children_alone", "null")
    scale_law = {"resid": "invariant"}
    direction = "1: every planted direction was found"
    source = "Sharkey et al. (2022)"

    def update(self, snapshot: Snapshot) -> None:
        """Add a snapshot's decoder; at each level all latents, and those of the level alone."""
        decoder, truth = given(snapshot.decoder, "decoder"), given(snapshot.truth, "truth")
        found = mcc_truth(decoder, truth)
        self.add(found.mean(), n=len(found))
        levels = torch.tensor(snapshot.truth_parent, device=truth.device) < 0
        if len(levels):
            m = 0 if snapshot.coding is None else snapshot.coding.n_parents
            own = {"parents": decoder[:m], "children": decoder[m:]} if m else {}
            for part, chosen in (("parents", levels), ("children", ~levels)):
                self._add_level(part, decoder, truth[chosen])
                if part in own:
                    self._add_level(f"{part}_alone", own[part], truth[chosen])
        noise = torch.randn(decoder.shape, generator=torch.Generator().manual_seed(0))
        null = mcc_truth(noise.to(decoder.device), truth)
        self.add(null.mean(), n=len(null), part="null")

    def _add_level(
        self, part: str, decoder: Float[Tensor, "latent d"], truth: Float[Tensor, "concept d"]
    ) -> None:
        found = mcc_truth(decoder, truth) if len(decoder) and len(truth) else truth.new_zeros(0)
        mean = found.mean() if len(found) else truth.new_zeros(())
        self.add(mean, n=len(found), part=part, otherwise=None)
