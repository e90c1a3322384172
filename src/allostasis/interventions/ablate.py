"""What one intervention is, and the value that it puts in an activation's place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Site = Literal["z", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post"]
Op = Literal["scale", "mean", "resample", "patch"]
Member = tuple[int, int | None]

SITES: tuple[Site, ...] = ("z", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One intervention: what is changed, where, and into what.

    Attributes:
        members: (layer, head) pairs at site `z`; one (layer, None) at every other site.
        site: `z`, a head's output before W_O; `attn_out` and `mlp_out`, what a sublayer adds to the
            stream; `resid_pre`, `resid_mid`, `resid_post`, the stream around and within a block.
        op: `scale` multiplies by `scale`; the others put another value there: the `mean` over a
            reference set, a donor's (`resample`), or the other run's of a pair (`patch`).
        scale: Factor of `scale`; 0 is zero ablation, 1 changes nothing.
        donor: Which donor, for `resample`; None leaves it open, for a unit that is averaged over
            several.
        positions: `all`, `last` (the last real token), or token indices.

    Raises:
        ValueError: The fields do not fit together.
    """

    members: tuple[Member, ...]
    site: Site = "z"
    op: Op = "scale"
    scale: float = 0.0
    donor: int | None = None
    positions: Literal["all", "last"] | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("a unit without members changes nothing; name at least one")
        if len(set(self.members)) < len(self.members):
            raise ValueError(f"a unit names a member twice: {self.members}")
        heads = [head for _, head in self.members]
        if self.site == "z" and None in heads:
            raise ValueError(f"site z is made of heads; give (layer, head), got {self.members}")
        if self.site != "z" and (heads != [None]):
            raise ValueError(
                f"site {self.site} has no heads and takes one (layer, None); got {self.members}"
            )
        if self.op != "resample" and self.donor is not None:
            raise ValueError(f"op {self.op} with donor={self.donor}: only resample has donors")

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
        if self.op == "scale":
            return None
        return self.op if self.donor is None else f"{self.op}{self.donor}"

    @property
    def key(self) -> str:
        """Canonical text: `zero:9.6+9.9`, `scale0.5:3.1`, `patch:resid_post@12[last]`."""
        verb = self.source or ("zero" if self.scale == 0 else f"scale{self.scale:g}")
        if self.site == "z":
            names = [f"{layer}.{head}" for layer, head in sorted(self.members, key=_order)]
            what = "+".join(names)
        else:
            what = f"{self.site}@{self.layer}"
        if self.positions == "all":
            return f"{verb}:{what}"
        where = self.positions if self.positions == "last" else ",".join(map(str, self.positions))
        return f"{verb}:{what}[{where}]"

    def heads(self, layer: int) -> list[int]:
        """The heads that are changed in a layer."""
        return sorted(head for at, head in self.members if at == layer and head is not None)

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
        if self.positions == "all":
            return None
        at = torch.arange(n_positions, device=last.device)
        if self.positions == "last":
            return at == last[:, None]
        chosen = torch.tensor(self.positions, device=last.device)
        return torch.isin(at, chosen).expand(len(last), -1)


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
