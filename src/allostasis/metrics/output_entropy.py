"""Output entropy (Psi): how undecided the predicted distribution is."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, invariant
from allostasis.metrics.cross_entropy import Distribution, distribution


def output_entropy(predicted: Distribution) -> Float[Tensor, " batch"]:
    """Entropy of the predicted distribution.

    -sum_v p_v log p_v

    Args:
        predicted: Distribution over the answers.

    Returns:
        Nats, in [0, ln V]. 0: one answer is certain. ln V: all are equally likely.

    Source:
        Shannon (1948), A mathematical theory of communication, Bell Syst. Tech. J. 27.

    Example:
        >>> output_entropy(distribution(torch.zeros(1, 4))).item()  # ln 4
        1.386294
    """
    return -torch.linalg.vecdot(predicted.p, predicted.log_p)


class OutputEntropy(Metric):
    """Mean entropy of the prediction at the readout position."""

    symbol = "Psi"
    unit = "nat"
    needs = ("logits",)
    scale_law = {**invariant(*GAUGES, "logit_shift"), "logit_scale": "changes"}
    direction = "0: one answer is certain; ln V: all are equally likely"
    source = "Shannon (1948), A mathematical theory of communication, Bell Syst. Tech. J. 27"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        entropy = output_entropy(snapshot.once(distribution, "logits"))
        self.add(entropy.mean(), n=len(entropy))
