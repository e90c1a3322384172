"""Weight norm (A): the Euclidean length of the parameters."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, precise


def weight_norm(tensors: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Length of several tensors taken as one vector.

    sqrt(sum theta^2)

    Args:
        tensors: Parameters.

    Returns:
        Parameter units, >= 0. Low: little capacity is in use, as far as weight decay goes.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability,
        arXiv 2301.05217.

    Example:
        >>> weight_norm([torch.tensor([3.0]), torch.tensor([4.0])]).item()
        5.0
    """
    return torch.stack([precise(tensor).square().sum() for tensor in tensors]).sum().sqrt()


class WeightNorm(Metric):
    """Length of all trainable parameters.

    It depends on the parametrisation: gauges that leave the model's function alone move it.

    Parts:
        embed: Length of the embeddings; likewise `qk`, `ov`, `mlp`, `unembed`.
        *: Length of each parameter, under its own name.
    """

    symbol = "A"
    unit = "param"
    needs = ("params",)
    parts = ("embed", "qk", "ov", "mlp", "unembed", "*")
    scale_law = dict.fromkeys(set(GAUGES) - {"rotation"}, "changes") | {"rotation": "invariant"}
    functional = False
    direction = "low: less capacity in use; no value is better"
    source = (
        "Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability, "
        "arXiv 2301.05217"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the weights of a snapshot."""
        weights = given(snapshot.weights, "params")
        norms = {name: weight_norm([value]) for name, value in weights.named.items()}
        self.add(weight_norm(norms.values()), n=1)
        for group, names in weights.groups.items():
            if names:
                self.add(weight_norm(norms[name] for name in names), n=1, part=group)
        for name, norm in norms.items():
            self.add(norm, n=1, part=name)
