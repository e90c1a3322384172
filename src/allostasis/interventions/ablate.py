"""What one intervention is, and the value that it puts in an activation's place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Site = Literal[
    "z", "attn_out", "mlp_post", "mlp_out", "resid_pre", "resid_mid", "resid_post", "sae_latent"
]
Op = Literal["scale", "set", "mean", "resample", "patch", "reconstruct"]
Member = tuple[int, int | None]

SITES: tuple[Site, ...] = get_args(Site)
ALIGNED = "aligned:"
"""Positions that differ from prompt to prompt: `aligned:ROLE` are those that have a role."""

OF_LATENTS: tuple[Op, ...] = ("scale", "set", "reconstruct")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One intervention: what is changed, where, and into what.

    Attributes:
        members: (layer, head) pairs at site `z`; (layer, neuron) pairs of one layer at `mlp_post`
            and (layer, latent) pairs of one layer at `sae_latent`, or (layer, None) for all of
            them; (layer, None) at every other site, one or, at `attn_out` and `mlp_out`, several.
        site: `z`, a head's output before W_O; `attn_out` and `mlp_out`, what a sublayer adds to the
            stream; `mlp_post`, the MLP's neurons after their non-linearity; `resid_pre`,
            `resid_mid`, `resid_post`, the stream around and within a block; `sae_latent`, latents
            of a dictionary, whose reconstruction error stays as it is.
        op: `scale` multiplies by `scale`; `set` puts `scale` in a latent's place; `reconstruct`
            puts a dictionary's reconstruction in its input's; the others put another value there:
            the `mean` over a reference set, a donor's (`resample`), or the other run's of a pair
            (`patch`).
        scale: Factor of `scale`; 0 is zero ablation, 1 changes nothing. Value of `set`.
        donor: Which donor, for `resample`; None leaves it open, for a unit that is averaged over
            several.
        positions: `all`, `last` (the last real token), token indices, or `aligned:ROLE`: the
            positions that have a role in each prompt, from those that have it in the other run.

    Raises:
        ValueError: The fields do not fit together.
    """

    members: tuple[Member, ...]
    site: Site = "z"
    op: Op = "scale"
    scale: float = 0.0
    donor: int | None = None
    positions: str | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a unit without members changes nothing; name at least one")
        if len(set(self.members)) < len(self.members):
            raise ValueError(f"a unit names a member twice: {self.members}")
        self._check_members([index for _, index in self.members])
        if self.op != "resample" and self.donor is not None:
            raise ValueError(f"op {self.op} with donor={self.donor}: only resample has donors")
        if self.op in {"set", "reconstruct"} and self.site != "sae_latent":
            raise ValueError(f"op {self.op} is for site sae_latent, not {self.site}")
        is_word = isinstance(self.positions, str) and self.role is None
        if is_word and self.positions not in {"all", "last"}:
            raise ValueError(
                f"positions '{self.positions}': allowed are all, last, {ALIGNED}ROLE and token "
                "indices"
            )

    def _check_members(self, within: list[int | None]) -> None:
        """Refuse members that the site does not have."""
        if self.site == "z" and None in within:
            raise ValueError(f"site z is made of heads; give (layer, head), got {self.members}")
        if self.site in {"mlp_post", "sae_latent"}:
            whole = within == [None]
            if (None in within and not whole) or len(self.layers) > 1:
                raise ValueError(
                    f"site {self.site} takes (layer, index) pairs of one layer, or one "
                    f"(layer, None); got {self.members}"
                )
            if self.site == "sae_latent" and self.op not in OF_LATENTS:
                raise ValueError(
                    f"op {self.op} does not fit latents; allowed: {', '.join(OF_LATENTS)}"
                )
            if self.site == "sae_latent" and whole != (self.op == "reconstruct"):
                raise ValueError("op reconstruct takes (layer, None); other ops name their latents")
        elif self.site in {"attn_out", "mlp_out"}:
            if any(index is not None for index in within):
                raise ValueError(
                    f"site {self.site} has no heads and takes (layer, None); got {self.members}"
                )
        elif self.site != "z" and within != [None]:
            raise ValueError(
                f"site {self.site} has no heads and takes one (layer, None); got {self.members}"
            )

    @property
    def layer(self) -> int:
        """The first layer that is changed."""
        return min(layer for layer, _ in self.members)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are changed, in order."""
        return tuple(sorted({layer for layer, _ in self.members}))

    @property
    def is_scaled_throughout(self) -> bool:
        """Whether heads are multiplied at all positions, and no other run is needed."""
        return self.site == "z" and self.op == "scale" and self.positions == "all"

    @property
    def source(self) -> str | None:
        """The name of the run whose values are put in, or None where the unit needs none."""
        if self.op in OF_LATENTS:
            return None
        return self.op if self.donor is None else f"{self.op}{self.donor}"

    @property
    def role(self) -> str | None:
        """Which role its positions have, where they differ from prompt to prompt."""
        if isinstance(self.positions, str) and self.positions.startswith(ALIGNED):
            return self.positions.removeprefix(ALIGNED)
        return None

    @property
    def key(self) -> str:
        """Canonical text: `zero:9.6+9.9`, `scale0.5:3.1`, `patch:resid_post@12[last]`.

        Layers of a window are `patch:mlp_out@9-13`, neurons `patch:mlp_post@4:7+31`.
        """
        return f"{self.verb}:{self.what}"

    @property
    def verb(self) -> str:
        """What is done: the first part of the key."""
        if self.op == "set":
            return f"set{self.scale:g}"
        return self.source or (
            self.op if self.op == "reconstruct"
            else "zero" if self.scale == 0 else f"scale{self.scale:g}"
        )  # fmt: skip

    @property
    def what(self) -> str:
        """What it is done to, and where: the rest of the key."""
        members = sorted(self.members, key=_order)
        if self.site == "z":
            what = "+".join(f"{layer}.{head}" for layer, head in members)
        else:
            what = f"{self.site}@{_layers(self.layers)}"
            within = [str(index) for _, index in members if index is not None]
            what += f":{'+'.join(within)}" if within else ""
        if self.positions == "all":
            return what
        is_word = isinstance(self.positions, str)
        return f"{what}[{self.positions if is_word else ','.join(map(str, self.positions))}]"

    def heads(self, layer: int) -> list[int]:
        """The heads, neurons or latents that are changed in a layer."""
        return sorted(index for at, index in self.members if at == layer and index is not None)

    def value(
        self, now: Float[Tensor, "*shape"], source: Float[Tensor, "*shape"] | None
    ) -> Float[Tensor, "*shape"]:
        """What stands in an activation's place.

        Args:
            now: The activation.
            source: The same place in the other run; None for `scale`.
        """
        if self.op == "scale":
            return now * self.scale
        assert source is not None
        return source

    def mask(self, last: Tensor, n_positions: int) -> Tensor | None:
        """Which positions are changed, as [row, position]; None for all of them.

        Args:
            last: Index of each row's last real token.
            n_positions: Positions of the batch.
        """
        assert self.role is None, "only the prompts know which positions have a role"
        if self.positions == "all":
            return None
        at = torch.arange(n_positions, device=last.device)
        if self.positions == "last":
            return at == last[:, None]
        chosen = torch.tensor(self.positions, device=last.device)
        return torch.isin(at, chosen).expand(len(last), -1)


def _layers(layers: tuple[int, ...]) -> str:
    """Layers as `9`, `9-13` where none is left out between, or `9+11`."""
    first, last = min(layers), max(layers)
    is_window = first < last and layers == tuple(range(first, last + 1))
    return f"{first}-{last}" if is_window else "+".join(map(str, layers))


def _order(member: Member) -> tuple[int, int]:
    return member[0], -1 if member[1] is None else member[1]


def parse_heads(names: Sequence[str], *, n_layers: int, n_heads: int) -> list[tuple[int, int]]:
    """Read heads written LAYER.HEAD.

    Raises:
        ValueError: A name is not of that form, or the model has no such head; says which exist.

    Example:
        >>> parse_heads(["9.6", "10.0"], n_layers=12, n_heads=12)
        [(9, 6), (10, 0)]
    """
    found = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d+)", name)
        if match is None:
            raise ValueError(f"'{name}' is no head. Heads are written LAYER.HEAD, for example 9.6.")
        layer, head = int(match[1]), int(match[2])
        if layer >= n_layers:
            raise ValueError(
                f"head {name} does not exist: the model has layers 0 to {n_layers - 1}. "
                "Heads are written LAYER.HEAD, for example 9.6."
            )
        if head >= n_heads:
            raise ValueError(
                f"head {head} does not exist in layer {layer}: the model has heads 0 to "
                f"{n_heads - 1}. Heads are written LAYER.HEAD, for example 9.6."
            )
        found.append((layer, head))
    return found
