"""Logit difference (Psi): by how much the right answer leads the wrong one beside it."""

from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant, precise


def logit_diff(
    logits: Float[Tensor, "batch vocab"],
    target: Int[Tensor, " batch"],
    foil: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Logit of the target less that of the foil, each prompt with its own pair.

    l[t] - l[f]

    Args:
        logits: At the last token, before a cap.
        target: The right answers.
        foil: The wrong ones.

    Returns:
        logit, any real number; larger: the right answer leads by more. Above 0 it is chosen.

    Source:
        Wang et al. (2023), Interpretability in the Wild, arXiv 2211.00593

    Example:
        >>> import torch
        >>> logit_diff(torch.tensor([[1.0, 3.0]]), torch.tensor([1]), torch.tensor([0]))
        tensor([2.])
    """
    pairs = (logits.gather(1, answer[:, None])[:, 0] for answer in (target, foil))
    return next(pairs) - next(pairs)


class LogitDiff(Metric):
    """Mean lead of the target over the foil at the readout position."""

    symbol = "Psi"
    unit = "logit"
    needs = ("logits", "labels", "foils")
    scale_law = {**invariant(*GAUGES, "logit_shift"), "logit_scale": 1}
    direction = "larger: the right answer leads by more"
    source = "Wang et al. (2023), Interpretability in the Wild, arXiv 2211.00593"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        labels, foils = given(snapshot.labels, "labels"), given(snapshot.foils, "foils")
        lead = logit_diff(precise(given(snapshot.logits, "logits")), labels, foils)
        self.add(lead.mean(), n=len(lead))
