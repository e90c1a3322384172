"""Output entropy (Psi): how undecided the predicted distribution is."""

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, invariant
from allostasis.metrics.cross_entropy import log_probabilities


def output_entropy(log_p: Float[Tensor, "batch vocab"]) -> Float[Tensor, " batch"]:
    """Entropy of the predicted distribution.

    -sum_v p_v log p_v

    Args:
        log_p: Log-probabilities of the answers.

    Returns:
        Nats, in [0, ln V]. 0: one answer is certain. ln V: all are equally likely.

    Source:
        Shannon (1948), A mathematical theory of communication, Bell Syst. Tech. J. 27.

    Example:
        >>> import torch
        >>> output_entropy(torch.full((1, 4), 0.25).log()).item()  # ln 4
        1.386294
    """
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
        entropy = output_entropy(snapshot.once(log_probabilities, "logits"))
        self.add(entropy.mean(), n=len(entropy))
