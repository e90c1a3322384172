"""Log margin (Psi): the exact identity log m = log A + log G."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, invariant
from allostasis.metrics.logit_scale import logit_scale
from allostasis.metrics.margin import rivalry


def log_margin(
    margins: Float[Tensor, " batch"], scales: Float[Tensor, " batch"]
) -> Float[Tensor, "3 right"]:
    """Log margin, log amplitude and log alignment of the examples that are answered right.

    log m = log A + log G, exactly, wherever m > 0

    Args:
        margins: m, by which the true answer leads.
        scales: A, the logits' amplitude.

    Returns:
        Nats, any real number; up is better. Rows: log m, log A, log G = log(m / A). Columns: the
        examples with m > 0, in their order.

    Source:
        m = A G with A = sqrt(2) ||l_c|| and G = m / A.

    Example:
        >>> log_margin(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 2.0]))[:, 0]
        tensor([ 0.0000,  0.6931, -0.6931])
    """
    right = margins > 0
    lead, scale = margins[right], scales[right]
    return torch.stack([lead, scale, lead / scale]).log()


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
        margins = snapshot.once(rivalry, "logits", "labels").margin
        terms = log_margin(margins, snapshot.once(logit_scale, "logits"))
        n, right = len(margins), terms.shape[-1]
        for part, term in zip(("", "scale", "alignment"), terms, strict=True):
            self.add(term.mean(), n=right, part=part, otherwise="no example has a positive margin")
        self.add(right / n, n=n, part="positive")
