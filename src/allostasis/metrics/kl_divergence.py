"""KL divergence (Psi): how far an intervention moves the whole predicted distribution."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import GAUGES, Metric, Snapshot, given, invariant
from allostasis.metrics.cross_entropy import distribution


def kl_divergence(
    clean_log_p: Float[Tensor, "batch vocab"], log_p: Float[Tensor, "batch vocab"]
) -> Float[Tensor, " batch"]:
    """Divergence of the changed prediction from the untouched one, from log probabilities.

    KL(clean || changed) = sum_v p_v (log p_v - log q_v)

    Args:
        clean_log_p: Log probabilities of the untouched model, in float32 or wider.
        log_p: Those under the intervention, likewise. No probability is formed and taken the
            logarithm of again, so that nothing underflows.

    Returns:
        nat, in [0, inf), rounding below 0 cut off; larger: moved further. 0: nothing has changed.

    Source:
        Kullback & Leibler (1951), On information and sufficiency, Ann. Math. Stat. 22

    Example:
        >>> half, sure = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        >>> kl_divergence(half.log(), sure.log())  # 0.5 ln 2 + 0.5 ln 2/3
        tensor([0.1438])
    """
    return torch.linalg.vecdot(clean_log_p.exp(), clean_log_p - log_p).clamp(min=0)


class KLDivergence(Metric):
    """Mean divergence of the prediction at the readout position from the untouched model's."""

    symbol = "Psi"
    unit = "nat"
    needs = ("logits", "clean_logits")
    scale_law = {**invariant(*GAUGES, "logit_shift"), "logit_scale": "changes"}
    direction = "0: nothing has changed; larger: moved further"
    source = "Kullback & Leibler (1951), On information and sufficiency, Ann. Math. Stat. 22"

    def update(self, snapshot: Snapshot) -> None:
        """Add the examples of a snapshot."""
        clean = distribution(given(snapshot.clean_logits, "clean_logits"))
        moved = kl_divergence(clean.log_p, snapshot.once(distribution, "logits").log_p)
        self.add(moved.mean(), n=len(moved))
