"""Flip rate (Psi): how often an intervention changes what the model says."""

from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant, precise


def flip_rate(
    clean: Int[Tensor, " batch"], changed: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Whether the predicted token is another one.

    1[argmax clean != argmax changed]

    Args:
        clean: What the untouched model predicts.
        changed: What it predicts under the intervention.

    Returns:
        Pure number, in [0, 1]; larger: more predictions changed. 0 for an intervention that does
        nothing, however often the model errs.

    Source:
        Tiny Ablation Lab, whose code computes 1[argmax changed != target] under this name: an error
        rate, which is the part top1_error here

    Example:
        >>> import torch
        >>> flip_rate(torch.tensor([1, 2]), torch.tensor([1, 3]))
        tensor([0., 1.])
    """
    return (clean != changed).float()


class FlipRate(Metric):
    """Share of predictions that are not the untouched model's.

    Parts:
        top1_error: Share of predictions that are not the true answer.
    """

    symbol = "Psi"
    unit = "1"
    needs = ("logits", "labels", "clean_logits")
    parts = ("top1_error",)
    scale_law = invariant(*GAUGES, "logit_shift", "logit_scale")
    direction = "larger: more predictions changed"
    source = "Tiny Ablation Lab"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        labels = given(snapshot.labels, "labels")
        clean = precise(given(snapshot.clean_logits, "clean_logits")).argmax(dim=-1)
        changed = precise(given(snapshot.logits, "logits")).argmax(dim=-1)
        self.add(flip_rate(clean, changed).mean(), n=len(labels))
        self.add(flip_rate(labels, changed).mean(), n=len(labels), part="top1_error")
