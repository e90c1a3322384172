"""One intervention followed through every layer: what each part then writes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from allostasis.interventions.ablate import Unit
from allostasis.models.blocks import STREAMS, Capture, Decoder


@torch.no_grad()
def clean_trace(decoder: Decoder, ids: Int[Tensor, "row position"]) -> Capture:
    """The untouched model's pass over prompts of one length, with patterns and values."""
    patterns = Capture()
    with decoder.recording(patterns):
        found = decoder.capture(ids)
    found.pattern.extend(patterns.pattern)
    found.value.extend(patterns.value)
    return found


@torch.no_grad()
def trace(
    decoder: Decoder, clean: Capture, unit: Unit, sources: Mapping[str, Capture] | None = None
) -> Capture:
    """The same prompts' pass with heads changed at all positions.

    Layers before the unit's first are those of the clean pass, not copies.

    Args:
        decoder: The model.
        clean: What `clean_trace` gave.
        unit: Heads, in one or several layers.
        sources: The pass whose values are put in, by `Unit.source`.

    Raises:
        ValueError: The unit changes anything but heads, or not at all positions.
    """
    if unit.site != "z" or unit.positions != "all":
        raise ValueError(f"{unit.key}: only heads are traced, at all positions")
    source = None if unit.source is None else (sources or {})[unit.source]
    first = unit.layer
    found = Capture(calls=clean.calls)
    for name in STREAMS:
        n_kept = first + 1 if name in {"resid_pre", "pattern", "value"} else first
        getattr(found, name).extend(getattr(clean, name)[:n_kept])

    def changed(layer: int, z: Tensor) -> Tensor:
        z = z.clone()
        for head in unit.heads(layer):
            z[:, :, head] = unit.value(
                z[:, :, head], None if source is None else source.z[layer][:, :, head]
            )
        return z

    def watch(layer: int) -> Any:
        def out_in(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            z = changed(layer, args[0].unflatten(-1, (decoder.n_heads, -1)))
            found.z.append(z)
            return (z.flatten(-2),)

        return out_in

    z = changed(first, clean.z[first])
    found.z.append(z)
    change = (z - clean.z[first]).flatten(-2) @ decoder.W_O(first).flatten(0, 1)
    _finish(decoder, found, first, clean.attn_out[first] + change)
    with decoder.recording(found), ExitStack() as hooks:
        for layer in range(first + 1, decoder.n_layers):
            handle = decoder.out_projection(layer).register_forward_pre_hook(watch(layer))
            hooks.callback(handle.remove)
            resid = found.resid_pre[layer]
            _finish(decoder, found, layer, decoder.attention(layer, resid, clean.calls[layer]))
    return found


def _finish(decoder: Decoder, found: Capture, layer: int, attn_out: Tensor) -> None:
    """Add the rest of a block, from its attention's output."""
    pre = found.resid_pre[layer]
    write = decoder.attn_write(layer, attn_out)
    mid = pre + write
    mlp = decoder.mlp_write(layer, pre if decoder.is_parallel else mid)
    found.attn_out.append(attn_out)
    found.attn_write.append(write)
    found.mlp_write.append(mlp)
    found.resid_pre.append(mid + mlp)
