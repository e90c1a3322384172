"""Dense latents: the share of an autoencoder's latents that fire in a tenth of all rows."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Mean, Metric, Place, Snapshot, given, precise

DENSE = 0.1  # firing rate above which a latent is dense


def dense_fraction(rates: Float[Tensor, " latent"]) -> Float[Tensor, ""]:
    """Share of latents that fire in more than a tenth of the rows.

    Args:
        rates: Firing rate of each latent.

    Returns:
        In [0, 1]. 0: every latent is sparse; better low.

    Source:
        Cunningham et al. (2023), Sparse Autoencoders Find Highly Interpretable Features,
        arXiv:2309.08600.

    Example:
        >>> import torch
        >>> dense_fraction(torch.tensor([0.5, 0.01]))
        tensor(0.5000, dtype=torch.float64)
    """
    return precise(rates > DENSE).mean()


class DenseFraction(Metric):
    """Dense latents.

    Parts:
        parents: Of the parents, where there are levels.
        children: Of the children.
    """

    symbol = "other"
    unit = "1"
    needs = ("coding",)
    parts = ("parents", "children")
    scale_law = {"resid": "invariant"}
    direction = "0: every latent is sparse"
    source = "Cunningham et al. (2023)"

    def update(self, snapshot: Snapshot) -> None:
        """Count a snapshot's firings."""
        coding = given(snapshot.coding, "coding")
        fires = (coding.codes != 0).sum(dim=0)
        self.accumulate("firings", fires)
        self.accumulate("rows", fires.new_tensor(len(coding.codes)))
        self.levels = coding.levels

    def means(self) -> dict[Place, Mean]:
        """Give the shares, from the counts of all processes."""
        found: dict[Place, Mean] = {}
        for (_, firings), (_, rows) in zip(self.kept("firings"), self.kept("rows"), strict=True):
            rates = precise(firings) / precise(rows).clamp(min=1)
            for part, latents in self.levels.items():
                found[Place(part)] = Mean(dense_fraction(rates[latents]), rows)
        return found
