"""Key frequencies: the few frequencies by which a model adds, by a rule fixed in advance."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, invariant
from allostasis.metrics.cosine_fve import along_and_total

COVERED = 0.95
SMALLEST_SHARE = 0.01
MOST = 10


def key_frequencies(fve: Float[Tensor, " frequency"]) -> tuple[int, ...]:
    """The frequencies that carry the addition circuit.

    Frequencies are sorted by explained share. Kept is the smallest prefix that reaches 95 % of the
    summed share; of it, those with at least 1 % of the sum; of these, at most the first 10.

    Args:
        fve: Explained share of k = 1..(p - 1) / 2, or anything in proportion to it; not all 0.

    Returns:
        Frequencies, each in [1, (p - 1) / 2], the strongest first; they have no direction.

    Source:
        Rule of this project, after Nanda et al. (2023), arXiv 2301.05217.

    Example:
        >>> key_frequencies(torch.tensor([0.0, 0.3, 0.004, 0.6]))
        (4, 2)
    """
    fve = fve.cpu()  # a float cumsum is not deterministic on a GPU, and these are few
    share, order = (fve / fve.sum()).sort(descending=True, stable=True)
    before = share.cumsum(0) - share
    keys = order[(before < COVERED) & (share >= SMALLEST_SHARE)][:MOST]
    return tuple((keys + 1).tolist())


class KeyFrequencies(Metric):
    """How many key frequencies the model uses at this step.

    Parts:
        member: Explained share of each key frequency; the position column holds k.
    """

    symbol = "other"
    unit = "1"
    needs = ("grid_logits",)
    axes = ("position",)
    parts = ("member",)
    scale_law = {
        **invariant("vo", "qk", "relu", "stream", "rotation"),
        **invariant("logit_scale", "logit_shift"),
    }
    direction = "low: the circuit is sparse; no value is better"
    source = "Rule of this project, after Nanda et al. (2023), arXiv 2301.05217"

    def update(self, snapshot: Snapshot) -> None:
        """Add the logits of every pair."""
        along, total = snapshot.once(along_and_total, "grid_logits")
        is_key = torch.zeros_like(along)
        is_defined = bool(total > 0 and along.any())
        if is_defined:
            is_key[[k - 1 for k in key_frequencies(along)]] = 1
        why = "no frequency explains any of the logits"
        self.add(is_key.sum(), n=int(is_defined), otherwise=why)
        share = {"n": is_key, "over": ("position",), "position": 1, "otherwise": None}
        self.add(along / total, part="member", **share)
