"""Which layers and heads a config names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from allostasis.interventions.ablate import parse_heads
from allostasis.models.blocks import Decoder

Layers = Literal["all"] | int | list[int]


def layers(decoder: Decoder, chosen: Layers) -> list[int]:
    """All layers, those of a list, or so many from the first to the last.

    Raises:
        ValueError: The list is empty or names a layer that is not there.
    """
    n = decoder.n_layers
    if chosen == "all":
        return [*range(n)]
    if isinstance(chosen, int):
        if not 1 <= chosen <= n:
            raise ValueError(f"module.layers={chosen}: the model has 1 to {n} layers to take")
        return sorted({int(layer) for layer in np.linspace(0, n - 1, chosen).round()})
    if not chosen:
        raise ValueError("module.layers is an empty list, so that nothing would be done")
    wrong = [layer for layer in chosen if not 0 <= layer < n]
    if wrong:
        raise ValueError(f"module.layers: the model has layers 0 to {n - 1}, not {wrong}")
    return sorted(set(chosen))


def heads(
    decoder: Decoder, chosen: Literal["all"] | Sequence[str], within: Layers
) -> list[tuple[int, int]]:
    """All heads of some layers, or those of a list that are in them.

    Raises:
        ValueError: The list is empty or names a head that is not there.
    """
    there = layers(decoder, within)
    if chosen == "all":
        return [(layer, head) for layer in there for head in range(decoder.n_heads)]
    if not chosen:
        raise ValueError(
            "module.heads is an empty list, so that nothing would be done; name heads as "
            "LAYER.HEAD, for example 9.6, or take all"
        )
    names = parse_heads([*chosen], n_layers=decoder.n_layers, n_heads=decoder.n_heads)
    return [head for head in sorted(set(names)) if head[0] in there]
