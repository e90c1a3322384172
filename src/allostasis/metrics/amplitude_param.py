"""Parameter amplitude (A): the size of each head's value-to-output map."""

import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.core.spaces import LayerWeights
from allostasis.metrics.base import Metric, Snapshot, given, invariant, precise


def amplitude_param(
    W_V: Float[Tensor, "head d_model d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    gain: Float[Tensor, " d_model"] | None = None,
) -> Float[Tensor, " head"]:
    """Frobenius norm of each head's OV circuit, without forming it.

    ||diag(gamma) W_V W_O||_F = sqrt(sum((V'^T V') o (W_O W_O^T))), V' = diag(gamma) W_V

    Args:
        W_V: Value weights.
        W_O: Output weights.
        gain: Gain of the norm before attention, or None where there is no norm.

    Returns:
        Residual units written per residual unit read, >= 0. High: the head moves the stream far.

    Source:
        Elhage et al. (2021), A mathematical framework for transformer circuits.

    Example:
        >>> amplitude_param(2 * torch.eye(3)[None], torch.eye(3)[None]).item()  # 2 sqrt(3)
        3.464102
    """
    read, write = _scaled(W_V, gain), precise(W_O)
    return ((read.mT @ read) * (write @ write.mT)).sum((-2, -1)).clamp(min=0).sqrt()


def spectral_norm(
    W_V: Float[Tensor, "head d_model d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    gain: Float[Tensor, " d_model"] | None = None,
) -> Float[Tensor, " head"]:
    """Largest singular value of each head's OV circuit, without forming it.

    s_1(diag(gamma) W_V W_O)^2 is the largest eigenvalue of R^T W_O W_O^T R, with V'^T V' = R R^T

    Args:
        W_V: Value weights.
        W_O: Output weights.
        gain: Gain of the norm before attention, or None where there is no norm.

    Returns:
        Residual units written per residual unit read, >= 0. High: one direction is moved far.

    Source:
        Elhage et al. (2021), A mathematical framework for transformer circuits.

    Example:
        >>> spectral_norm(2 * torch.eye(3)[None], torch.eye(3)[None]).item()
        2.0
    """
    read, write = _scaled(W_V, gain), precise(W_O)
    values, vectors = torch.linalg.eigh(read.mT @ read)
    root = vectors * values.clamp(min=0).sqrt()[..., None, :]
    gram = root.mT @ (write @ write.mT) @ root
    return torch.linalg.eigvalsh(gram)[..., -1].clamp(min=0).sqrt()


def _scaled(weights: Tensor, gain: Tensor | None) -> Tensor:
    return precise(weights) if gain is None else precise(gain)[:, None] * precise(weights)


class AmplitudeParam(Metric):
    """Size of each head's OV circuit.

    Parts:
        spectral: Largest singular value in place of the Frobenius norm.
        v: ||W_V||_F of the head.
        o: ||W_O||_F of the head.
        imbalance: ln(||W_V|| / ||W_O||), any real number; 0: balanced. (v - o) / (v + o) is
            tanh(imbalance / 2).
        published: Sum over layers of ||W_V||_F. It changes under W_V -> c W_V, W_O -> W_O / c,
            which leaves the model's function as it is, and is 0 where V is looked up by name in a
            model with fused weights.
    """

    symbol = "A"
    unit = "1"
    needs = ("params",)
    axes = ("layer", "head")
    parts = ("spectral", "v", "o", "imbalance", "published")
    part_units = {"v": "param", "o": "param", "published": "param"}
    audit_key = "A_param"
    scale_law = {
        **invariant("vo", "qk", "relu", "gain", "stream", "rotation"),
        **{f"{part}.vo": "changes" for part in ("v", "o", "imbalance", "published")},
        **{f"{part}.gain": "changes" for part in ("v", "imbalance", "published")},
        "v.stream": -1,
        "o.stream": 1,
        "imbalance.stream": "changes",
        "published.stream": -1,
    }
    direction = "high: heads move the stream far; no value is better"
    source = "Elhage et al. (2021), A mathematical framework for transformer circuits"

    def update(self, snapshot: Snapshot) -> None:
        """Add the weights of a snapshot.

        Raises:
            ValueError: The model shows no value weights.
        """
        layers = given(snapshot.weights, "params").layers
        if not layers or any(layer.W_V.numel() == 0 for layer in layers):
            raise ValueError(
                "amplitude_param found no value weights: `Weights.layers` is empty or holds an "
                "empty W_V. A model with fused weights must hand out V as a slice."
            )
        for index, layer in enumerate(layers):
            self._add_layer(index, layer)
        whole = torch.stack([precise(layer.W_V).norm() for layer in layers])
        self.add(whole.sum(), n=1, part="published")

    def _add_layer(self, index: int, layer: LayerWeights) -> None:
        v, o = (precise(weight).norm(dim=(-2, -1)) for weight in (layer.W_V, layer.W_O))
        parts = {
            "": amplitude_param(layer.W_V, layer.W_O, layer.gain),
            "spectral": spectral_norm(layer.W_V, layer.W_O, layer.gain),
            "v": v,
            "o": o,
        }
        for part, values in parts.items():
            self.add(values, n=1, part=part, over=("head",), layer=index)
        self.add(
            v.log() - o.log(),
            n=(v > 0) & (o > 0),
            part="imbalance",
            over=("head",),
            layer=index,
            otherwise="W_V or W_O is 0",
        )
