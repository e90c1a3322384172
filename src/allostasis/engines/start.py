"""Where a unit's suffix starts: the stream behind the first block that it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from allostasis.engines.prompts import Group
from allostasis.interventions.ablate import Unit
from allostasis.models.blocks import Capture, Decoder


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
    ) -> None:
        self.decoder, self.clean, self.layer = decoder, clean, layer
        self.units, self.which, self.kind, self.source = units, which, kind, source
        self.last = group.last[kind.to(group.last.device)]
        self.n_positions = group.ids.shape[1]
        runs_attention = any(unit.site == "resid_pre" for unit in units)
        self.only_last = layer == decoder.n_layers - 1 and not runs_attention

    def after_block(self) -> Float[Tensor, "pair position d_model"]:
        """The stream behind the block, with every unit's change in it."""
        decoder, layer = self.decoder, self.layer
        pre = self._changed("resid_pre", self._rows(self.clean.resid_pre[layer]), "resid_pre")
        if any(unit.site == "resid_pre" for unit in self.units):
            attn_out = decoder.attention(layer, pre, self.clean.calls[layer].rows(self.kind))
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
        is_last = layer == decoder.n_layers - 1
        return self.at_last(after) if is_last and not self.only_last else after

    def at_last(
        self, stream: Float[Tensor, "pair position d_model"]
    ) -> Float[Tensor, "pair 1 d_model"]:
        """The last real token alone."""
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
            source = None if unit.source is None else self.source(unit.source).z[layer]
            for head in unit.heads(layer):
                there = None if source is None else source[self.kind, :, head]
                z[:, :, head] = self._where(unit, z[:, :, head], there)
            return (z.flatten(-2),)

        return change

    def _rows(self, stream: Float[Tensor, "kind position *rest"]) -> Tensor:
        """A clean stream's rows for the pairs; the last real token of each where that is enough."""
        kind = self.kind.to(stream.device)
        if self.only_last:
            return stream[kind, self.last][:, None]
        return stream[kind]

    def _with_heads(
        self, attn_out: Float[Tensor, "pair position d_model"]
    ) -> Float[Tensor, "pair position d_model"]:
        if all(unit.site != "z" for unit in self.units):
            return attn_out
        clean = self._rows(self.clean.z[self.layer])
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
        return attn_out + change.flatten(-2) @ self.decoder.W_O(self.layer).flatten(0, 1)

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
        last = self.last if chosen is None else self.last[chosen.to(self.last.device)]
        mask = unit.mask(last, self.n_positions)
        if mask is None:
            return value
        if now.shape[1] == 1:  # only the last real token is here
            mask = mask[torch.arange(len(last), device=last.device), last][:, None]
        return torch.where(mask.view(*mask.shape, *[1] * (now.ndim - 2)), value, now)
