"""Feature capacity (G): the share of a dimension that a feature has to itself."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise


def feature_capacity(
    features: Float[Tensor, "*model d feature"],
) -> Float[Tensor, "*model feature"]:
    """Capacity of each feature.

    C_i = (W_i . W_i)^2 / sum_j (W_i . W_j)^2

    Args:
        features: One column a feature.

    Returns:
        In [0, 1], and at most d in sum. High: the feature is orthogonal to all others; 0: it has no
        direction at all.

    Source:
        Scherlis et al. (2022), Polysemanticity and Capacity in Neural Networks, arXiv:2210.01892.

    Example:
        >>> feature_capacity(torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]))
        tensor([0.5000, 0.5000, 1.0000, 0.0000])
    """
    squared = (features.mT @ features).square()
    own, total = squared.diagonal(dim1=-2, dim2=-1), squared.sum(dim=-1)
    tiny = torch.finfo(features.dtype).tiny
    return torch.where(total > tiny, own / total.clamp(min=tiny), torch.zeros_like(own))


class FeatureCapacity(Metric):
    """Capacity of each feature; `position` is the feature.

    Parts:
        total: Sum over features, at most the number of dimensions.
    """

    symbol = "G"
    unit = "1"
    needs = ("features",)
    axes = ("position",)
    parts = ("total",)
    scale_law = invariant("vo", "qk", "relu", "stream", "rotation")
    direction = "high: a direction of its own; 0: left out"
    source = "Scherlis et al. (2022), Polysemanticity and Capacity in Neural Networks"

    def update(self, snapshot: Snapshot) -> None:
        """Add the features of a snapshot."""
        capacity = feature_capacity(precise(given(snapshot.features, "features")))
        self.add(capacity, n=1, over=("position",))
        self.add(capacity.sum(), n=1, part="total")
