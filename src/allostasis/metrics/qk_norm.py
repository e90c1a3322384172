"""QK norm (G): the size of each head's query-key map."""

import math

from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.amplitude_param import amplitude_param
from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise


def qk_norm(
    W_Q: Float[Tensor, "head d_model d_head"],
    W_K: Float[Tensor, "head d_model d_head"],
    gain: Float[Tensor, " d_model"] | None = None,
) -> Float[Tensor, " head"]:
    """Frobenius norm of each head's QK circuit, without forming it.

    ||diag(gamma) W_Q W_K^T diag(gamma)||_F / sqrt(k)

    Args:
        W_Q: Query weights.
        W_K: Key weights.
        gain: Gain of the norm before attention, or None where there is no norm.

    Returns:
        Attention logits per squared residual unit, >= 0. High: the head can choose sharply.

    Source:
        Elhage et al. (2021), A mathematical framework for transformer circuits.

    Example:
        >>> import torch
        >>> qk_norm(torch.eye(4)[None], torch.eye(4)[None]).item()  # sqrt(4) / sqrt(4)
        1.0
    """
    keys = precise(W_K) if gain is None else precise(gain)[:, None] * precise(W_K)
    return amplitude_param(W_Q, keys.mT, gain) / math.sqrt(W_Q.shape[-1])


class QKNorm(Metric):
    """Size of each head's QK circuit, from the weights alone."""

    symbol = "G"
    unit = "logit/resid^2"
    needs = ("params",)
    axes = ("layer", "head")
    scale_law = {**invariant("vo", "qk", "relu", "gain", "rotation"), "stream": -2}
    functional = False
    direction = "high: heads can choose sharply; no value is better"
    source = "Elhage et al. (2021), A mathematical framework for transformer circuits"

    def update(self, snapshot: Snapshot) -> None:
        """Add the weights of a snapshot."""
        for index, layer in enumerate(given(snapshot.weights, "params").layers):
            norm = qk_norm(layer.W_Q, layer.W_K, layer.gain)
            self.add(norm, n=1, over=("head",), layer=index)
