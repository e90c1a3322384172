"""Logit scale (A): how large the logits are that softmax sees."""

import math

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant, precise


def logit_scale(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    """Amplitude of the centred logits.

    A = sqrt(2) ||l_c||, l_c = l - mean(l). A is the largest margin that logits of this size could
    have, so that m = A G with the alignment G in [-1, 1].

    Args:
        logits: Logits at the readout position.

    Returns:
        Logits, >= 0. 0: every answer is equally likely; high: a sharp prediction, right or wrong.

    Source:
        Amplitude that softmax sees, arXiv 2606.18465.

    Example:
        >>> import torch
        >>> logit_scale(torch.tensor([[1.0, -1.0]])).item()
        2.0
    """
    values = precise(logits)
    return math.sqrt(2) * (values - values.mean(dim=-1, keepdim=True)).norm(dim=-1)


class LogitScale(Metric):
    """Mean amplitude of the logits at the readout position.

    Parts:
        sd: A / sqrt(2 V), the standard deviation over answers of one example's logits, which can be
            compared across vocabularies.
    """

    symbol = "A"
    unit = "logit"
    needs = ("logits",)
    parts = ("sd",)
    scale_law = {**invariant(*GAUGES, "logit_shift"), "logit_scale": 1}
    direction = "0: all answers equally likely; high: sharp, right or wrong"
    source = "Amplitude that softmax sees, arXiv 2606.18465"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        n, n_answers = given(snapshot.logits, "logits").shape
        value = snapshot.once(logit_scale, "logits").mean()
        self.add(value, n=n)
        self.add(value / math.sqrt(2 * n_answers), n=n, part="sd")

    @staticmethod
    def per_example(snapshot: Snapshot) -> dict[str, Tensor]:
        """Give the value of each example, by part."""
        return {"": snapshot.once(logit_scale, "logits")}
