"""Fourier Gini: how few frequencies hold the embedding."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, invariant, precise
from allostasis.metrics.fourier_power import fourier_power, residue_tables


def gini(values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Gini coefficient of non-negative numbers.

    sum_i (2 i - n - 1) x_(i) / (n sum x), x_(i) ascending, i = 1..n

    Args:
        values: Numbers >= 0, not all 0.

    Returns:
        Pure number, in [0, 1 - 1/n]. 0: all are equal. 1 - 1/n: a single one holds everything.

    Raises:
        ValueError: A number is negative, or all are 0.

    Source:
        Gini (1912), Variabilita e mutabilita; Hurley & Rickard (2009), Comparing measures of
        sparsity, IEEE Trans. Inf. Theory 55.

    Example:
        >>> gini(torch.tensor([0.0, 0.0, 0.0, 5.0])).item()
        0.75
    """
    x = precise(values).sort().values
    if x[0] < 0 or x[-1] == 0:
        raise ValueError(
            f"the Gini coefficient needs numbers >= 0 that are not all 0, got {x[0]} to {x[-1]}"
        )
    n = len(x)
    weights = 2 * torch.arange(1, n + 1, dtype=x.dtype, device=x.device) - n - 1
    value = (weights * x).sum() / (n * x.sum())
    assert -1e-12 <= value <= 1 - 1 / n + 1e-12, value
    return value


class FourierGini(Metric):
    """Gini coefficient of the embedding's Fourier power over frequencies.

    Parts:
        logits: The same for the neurons' map to logits, W_out W_U.
    """

    symbol = "other"
    unit = "1"
    needs = ("params", "modulus")
    parts = ("logits",)
    scale_law = {
        **invariant("vo", "qk", "relu", "stream", "rotation"),
        "logits.relu": "changes",
    }
    direction = "high: few frequencies hold the embedding; 0: all alike"
    source = (
        "Gini (1912), Variabilita e mutabilita; Hurley & Rickard (2009), Comparing measures of "
        "sparsity, IEEE Trans. Inf. Theory 55"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the weights of a snapshot."""
        for part, table in residue_tables(snapshot).items():
            power = fourier_power(table)
            if power.any():
                self.add(gini(power), n=1, part=part)
            else:
                self.add(0.0, n=0, part=part, otherwise="no Fourier power")
