"""Alignment (G): how much of the logits' amplitude points from the runner-up to the answer."""

import math

from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant
from allostasis.metrics.logit_scale import logit_scale
from allostasis.metrics.margin import margin, rivalry


def alignment(
    logits: Float[Tensor, "batch vocab"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Cosine between the centred logits and the answer-minus-runner-up direction.

    G = m / A = cos(l_c, e_y - e_j), j the runner-up

    Args:
        logits: Logits at the readout position.
        labels: The true answers.

    Returns:
        Pure number, in [-1, sqrt(V / (2 (V - 1)))]; up is better. Positive where the answer is
        right. The upper end is 1 at V = 2 and 0.7071 in the limit, see `highest_alignment`. NaN
        where all logits are equal, which points nowhere.

    Source:
        The identity log m = log A + log G; Cauchy-Schwarz for the range.

    Example:
        >>> import torch
        >>> alignment(torch.tensor([[1.0, -1.0]]), torch.tensor([0])).item()
        1.0
    """
    return margin(logits, labels) / logit_scale(logits)


def highest_alignment(n_answers: int) -> float:
    """The largest alignment that any logits can have.

    sqrt(V / (2 (V - 1))), reached where all wrong answers are level

    Args:
        n_answers: V, the number of logits, at least 2.

    Returns:
        Pure number, in (0.7071, 1], with no direction.

    Source:
        Maximum of (l_y - max_{k != y} l_k) / (sqrt(2) ||l_c||) over all l.

    Example:
        >>> highest_alignment(113)
        0.71026
    """
    return math.sqrt(n_answers / (2 * (n_answers - 1)))


class Alignment(Metric):
    """Mean alignment over the examples whose logits are not all equal.

    Parts:
        of_ceiling: G divided by the largest value it can have at this number of answers.
    """

    symbol = "G"
    unit = "1"
    needs = ("logits", "labels")
    parts = ("of_ceiling",)
    scale_law = invariant(*GAUGES, "logit_scale", "logit_shift")
    direction = "up is better; positive where the answer is right"
    source = "The identity log m = log A + log G; Cauchy-Schwarz for the range"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        cosine = self.per_example(snapshot)[""]
        spread = snapshot.once(logit_scale, "logits") > 0
        value = cosine[spread].mean()
        ceiling = highest_alignment(given(snapshot.logits, "logits").shape[-1])
        for part, share in (("", value), ("of_ceiling", value / ceiling)):
            self.add(share, n=spread.sum(), part=part, otherwise="all logits are equal")

    @staticmethod
    def per_example(snapshot: Snapshot) -> dict[str, Tensor]:
        """Give the value of each example, by part; NaN where all its logits are equal."""
        lead = snapshot.once(rivalry, "logits", "labels").margin
        return {"": lead / snapshot.once(logit_scale, "logits")}
