"""Feature interference (sigma^2): what other active features add where a feature is read."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise


def feature_interference(
    features: Float[Tensor, "*model d feature"], density: Float[Tensor, "*model"] | float
) -> Float[Tensor, "*model feature"]:
    """Expected squared interference at each feature's read-out.

    sum_{j != i} (W_i . W_j)^2 P(x_j != 0)

    Args:
        features: One column a feature.
        density: P(x_j != 0), the same for all features, in (0, 1].

    Returns:
        Residual units to the fourth power, >= 0. High: others disturb what is read of the feature.

    Source:
        Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652.

    Example:
        >>> import torch
        >>> feature_interference(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 2.0]]), 0.1)
        tensor([0.1000, 0.1000, 0.0000])
    """
    squared = (features.mT @ features).square()
    others = squared.sum(dim=-1) - squared.diagonal(dim1=-2, dim2=-1)
    share = density[..., None] if isinstance(density, Tensor) else density
    return others.clamp(min=0) * share


class FeatureInterference(Metric):
    """Expected squared interference at each feature's read-out; `position` is the feature.

    Parts:
        signal_ratio: (W_i . W_i)^2 over the interference.
    """

    symbol = "sigma2"
    unit = "resid^4"
    needs = ("features",)
    axes = ("position",)
    parts = ("signal_ratio",)
    part_units = {"signal_ratio": "1"}
    scale_law = {
        **invariant("vo", "qk", "relu", "rotation"),
        "stream": -4,
        "signal_ratio.stream": "invariant",
    }
    functional = False
    direction = "high: others disturb what is read of the feature"
    source = "Elhage et al. (2022), Toy Models of Superposition, arXiv:2209.10652"

    def update(self, snapshot: Snapshot) -> None:
        """Add the features of a snapshot."""
        features = precise(given(snapshot.features, "features"))
        density = given(snapshot.feature_density, "feature_density")
        noise = feature_interference(features, density)
        signal = features.square().sum(dim=-2).square()
        is_disturbed = noise > 1e-12 * signal
        self.add(noise, n=1, over=("position",))
        self.add(
            signal / noise.clamp(min=1e-300),
            n=is_disturbed,
            part="signal_ratio",
            over=("position",),
            otherwise="no other feature interferes",
        )
