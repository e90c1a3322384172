"""Feature dimensionality (G): into how many a dimension is shared where a feature lies."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise
from allostasis.metrics.feature_norm import REPRESENTED


def feature_dimensionality(
    features: Float[Tensor, "*model d feature"],
) -> Float[Tensor, "*model feature"]:
    """Dimensionality of each feature.

    D_i = ||W_i||^2 / sum_j (W_i / ||W_i|| . W_j)^2

    Args:
        features: One column a feature.

    Returns:
        In [0, 1]; high: a dimension of its own. 1/2 for each of an antipodal pair, 0 for a feature
        that has no direction at all.

    Source:
        Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652.

    Example:
        >>> feature_dimensionality(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]]))
        tensor([0.5000, 0.5000, 1.0000])
    """
    overlaps = features.mT @ features
    norm, total = overlaps.diagonal(dim1=-2, dim2=-1), overlaps.square().sum(dim=-1)
    tiny = torch.finfo(features.dtype).tiny
    return torch.where(total > tiny, norm.square() / total.clamp(min=tiny), torch.zeros_like(norm))


class FeatureDimensionality(Metric):
    """Dimensionality of each feature that is represented at all; `position` is the feature."""

    symbol = "G"
    unit = "1"
    needs = ("features",)
    axes = ("position",)
    scale_law = invariant("vo", "qk", "relu", "stream", "rotation")
    direction = "high: a dimension of its own; 1/2: one of an antipodal pair"
    source = "Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652"

    def update(self, snapshot: Snapshot) -> None:
        """Add the features of a snapshot."""
        features = precise(given(snapshot.features, "features"))
        there = features.square().sum(dim=-2) >= REPRESENTED
        self.add(
            feature_dimensionality(features),
            n=there,
            over=("position",),
            otherwise="the feature is not represented",
        )
