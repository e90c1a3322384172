"""Keys and values of a clean pass, for suffixes that run the last token alone."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.models.blocks import Call, Capture, Decoder

CACHES = ("past_key_values", "layer_past")
"""What attentions of `transformers` call the argument that keeps keys and values."""


class CleanKeys:
    """The clean pass as a cache that a changed last token is run against.

    Keys and values of a token depend on that token alone, and a change of the last token reaches no
    other: those of the other tokens are the clean ones in every layer.

    Args:
        decoder: The model.
        clean: A pass over prompts of one length, without padding.
    """

    def __init__(self, decoder: Decoder, clean: Capture) -> None:
        self.decoder, self.clean = decoder, clean
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def call(self, layer: int, kind: Int[Tensor, " pair"]) -> Call:
        """Arguments with which a layer's attention takes the last tokens of some rows."""
        call = self.clean.calls[layer].rows(kind)
        key, value = (kept[kind] for kept in self._earlier(layer))
        kwargs = {name: _last(name, given) for name, given in call.kwargs.items()}
        return Call(call.args, {**kwargs, self._name(call): _Earlier(key, value)}, len(kind))

    def _earlier(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens but the last, one row a prompt."""
        if layer not in self._known:
            call, cache = self.clean.calls[layer], _Recorder()
            call = Call(call.args, {**call.kwargs, self._name(call): cache}, call.n_rows)
            self.decoder.attention(layer, self.clean.resid_pre[layer], call)
            self._known[layer] = cache.kept
        return self._known[layer]

    @staticmethod
    def _name(call: Call) -> str:
        name = next((name for name in CACHES if name in call.kwargs), None)
        assert name is not None, f"no cache among the arguments of attention: {[*call.kwargs]}"
        return name


def _last(name: str, given: Any) -> Any:
    """What of an argument belongs to the last position."""
    if isinstance(given, tuple):
        return tuple(_last(name, entry) for entry in given)
    if not isinstance(given, Tensor):
        return given
    if name == "attention_mask":  # [row, head, query, key]
        return given[..., -1:, :]
    return given[:, -1:] if given.ndim > 1 else given[-1:]  # [row, position, ...] or [position]


class _Recorder:
    """A cache that keeps what it is shown."""

    kept: tuple[Tensor, Tensor]

    def update(
        self,
        key: Float[Tensor, "row head position d_head"],
        value: Float[Tensor, "row head position d_head"],
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        self.kept = key[:, :, :-1], value[:, :, :-1]
        return key, value


class _Earlier:
    """A cache that holds the earlier tokens of each row."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def update(
        self,
        key: Float[Tensor, "row head 1 d_head"],
        value: Float[Tensor, "row head 1 d_head"],
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
