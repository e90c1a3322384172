"""Cross-entropy (Psi): the surprise at the true answer."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant, precise


def log_probabilities(logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
    """Logarithm of the predicted distribution, in float64.

    log p = l - log sum_v exp l_v

    Args:
        logits: Logits; adding a constant to all of an example's changes nothing.

    Returns:
        Nats, in (-inf, 0]. High: a likely answer.

    Source:
        Standard.

    Example:
        >>> log_probabilities(torch.zeros(1, 2)).exp()
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    return precise(logits).log_softmax(dim=-1)


class Distribution(NamedTuple):
    """A predicted distribution.

    Attributes:
        log_p: log p, as `log_probabilities` gives it.
        p: Probabilities, in [0, 1].
    """

    log_p: Float[Tensor, "batch vocab"]
    p: Float[Tensor, "batch vocab"]


def distribution(logits: Float[Tensor, "batch vocab"]) -> Distribution:
    """The predicted distribution and its logarithm, with one exponential for both.

    p = exp(l) / sum_v exp l_v

    Args:
        logits: Logits; adding a constant to all of an example's changes nothing.

    Returns:
        log p in nats, in (-inf, 0], and p, in [0, 1]; both in float64. High: a likely answer.

    Source:
        Standard.

    Example:
        >>> distribution(torch.zeros(1, 2)).p
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    lead = precise(logits, copy=True).sub_(logits.amax(dim=-1, keepdim=True))
    p = lead.exp()  # in place where it can be: fresh memory costs as much as the arithmetic
    total = p.sum(dim=-1, keepdim=True)
    return Distribution(lead.sub_(total.log()), p.div_(total))


def cross_entropy(
    log_p: Float[Tensor, "batch vocab"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Negative log-probability of the true answer.

    -log p(y)

    Args:
        log_p: Log-probabilities, as `log_probabilities` gives them.
        labels: The true answers.

    Returns:
        Nats, in [0, inf); down is better.

    Source:
        Standard.

    Example:
        >>> cross_entropy(log_probabilities(torch.zeros(1, 4)), torch.tensor([2])).item()  # ln 4
        1.386294
    """
    return -log_p.gather(-1, labels[:, None])[:, 0]


class CrossEntropy(Metric):
    """Mean cross-entropy at the readout position.

    Parts:
        floor: The lowest value that any model can reach on the task.
        excess: The mean above that floor.
        all: Mean over all scored tokens; likewise `all_floor` and `all_excess`.
        zero_fraction: Share of examples whose loss is exactly 0 when it is taken in float32, and
            which float32 training therefore no longer sees.
    """

    symbol = "Psi"
    unit = "nat"
    needs = ("logits", "labels")
    parts = ("floor", "excess", "all", "all_floor", "all_excess", "zero_fraction")
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
        log_p = snapshot.once(distribution, "logits").log_p
        value, n = cross_entropy(log_p, labels).mean(), len(labels)
        single = functional.cross_entropy(logits.float(), labels, reduction="none")
        self.add(value, n=n)
        self.add(precise(single == 0).mean(), n=n, part="zero_fraction")
        if snapshot.floor is not None:
            self.add(torch.full_like(value, snapshot.floor), n=n, part="floor")
            self.add(value - snapshot.floor, n=n, part="excess")
        if "all" in snapshot.scores:
            _, losses, floor = snapshot.scores["all"]
            whole, n = precise(losses).mean(), len(losses)
            self.add(whole, n=n, part="all")
            self.add(torch.full_like(whole, floor), n=n, part="all_floor")
            self.add(whole - floor, n=n, part="all_excess")
