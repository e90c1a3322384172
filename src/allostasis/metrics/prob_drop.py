"""Probability drop (Psi): what an intervention takes from the right answer's probability."""

from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant
from allostasis.metrics.cross_entropy import distribution


def prob_drop(
    clean_p: Float[Tensor, "batch vocab"],
    p: Float[Tensor, "batch vocab"],
    target: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Probability of the target in the untouched model less that under the intervention.

    p_clean(t) - p(t)

    Args:
        clean_p: Probabilities of the untouched model.
        p: Those under the intervention.
        target: The right answers.

    Returns:
        Pure number, in [-1, 1]. Positive: the intervention harms; negative: what was changed had
        suppressed the target.

    Source:
        Tiny Ablation Lab, p_drop

    Example:
        >>> import torch
        >>> clean, changed = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.5]])
        >>> prob_drop(clean, changed, torch.tensor([1]))
        tensor([0.2500])
    """
    return (clean_p - p).gather(1, target[:, None])[:, 0]


class ProbDrop(Metric):
    """Mean loss of probability of the true answer at the readout position."""

    symbol = "Psi"
    unit = "1"
    needs = ("logits", "labels", "clean_logits")
    scale_law = {**invariant(*GAUGES, "logit_shift"), "logit_scale": "changes"}
    direction = "positive: the intervention harms; negative: it helps"
    source = "Tiny Ablation Lab, p_drop"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        labels = given(snapshot.labels, "labels")
        clean = distribution(given(snapshot.clean_logits, "clean_logits"))
        lost = prob_drop(clean.p, snapshot.once(distribution, "logits").p, labels)
        self.add(lost.mean(), n=len(lost))
