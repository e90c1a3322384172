"""Log margin (Psi): the exact identity log m = log A + log G."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.metrics.alignment import alignment
from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant
from allostasis.metrics.logit_scale import logit_scale
from allostasis.metrics.margin import margin


def log_margin(
    logits: Float[Tensor, "batch vocab"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, "part right"]:
    """Log margin, log amplitude and log alignment of the examples that are answered right.

    log m = log A + log G, exactly, wherever m > 0

    Args:
        logits: Logits at the readout position.
        labels: The true answers.

    Returns:
        Nats, any real number; up is better. Rows: log m, log A, log G. Columns: the examples with
        m > 0, in their order.

    Source:
        m = A G with A = sqrt(2) ||l_c|| and G = m / A.

    Example:
        >>> whole, scale, aligned = log_margin(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        >>> whole.item(), scale.item(), aligned.item()
        (0.6931472, 0.6931472, 0.0)
    """
    lead = margin(logits, labels)
    right = lead > 0
    kept, answers = logits[right], labels[right]
    return torch.stack([lead[right], logit_scale(kept), alignment(kept, answers)]).log()


class LogMargin(Metric):
    """Mean log margin over exactly the examples with m > 0, and its two terms.

    The identity is a tautology; what is claimed is only what a treatment does to the two terms.

    Parts:
        scale: Mean log A, the amplitude's term.
        alignment: Mean log G, the geometry's term; the two sum to the main value.
        positive: Share of examples with m > 0, over which the other three are taken.
    """

    symbol = "Psi"
    unit = "nat"
    needs = ("logits", "labels")
    parts = ("scale", "alignment", "positive")
    part_symbols = {"scale": "A", "alignment": "G"}
    part_units = {"positive": "1"}
    scale_law = {
        **invariant(*GAUGES, "logit_shift"),
        "logit_scale": "changes",
        "alignment.logit_scale": "invariant",
        "positive.logit_scale": "invariant",
    }
    direction = "up is better"
    source = "m = A G with A = sqrt(2) ||l_c|| and G = m / A"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        logits, labels = given(snapshot.logits, "logits"), given(snapshot.labels, "labels")
        terms = log_margin(logits, labels)
        right = terms.shape[-1]
        for part, term in zip(("", "scale", "alignment"), terms, strict=True):
            self.add(term.mean(), n=right, part=part, otherwise="no example has a positive margin")
        self.add(right / len(labels), n=len(labels), part="positive")
