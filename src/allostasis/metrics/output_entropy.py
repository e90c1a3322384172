"""Output entropy (Psi): how undecided the predicted distribution is."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant, precise


def output_entropy(logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    """Entropy of the predicted distribution, in float64.

    -sum_v p_v log p_v, p = softmax(l)

    Args:
        logits: Logits at the readout position.

    Returns:
        Nats, in [0, ln V]. 0: one answer is certain. ln V: all are equally likely.

    Source:
        Shannon (1948), A mathematical theory of communication, Bell Syst. Tech. J. 27.

    Example:
        >>> import torch
        >>> output_entropy(torch.zeros(1, 4)).item()  # ln 4
        1.386294
    """
    log_p = precise(logits).log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


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
        entropy = output_entropy(given(snapshot.logits, "logits"))
        self.add(entropy.mean(), n=len(entropy))
