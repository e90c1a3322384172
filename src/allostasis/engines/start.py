"""Where a unit's suffix starts: the stream behind the first block that it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from allostasis.engines.keys import CleanKeys
from allostasis.engines.prompts import Group
from allostasis.interventions.ablate import Unit
from allostasis.models.blocks import Call, Capture, Decoder


class Start:
    """The first changed block of (unit, kind) pairs, from the clean pass.

    In the last block only the last real token is kept, unless attention has to be run there.

    Args:
        decoder: The model.
        clean: The clean pass of the group.
        group: Its prompts.
        layer: The first layer that the units change.
        units: What is done; several layers only where there is one unit.
        which: For each pair, its unit.
        kind: For each pair, its row of the clean pass.
        source: Gives the values that are put in, by name.
        keys: Where all units change the last token alone: the clean keys and values, against which
            that token alone is run.
    """

    def __init__(
        self,
        decoder: Decoder,
        clean: Capture,
        group: Group,
        layer: int,
        units: Sequence[Unit],
        which: Int[Tensor, " pair"],
        kind: Int[Tensor, " pair"],
        source: Callable[[str], Capture],
        keys: CleanKeys | None = None,
    ) -> None:
        self.decoder, self.clean, self.layer = decoder, clean, layer
        self.units, self.which, self.kind, self.source = units, which, kind, source
        self.keys = keys
        self.last = group.last[kind]
        self.n_positions = group.ids.shape[1]
        runs_attention = any(unit.site == "resid_pre" for unit in units)
        is_last = layer == decoder.n_layers - 1 and not runs_attention
        self.only_last = is_last or keys is not None

    def after_block(self) -> Float[Tensor, "pair position d_model"]:
        """The stream behind the block, with every unit's change in it."""
        decoder, layer = self.decoder, self.layer
        pre = self._changed("resid_pre", self._rows(self.clean.resid_pre[layer]), "resid_pre")
        if any(unit.site == "resid_pre" for unit in self.units):
            attn_out = decoder.attention(layer, pre, self.call(layer))
        else:
            attn_out = self._rows(self.clean.attn_out[layer])
        attn_out = self._with_heads(attn_out)
        write = self._changed("attn_out", decoder.attn_write(layer, attn_out), "attn_write")
        mid = write + pre
        if not decoder.is_parallel:
            mid = self._changed_mid(mid)
        mlp = decoder.mlp_write(layer, pre if decoder.is_parallel else mid)
        post = self._changed("mlp_out", mlp, "mlp_write") + mid
        after = self._changed("resid_post", post, "resid_pre", later=1)
        return self.at_last(after) if layer == decoder.n_layers - 1 else after

    def call(self, layer: int) -> Call:
        """Arguments with which a layer's attention takes the pairs' stream."""
        if self.keys is not None:
            return self.keys.call(layer, self.kind)
        return self.clean.calls[layer].rows(self.kind)

    def at_last(
        self, stream: Float[Tensor, "pair position d_model"]
    ) -> Float[Tensor, "pair 1 d_model"]:
        """The last real token alone."""
        if stream.shape[1] == 1:
            return stream
        return stream[torch.arange(len(stream), device=stream.device), self.last][:, None]

    @contextmanager
    def later_members(self) -> Iterator[None]:
        """Change heads of later layers while the model's own modules run there."""
        later = {layer for unit in self.units for layer in unit.layers if layer > self.layer}
        with ExitStack() as hooks:
            for layer in sorted(later):
                handle = self.decoder.out_projection(layer).register_forward_pre_hook(
                    self._hook(layer)
                )
                hooks.callback(handle.remove)
            yield

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
        (unit,) = self.units

        def change(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            z = args[0].unflatten(-1, (self.decoder.n_heads, -1)).clone()
            source = None if unit.source is None else self._rows(self.source(unit.source).z[layer])
            for head in unit.heads(layer):
                there = None if source is None else source[:, :, head]
                z[:, :, head] = self._where(unit, z[:, :, head], there)
            return (z.flatten(-2),)

        return change

    def _rows(self, stream: Float[Tensor, "kind position *rest"]) -> Tensor:
        """A clean stream's rows for the pairs; the last real token of each where that is enough."""
        if self.only_last:
            return stream[self.kind, self.last][:, None]
        return stream[self.kind]

    def _with_heads(
        self, attn_out: Float[Tensor, "pair position d_model"]
    ) -> Float[Tensor, "pair position d_model"]:
        if all(unit.site != "z" for unit in self.units):
            return attn_out
        clean = self._rows(self.clean.z[self.layer])
        if all(unit.is_scaled_throughout for unit in self.units) or self._is_scaled_at_last:
            change = clean * (self._factors(clean) - 1)
        else:
            change = self._change(clean)
        return attn_out + change.flatten(-2) @ self.decoder.W_O(self.layer).flatten(0, 1)

    @property
    def _is_scaled_at_last(self) -> bool:
        return self.keys is not None and all(unit.op == "scale" for unit in self.units)

    def _factors(
        self, like: Float[Tensor, "pair position head d_head"]
    ) -> Float[Tensor, "pair 1 head 1"]:
        """By what each head is multiplied: in one table, so that no unit waits for another."""
        table = torch.ones(len(self.units), self.decoder.n_heads)
        for index, unit in enumerate(self.units):
            table[index, unit.heads(self.layer)] = unit.scale
        return table.to(like)[self.which][:, None, :, None]

    def _change(
        self, clean: Float[Tensor, "pair position head d_head"]
    ) -> Float[Tensor, "pair position head d_head"]:
        """What is added to the heads' outputs, unit by unit."""
        change = torch.zeros_like(clean)
        for index, unit in enumerate(self.units):
            chosen = self.which == index
            source = None
            if unit.source is not None:
                source = self._rows(self.source(unit.source).z[self.layer])[chosen]
            for head in unit.heads(self.layer):
                now = clean[chosen, :, head]
                there = None if source is None else source[:, :, head]
                change[chosen, :, head] = self._where(unit, now, there, chosen) - now
        return change

    def _changed(
        self, site: str, now: Float[Tensor, "pair position d_model"], name: str, later: int = 0
    ) -> Float[Tensor, "pair position d_model"]:
        """An activation with the changes of the units at a site, whose values a source calls so."""
        for index, unit in enumerate(self.units):
            if unit.site == site:
                chosen = self.which == index
                source = None
                if unit.source is not None:
                    found = getattr(self.source(unit.source), name)[self.layer + later]
                    source = self._rows(found)[chosen]
                now = now.clone()
                now[chosen] = self._where(unit, now[chosen], source, chosen)
        return now

    def _changed_mid(
        self, mid: Float[Tensor, "pair position d_model"]
    ) -> Float[Tensor, "pair position d_model"]:
        for index, unit in enumerate(self.units):
            if unit.site == "resid_mid":
                chosen = self.which == index
                source = None
                if unit.source is not None:
                    other = self.source(unit.source)
                    found = other.resid_pre[self.layer] + other.attn_write[self.layer]
                    source = self._rows(found)[chosen]
                mid = mid.clone()
                mid[chosen] = self._where(unit, mid[chosen], source, chosen)
        return mid

    def _where(
        self, unit: Unit, now: Tensor, source: Tensor | None, chosen: Tensor | None = None
    ) -> Tensor:
        """The unit's value at its positions, what is there now at the others."""
        value = unit.value(now, source)
        last = self.last if chosen is None else self.last[chosen]
        mask = unit.mask(last, self.n_positions)
        if mask is None:
            return value
        if now.shape[1] == 1:  # only the last real token is here
            mask = mask[torch.arange(len(last), device=last.device), last][:, None]
        return torch.where(mask.view(*mask.shape, *[1] * (now.ndim - 2)), value, now)
