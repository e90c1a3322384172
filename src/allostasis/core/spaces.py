"""Where in a model something is read, and which weights act there."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """A place in the residual stream, as calibration, intervention and log all name it.

    Attributes:
        name: The hook point.
        norm_before: Its value has just left a norm, so that its size is the norm's gain.
        all_readers_normalise: Whatever reads it normalises it first, so that a positive scale per
            token is undone.
        feeds_unembed: It is read by the bias-free unembedding alone, so that a positive scale per
            token changes no argmax.
    """

    name: str
    norm_before: bool
    all_readers_normalise: bool
    feeds_unembed: bool


@dataclass(frozen=True)
class LayerWeights:
    """One layer's attention weights, per head, and what stands before them.

    Values are slices of the model's own parameters: a model with a fused QKV matrix cuts them out,
    and one with grouped queries repeats the shared V for each head of its group.

    Attributes:
        W_Q: Query weights.
        W_K: Key weights.
        W_V: Value weights.
        W_O: Output weights.
        gain: Gain of the norm before attention, or None where there is no norm.
    """

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    gain: Float[Tensor, " d_model"] | None = None


@dataclass(frozen=True)
class Weights:
    """What a metric may know of a model's parameters, whatever the model's class.

    Attributes:
        layers: Attention weights, one entry a layer.
        W_U: Unembedding.
        final_gain: Gain of the norm before the unembedding, or None where there is no norm.
        named: Every trainable parameter by its own name.
        groups: Parameter names by group: `embed`, `qk`, `ov`, `mlp`, `unembed`; they partition
            `named`.
    """

    layers: tuple[LayerWeights, ...]
    W_U: Float[Tensor, "d_model d_vocab"]
    final_gain: Float[Tensor, " d_model"] | None
    named: dict[str, Tensor]
    groups: dict[str, tuple[str, ...]]
