"""Which patches a config names: granularities, positions, windows, neurons."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from allostasis.experiments.heads.tables import Planned
from allostasis.interventions.ablate import ALIGNED, Member, Site, Unit

Granularity = Literal["layer_resid", "mlp_out", "head_out", "mlp_post"]
Windows = Literal["thirds"] | list[tuple[int, int]]
Where = str | tuple[int, ...]

SITES: dict[Granularity, Site] = {
    "layer_resid": "resid_post", "mlp_out": "mlp_out", "head_out": "z", "mlp_post": "mlp_post",
}  # fmt: skip
JOINT: dict[str, Site] = {"mlp_out": "mlp_out", "head_out": "attn_out"}
"""Windows: all heads of a layer together are its attention's output."""

THIRDS = ("early", "middle", "late")
FULL_OVERWRITE, NOT_READ = "full_overwrite", "not_read"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is patched.

    Attributes:
        n_layers: Layers of the model.
        granularity: What, one after the other.
        positions: Where, one a granularity: `all`, `last`, `each`, `aligned:ROLE` or indices.
        layers: In which layers.
        heads: Which heads, for `head_out`.
        neurons: Which (layer, neuron) pairs, for `mlp_post`.
        windows: Layers that are patched together, first and last included, by name.
        reach: How many positions from the end back can differ between the runs, for `each`.
    """

    n_layers: int
    granularity: tuple[Granularity, ...]
    positions: tuple[Where, ...]
    layers: Sequence[int]
    heads: Sequence[Member]
    neurons: Sequence[Member]
    windows: Sequence[tuple[str, int, int]]
    reach: int

    def planned(self) -> list[Planned]:
        """The patches, in the order of their first layers."""
        found = []
        for granularity, where in zip(self.granularity, self.positions, strict=True):
            singles = itertools.product(self._places(where), self._members(granularity))
            # a window is patched as a whole, at all positions where single layers are at each
            whole = [("all" if where == "each" else where, None)]
            joint = itertools.product(whole, self._windows(granularity))
            for (positions, distance), (name, site, members) in [*singles, *joint]:
                unit = Unit(site=site, op="patch", members=members, positions=positions)
                facts = {
                    "granularity": granularity,
                    "position": distance,
                    "degenerate": self._degenerate(unit),
                }
                found.append(Planned(unit, unit.key, name, "patch", facts))
        return sorted(found, key=lambda each: each.unit.layer)

    def _places(self, where: Where) -> list[tuple[Where, int | None]]:
        """Positions of units, with their distance from the end where each is patched alone."""
        if where != "each":
            return [(where, None)]
        rest = range(2, self.reach + 1)
        return [("last", -1), *((f"{ALIGNED}-{back}", -back) for back in rest)]

    def _members(self, granularity: Granularity) -> list[tuple[str, Site, tuple[Member, ...]]]:
        """Kind of set, site and members of each patch of a granularity."""
        site = SITES[granularity]
        if granularity == "head_out":
            return [("head", site, (head,)) for head in self.heads]
        if granularity == "mlp_post":
            return [("neuron", site, (neuron,)) for neuron in self.neurons]
        return [("layer", site, ((layer, None),)) for layer in self.layers]

    def _windows(self, granularity: Granularity) -> list[tuple[str, Site, tuple[Member, ...]]]:
        """The same of layers that are patched together."""
        if granularity not in JOINT:
            return []
        return [
            (name, JOINT[granularity], tuple((layer, None) for layer in range(first, last + 1)))
            for name, first, last in self.windows
        ]

    def _degenerate(self, unit: Unit) -> str | None:
        """Why a patch says nothing about the model, whatever the model; None where it may."""
        is_last = unit.layer == self.n_layers - 1
        at_end = unit.positions in {"all", "last", f"{ALIGNED}END"}
        overwrites = unit.positions == "all" or (is_last and at_end)
        if unit.site == "resid_post" and overwrites:
            return FULL_OVERWRITE
        is_elsewhere = unit.role is not None and not at_end and unit.role.startswith("-")
        return NOT_READ if is_last and is_elsewhere else None


def places(
    positions: str | Sequence[int] | Sequence[str], granularity: Sequence[Granularity]
) -> tuple[Where, ...]:
    """Where each granularity is patched.

    Raises:
        ValueError: As many words as granularities are needed, or one for all of them.
    """
    if isinstance(positions, str):
        return (positions,) * len(granularity)
    if all(isinstance(place, int) for place in positions):
        return (tuple(int(place) for place in positions),) * len(granularity)
    words = [str(place) for place in positions]
    if len(words) != len(granularity):
        raise ValueError(
            f"module.positions={words} are {len(words)} for {len(granularity)} granularities "
            f"({', '.join(granularity)}); give one for all of them, or one each"
        )
    return tuple(words)


def windows_of(
    windows: Windows, granularity: Sequence[Granularity], n_layers: int
) -> list[tuple[str, int, int]]:
    """Windows by name, with their first and last layer.

    Raises:
        ValueError: A window is not one, or nothing is patched that a window has.
    """
    if not windows:
        return []
    if not {*granularity} & {*JOINT}:
        raise ValueError(
            f"module.windows patches layers together, which granularity {[*granularity]} does not "
            "have: of layer_resid it is the patch of the window's last layer; add mlp_out or "
            "head_out, or take windows=[]"
        )
    if windows == "thirds":
        edges = np.linspace(0, n_layers, 4).round().astype(int)
        parts = [(int(a), int(b) - 1) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        named = zip(THIRDS, parts, strict=True)
        return [(name, first, last) for name, (first, last) in named if last > first]
    for first, last in windows:
        if not 0 <= first < last < n_layers:
            raise ValueError(
                f"module.windows: [{first}, {last}] is no window of two or more layers among 0 to "
                f"{n_layers - 1}, first and last included"
            )
    return [("window", first, last) for first, last in windows]
