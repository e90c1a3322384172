"""Learned amplitude (A): the gain of the readout."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise


def readout_matrix(
    unembed: Float[Tensor, "d_model vocab"], gain: Float[Tensor, " d_model"] | None
) -> Float[Tensor, "d_model vocab"]:
    """The linear map from the normalised stream to centred logits.

    (U_c diag(gamma))^T, U_c the unembedding without its mean over answers

    Args:
        unembed: The unembedding; u_v is its column v.
        gain: Gain of the norm before it, or None where there is no norm.

    Returns:
        Logits per residual unit, any real number, with no direction.

    Source:
        Elhage et al. (2021), A mathematical framework for transformer circuits.

    Example:
        >>> readout_matrix(torch.tensor([[1.0, 3.0]]), torch.tensor([2.0]))
        tensor([[-2.,  2.]], dtype=torch.float64)
    """
    columns = precise(unembed)
    centred = columns - columns.mean(dim=-1, keepdim=True)
    return centred if gain is None else precise(gain)[:, None] * centred


def amplitude_learned(
    unembed: Float[Tensor, "d_model vocab"], gain: Float[Tensor, " d_model"] | None = None
) -> Float[Tensor, ""]:
    """RMS centred logit that a unit-variance isotropic input produces.

    ||U_c diag(gamma)||_F / sqrt(V)

    Args:
        unembed: The unembedding; u_v is its column v.
        gain: Gain of the norm before it, or None where there is no norm.

    Returns:
        Logits, >= 0. High: the readout turns small differences into sharp predictions.

    Source:
        The Conservation of Separability v2.1, made independent of how gain and unembedding share
        it.

    Example:
        >>> amplitude_learned(torch.tensor([[1.0, -1.0]])).item()
        1.0
    """
    return readout_matrix(unembed, gain).norm() / math.sqrt(unembed.shape[-1])


class AmplitudeLearned(Metric):
    """Gain of the readout, from the weights alone.

    Parts:
        spectral: Largest singular value of U_c diag(gamma).
        published: Mean of the final norm's gain. It moves when gain is handed to the unembedding,
            a signed mean hides structure, and a model without a final norm has none.
    """

    symbol = "A"
    unit = "logit"
    needs = ("params",)
    parts = ("spectral", "published")
    part_units = {"published": "param"}
    audit_key = "A_learned"
    scale_law = {
        **invariant("vo", "qk", "relu", "gain", "rotation"),
        "stream": -1,
        "published.gain": "changes",
    }
    functional = False
    direction = "high: a sharp readout; no value is better"
    source = (
        "The Conservation of Separability v2.1, "
        "made independent of how gain and unembedding share it"
    )

    def update(self, snapshot: Snapshot) -> None:
        """Add the weights of a snapshot."""
        weights = given(snapshot.weights, "params")
        readout = readout_matrix(weights.W_U, weights.final_gain)
        gram = readout @ readout.T if len(readout) < readout.shape[-1] else readout.T @ readout
        self.add(readout.norm() / math.sqrt(readout.shape[-1]), n=1)
        self.add(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt(), n=1, part="spectral")
        gain, why = weights.final_gain, "the model has no final norm"
        mean, n = (0.0, 0) if gain is None else (precise(gain).mean(), 1)
        self.add(mean, n=n, part="published", otherwise=why)
