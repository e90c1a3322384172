"""Cross-entropy (Psi): the surprise at the true answer."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant, precise


def cross_entropy(
    logits: Float[Tensor, "batch vocab"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Negative log-probability of the true answer, in float64.

    -log p(y), p = softmax(l)

    Args:
        logits: Logits at the readout position.
        labels: The true answers.

    Returns:
        Nats, in [0, inf); down is better.

    Source:
        Standard.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).item()  # ln 4
        1.386294
    """
    return functional.cross_entropy(precise(logits), labels, reduction="none")


class CrossEntropy(Metric):
    """Mean cross-entropy at the readout position.

    Parts:
        floor: The lowest value that any model can reach on the task.
        excess: The mean above that floor.
        zero_fraction: Share of examples whose loss is exactly 0 when it is taken in float32, and
            which float32 training therefore no longer sees.
    """

    symbol = "Psi"
    unit = "nat"
    needs = ("logits", "labels")
    parts = ("floor", "excess", "zero_fraction")
    part_units = {"zero_fraction": "1"}
    scale_law = {
        **invariant(*GAUGES, "logit_shift"),
        "logit_scale": "changes",
    }
    direction = "down is better; 0: certain and right"
    source = "Standard"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        logits, labels = given(snapshot.logits, "logits"), given(snapshot.labels, "labels")
        value, n = cross_entropy(logits, labels).mean(), len(labels)
        single = functional.cross_entropy(logits.float(), labels, reduction="none")
        self.add(value, n=n)
        self.add((single == 0).double().mean(), n=n, part="zero_fraction")
        if snapshot.floor is not None:
            self.add(torch.full_like(value, snapshot.floor), n=n, part="floor")
            self.add(value - snapshot.floor, n=n, part="excess")
