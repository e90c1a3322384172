"""Features per dimension (G): how many features a hidden space holds for each of its dimensions."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise
from allostasis.metrics.feature_capacity import feature_capacity
from allostasis.metrics.feature_norm import REPRESENTED


def features_per_dimension(features: Float[Tensor, "*model d feature"]) -> Float[Tensor, "*model"]:
    """Features per hidden dimension.

    ||W||_F^2 / d

    Args:
        features: One column a feature.

    Returns:
        Features of norm 1 per dimension, >= 0. Above 1: features lie in superposition.

    Source:
        Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652.

    Example:
        >>> import torch
        >>> features_per_dimension(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]))
        tensor(1.5000)
    """
    return features.square().sum(dim=(-2, -1)) / features.shape[-2]


class FeaturesPerDimension(Metric):
    """Features per hidden dimension.

    Parts:
        represented: How many features have a squared norm of at least 1e-3.
        polysemanticity: 1 - mean capacity over the represented features.
    """

    symbol = "G"
    unit = "1"
    needs = ("features",)
    parts = ("represented", "polysemanticity")
    scale_law = {
        **invariant("vo", "qk", "relu", "rotation"),
        "stream": -2,
        "represented.stream": "invariant",
        "polysemanticity.stream": "invariant",
    }
    functional = False
    direction = "above 1: superposition; at most 1: every feature can have its own dimension"
    source = "Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652"

    def update(self, snapshot: Snapshot) -> None:
        """Add the features of a snapshot."""
        features = precise(given(snapshot.features, "features"))
        there = features.square().sum(dim=-2) >= REPRESENTED
        capacity = feature_capacity(features)
        count = there.sum()
        self.add(features_per_dimension(features), n=1)
        self.add(count, n=1, part="represented")
        self.add(
            1 - (capacity * there).sum() / count.clamp(min=1),
            n=(count > 0).long(),
            part="polysemanticity",
            otherwise="no feature is represented",
        )
