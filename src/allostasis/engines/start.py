"""What a unit changes in the blocks that it is about, on the way from the clean pass to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from allostasis.engines.keys import CleanKeys
from allostasis.engines.prompts import Group
from allostasis.interventions.ablate import Unit
from allostasis.interventions.latent import Latents, with_latents
from allostasis.models.blocks import Call, Capture, Decoder


class Start:
    """The first changed block of (unit, kind) pairs, from the clean pass, and later changed ones.

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
        latents: Dictionaries by the layer that they read.
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
        latents: Mapping[int, Latents],
        keys: CleanKeys | None = None,
    ) -> None:
        self.decoder, self.clean, self.group, self.layer = decoder, clean, group, layer
        self.which, self.kind, self.source, self.latents = which, kind, source, latents
        self.units, self.keys = units, keys
        self.last = group.last[kind]
        self.n_positions = group.ids.shape[1]
        self._neurons: dict[str, Tensor] = {}
        self.runs_attention = any(self._site(unit) == "resid_pre" for unit in units)
        is_last = layer == decoder.n_layers - 1 and not self.runs_attention
        self.only_last = is_last or keys is not None

    @cached_property
    def present(self) -> list[tuple[Unit, Tensor]]:
        """The units that are among the pairs, with which pairs are theirs."""
        return [(self.units[i], self.which == i) for i in self.which.unique().tolist()]

    def after_block(self) -> Float[Tensor, "pair position d_model"]:
        """The stream behind the block, with every unit's change in it."""
        decoder, layer = self.decoder, self.layer
        pre = self._changed("resid_pre", self._rows(self.clean.resid_pre[layer]), layer)
        if self.runs_attention:
            attn_out = decoder.attention(layer, pre, self.call(layer))
        else:
            attn_out = self._rows(self.clean.attn_out[layer])
        after = self._rest(layer, pre, self._with_heads(attn_out))
        return self.at_last(after) if layer == decoder.n_layers - 1 else after

    def call(self, layer: int) -> Call:
        """Arguments with which a layer's attention takes the pairs' stream."""
        if self.keys is not None:
            return self.keys.call(layer, self.kind)
        return self.clean.calls[layer].rows(self.kind)

    def after_later_block(
        self,
        layer: int,
        resid: Float[Tensor, "pair position d_model"],
        attn_out: Float[Tensor, "pair position d_model"],
    ) -> Float[Tensor, "pair position d_model"]:
        """The stream behind a block after the first, in which a window's members are changed too.

        Args:
            layer: Which block.
            resid: The stream before it.
            attn_out: What its attention gives.
        """
        if any(layer in unit.layers for unit in self.units):
            return self._rest(layer, resid, attn_out)
        return self.decoder.after_attention(layer, resid, attn_out)

    def _rest(self, layer: int, pre: Tensor, attn_out: Tensor) -> Tensor:
        """A block from its attention's output on, with what the units change there."""
        decoder = self.decoder
        mid = self._changed("attn_out", decoder.attn_write(layer, attn_out), layer) + pre
        if not decoder.is_parallel:
            mid = self._changed("resid_mid", mid, layer)
        mlp = self._mlp_write(layer, pre if decoder.is_parallel else mid)
        return self._changed("resid_post", self._changed("mlp_out", mlp, layer) + mid, layer)

    def _mlp_write(self, layer: int, read: Tensor) -> Tensor:
        if all(unit.site != "mlp_post" for unit in self.units):
            return self.decoder.mlp_write(layer, read)
        neurons = self.decoder.mlp_post(layer, read)
        return self.decoder.mlp_write_of(layer, self._changed("mlp_post", neurons, layer))

    def at_last(
        self, stream: Float[Tensor, "pair position d_model"]
    ) -> Float[Tensor, "pair end d_model"]:
        """The last real tokens alone."""
        if stream.shape[1] < self.n_positions:
            return stream
        return stream[torch.arange(len(stream), device=stream.device)[:, None], self.last]

    @contextmanager
    def later_members(self) -> Iterator[None]:
        """Change heads of later layers while the model's own modules run there."""
        heads = [unit for unit in self.units if unit.site == "z"]
        later = {layer for unit in heads for layer in unit.layers if layer > self.layer}
        with ExitStack() as hooks:
            for layer in sorted(later):
                handle = self.decoder.out_projection(layer).register_forward_pre_hook(
                    self._hook(layer)
                )
                hooks.callback(handle.remove)
            yield

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
        ((unit, every),) = self.present

        def change(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            z = args[0].unflatten(-1, (self.decoder.n_heads, -1)).clone()
            there = self._source(unit, layer, every, only_last=z.shape[1] < self.n_positions)
            for head in unit.heads(layer):
                value = None if there is None else there[:, :, head]
                z[:, :, head] = self._where(unit, z[:, :, head], value, every)
            return (z.flatten(-2),)

        return change

    def _rows(self, stream: Float[Tensor, "kind position *rest"]) -> Tensor:
        """A clean stream's rows for the pairs; the last real token of each where that is enough."""
        if self.only_last:
            return stream[self.kind[:, None], self.last]
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
        units = self.units
        return self.keys is not None and all(u.op == "scale" and u.site == "z" for u in units)

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
        for unit, chosen in self.present:
            if unit.site != "z":
                continue
            there = self._source(unit, self.layer, chosen, only_last=self.only_last)
            for head in unit.heads(self.layer):
                now = clean[chosen, :, head]
                value = None if there is None else there[:, :, head]
                change[chosen, :, head] = self._where(unit, now, value, chosen) - now
        return change

    def _site(self, unit: Unit) -> str:
        """Where a unit acts; latents act on what their dictionary reads."""
        return self.latents[unit.layer].site if unit.site == "sae_latent" else unit.site

    def _changed(
        self, site: str, now: Float[Tensor, "pair position width"], layer: int
    ) -> Float[Tensor, "pair position width"]:
        """An activation of a layer with the changes of the units at a site."""
        if all(layer not in u.layers or self._site(u) != site for u in self.units):
            return now
        now, is_cut = now.clone(), now.shape[1] < self.n_positions
        for unit, chosen in self.present:
            if layer not in unit.layers or self._site(unit) != site:
                continue
            there = self._source(unit, layer, chosen, only_last=is_cut)
            within = unit.heads(layer) if site == "mlp_post" else []
            if within:  # some of the neurons
                rows = now[chosen]
                value = None if there is None else there[..., within]
                rows[..., within] = self._where(unit, rows[..., within], value, chosen)
                now[chosen] = rows
            else:
                now[chosen] = self._where(unit, now[chosen], there, chosen)
        return now

    def _source(self, unit: Unit, layer: int, chosen: Tensor, *, only_last: bool) -> Tensor | None:
        """The values that a unit puts in, for its pairs; what has a role stands where it does here.

        Args:
            unit: What is done.
            layer: Of which block.
            chosen: Which pairs.
            only_last: Whether only the last real token is there.
        """
        if unit.source is None:
            return None
        stream = self._stream(unit.source, unit.site, layer)
        kind, last = self.kind[chosen], self.last[chosen]
        if unit.role is None:
            return stream[kind[:, None], last] if only_last else stream[kind]
        place = self.group.aligned[unit.role][kind].clamp(min=0)
        if only_last:
            place = place.gather(1, last)
        return stream[kind[:, None], place]

    def _stream(self, name: str, site: str, layer: int) -> Tensor:
        """Another run's activations at a site."""
        found = self.source(name)
        if site == "resid_mid":
            return found.resid_pre[layer] + found.attn_write[layer]
        if site == "mlp_post":
            if name not in self._neurons:  # of the one layer that such units are about
                is_parallel = self.decoder.is_parallel
                read = self._stream(name, "resid_pre" if is_parallel else "resid_mid", layer)
                self._neurons[name] = self.decoder.mlp_post(layer, read)
            return self._neurons[name]
        names = {"attn_out": "attn_write", "mlp_out": "mlp_write", "resid_post": "resid_pre"}
        return getattr(found, names.get(site, site))[layer + (site == "resid_post")]

    def _where(self, unit: Unit, now: Tensor, source: Tensor | None, chosen: Tensor) -> Tensor:
        """The unit's value at its positions, what is there now at the others."""
        if unit.site == "sae_latent":
            value = with_latents(self.latents[unit.layer], now, unit)
        else:
            value = unit.value(now, source)
        last = self.last[chosen]
        if unit.role is None:
            mask = unit.mask(last[:, 0], self.n_positions)
        else:
            mask = self.group.aligned[unit.role][self.kind[chosen]] >= 0
        if mask is None:
            return value
        if now.shape[1] < self.n_positions:  # only the last real token is here
            mask = mask.gather(1, last)
        return torch.where(mask.view(*mask.shape, *[1] * (now.ndim - 2)), value, now)
