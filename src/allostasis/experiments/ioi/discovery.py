"""Which heads move the name: chosen by direct effect on one split, described by what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from allostasis.models.blocks import Capture, Decoder

TOP = 5
"""A copied name is among this many tokens that a head writes most."""


@dataclass(frozen=True)
class Portrait:
    """What a head does, reported beside its selection and not used for it.

    Attributes:
        attention: Mean attention from END to IO, less that to both mentions of S; in [-1, 1].
        copy_score: Share of names that the head, reading a name's embedding, writes among its
            `TOP` tokens; in [0, 1].
    """

    attention: float
    copy_score: float

    @property
    def is_name_mover(self) -> bool:
        """Whether it attends to IO more than to S, and copies at least half of the names."""
        return self.attention > 0 and self.copy_score >= 0.5


def attention_to_io(
    clean: Capture, roles: Sequence[dict[str, int]], heads: Sequence[tuple[int, int]]
) -> Float64[Tensor, "row head"]:
    """Attention from END to IO less that to S1 and S2, of chosen heads."""
    columns = []
    for layer, head in heads:
        pattern = clean.pattern[layer][:, head].double()
        rows = [
            weights[at["END"], at["IO"]]
            - weights[at["END"], at["S1"]]
            - weights[at["END"], at["S2"]]
            for weights, at in zip(pattern, roles, strict=True)
        ]
        columns.append(torch.stack(rows))
    return torch.stack(columns, dim=1) if columns else torch.zeros(len(roles), 0)


@torch.no_grad()
def copy_scores(
    decoder: Decoder, names: Int[Tensor, " name"], heads: Sequence[tuple[int, int]]
) -> list[float]:
    """Share of names among the `TOP` tokens of W_U LN(W_OV e), e a name's embedding.

    Args:
        decoder: The model.
        names: Token ids of names.
        heads: (layer, head) pairs.

    Returns:
        One share a head, in [0, 1]; 1: the head copies every name.
    """
    alone = decoder.capture(names[:, None])
    scores = []
    for layer, head in heads:
        found = Capture()
        with decoder.recording(found):
            # alone in its sentence a token attends to itself, so that z is its value vector
            decoder.attention(layer, alone.resid_pre[0], alone.calls[layer])
        write = found.value[0][:, head, 0] @ decoder.W_O(layer)[head]
        logits = decoder.unembed(decoder.final_norm(decoder.attn_write(layer, write)))
        best = logits.topk(TOP, dim=-1).indices
        scores.append(float((best == names[:, None]).any(dim=1).double().mean()))
    return scores
