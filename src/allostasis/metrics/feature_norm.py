"""Feature norm (A): how long the direction is that a feature has in the hidden space."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise

REPRESENTED = 1e-3
"""Squared norm below which a feature counts as not represented."""


def feature_norm(features: Float[Tensor, "*model d feature"]) -> Float[Tensor, "*model feature"]:
    """Norm of each feature's direction.

    ||W_i||

    Args:
        features: One column a feature.

    Returns:
        Residual units, >= 0. High: the feature is written and read strongly; 0: it is left out.

    Source:
        Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652.

    Example:
        >>> import torch
        >>> feature_norm(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        tensor([5., 0.])
    """
    return features.norm(dim=-2)


class FeatureNorm(Metric):
    """Norm of each feature's direction; `position` is the feature.

    Parts:
        gain: ||W_i||^2, by what a tied read-out multiplies a feature that is alone.
    """

    symbol = "A"
    unit = "resid"
    needs = ("features",)
    axes = ("position",)
    parts = ("gain",)
    part_units = {"gain": "resid^2"}
    scale_law = {
        **invariant("vo", "qk", "relu", "rotation"),
        "stream": -1,
        "gain.stream": -2,
    }
    functional = False
    direction = "high: written and read strongly; 0: left out"
    source = "Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652"

    def update(self, snapshot: Snapshot) -> None:
        """Add the features of a snapshot."""
        norm = feature_norm(precise(given(snapshot.features, "features")))
        self.add(norm, n=1, over=("position",))
        self.add(norm.square(), n=1, part="gain", over=("position",))
