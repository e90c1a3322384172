"""Accuracy (Psi): how often the largest logit is the true answer's."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant, precise
from allostasis.metrics.margin import rivalry


def accuracy(
    logits: Float[Tensor, "batch vocab"], labels: Int[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """Whether each example is answered correctly.

    1[argmax_v l_v = y]

    Args:
        logits: Logits at the readout position.
        labels: The true answers.

    Returns:
        True where the answer is right. The mean is in [0, 1]; up is better.

    Source:
        Standard.

    Example:
        >>> import torch
        >>> accuracy(torch.eye(3), torch.tensor([0, 1, 1])).float().mean().item()
        0.6666667
    """
    return logits.argmax(dim=-1) == labels


def is_right(snapshot: Snapshot) -> Bool[Tensor, " batch"]:
    """What `accuracy` says of a snapshot, from the search for the runner-up that others share.

    1[m > 0]; where the true answer and the runner-up are level, the first of the two is the
    prediction.

    Args:
        snapshot: One with `logits` and `labels`.

    Returns:
        True where the answer is right. The mean is in [0, 1]; up is better.

    Raises:
        ValueError: The snapshot lacks one of the two.

    Source:
        Standard.

    Example:
        >>> import torch
        >>> level = Snapshot(step=0, logits=torch.zeros(2, 3), labels=torch.tensor([0, 1]))
        >>> is_right(level).tolist()
        [True, False]
    """
    lead, others = snapshot.once(rivalry, "logits", "labels")
    return (lead > 0) | ((lead == 0) & (given(snapshot.labels, "labels") < others))


class Accuracy(Metric):
    """Accuracy at the positions that the task's main numbers are about.

    Parts:
        over_ceiling: Accuracy divided by the best that any model can reach on the task; likewise
            `all_over_ceiling`, `predictable_over_ceiling` and `last_over_ceiling`.
        all: Accuracy over all scored tokens.
        predictable: Over tokens that the past determines.
        last: Over the last token of each sequence.
        at: At each position.
    """

    symbol = "Psi"
    unit = "1"
    needs = ("logits", "labels")
    axes = ("position",)
    parts = (
        "over_ceiling", "all", "predictable", "last",
        "all_over_ceiling", "predictable_over_ceiling", "last_over_ceiling", "at",
    )  # fmt: skip
    audit_key = "psi_accuracy"
    scale_law = invariant(*GAUGES, "logit_scale", "logit_shift")
    direction = "up is better; 1: every answer is right"
    source = "Standard"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        correct = is_right(snapshot)
        value, n = precise(correct).mean(), len(correct)
        self.add(value, n=n)
        if "" in snapshot.ceiling:
            self.add(value / snapshot.ceiling[""], n=n, part="over_ceiling")
        for group, score in snapshot.scores.items():
            value, n = precise(score.correct).mean(), len(score.correct)
            self.add(value, n=n, part=group)
            if group in snapshot.ceiling:
                self.add(value / snapshot.ceiling[group], n=n, part=f"{group}_over_ceiling")
        if snapshot.hits is not None:
            share, n = precise(snapshot.hits).mean(dim=0), len(snapshot.hits)
            self.add(share, n=n, part="at", over=("position",), position=0)
