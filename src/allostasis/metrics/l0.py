"""L0: how many latents of an autoencoder are on."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, precise


def l0(codes: Float[Tensor, "row latent"]) -> Float[Tensor, ""]:
    """Mean number of latents that are not 0.

    Args:
        codes: An autoencoder's latents.

    Returns:
        Latents a row, >= 0; low: sparse.

    Source:
        Cunningham et al. (2023), Sparse Autoencoders Find Highly Interpretable Features,
        arXiv:2309.08600.

    Example:
        >>> import torch
        >>> l0(torch.tensor([[1.0, 0.0], [2.0, 0.5]]))
        tensor(1.5000, dtype=torch.float64)
    """
    return precise((codes != 0).sum(dim=1)).mean()


class L0(Metric):
    """Latents that are on, of those that an autoencoder has.

    Parts:
        parents: Of its parents, where it has levels.
        children: Of its children.
    """

    symbol = "other"
    unit = "1"
    needs = ("coding",)
    parts = ("parents", "children")
    scale_law = {"resid": "invariant"}
    direction = "low: sparse"
    source = "Cunningham et al. (2023)"

    def update(self, snapshot: Snapshot) -> None:
        """Add a snapshot's rows."""
        coding = given(snapshot.coding, "coding")
        for part, latents in coding.levels.items():
            self.add(l0(coding.codes[:, latents]), n=len(coding.codes), part=part)
