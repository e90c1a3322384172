"""What the report of `heads_patch` shows: traces by layer and position, heads, windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from allostasis.analysis import heatmap, lab_tables
from allostasis.analysis import patch_figures as patch
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure
from allostasis.analysis.heatmap import HeadMap
from allostasis.analysis.tables import Table

VERBS = {
    "denoise": "clean values put into the corrupt run",
    "noise": "corrupt values put into the clean run",
}
TRACED = {"layer_resid": "the stream behind a layer", "mlp_out": "what an MLP writes"}


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Causal traces by layer and position, then heads; recovery first, then plain changes."""
    found: list[Figure] = []
    for granularity, what in TRACED.items():
        for verb, how in VERBS.items():
            maps = partial(patch.layers, arms, patch.RECOVERY, granularity, verb)
            found.append(_figure(
                f"layers_{granularity}_{verb}", f"Causal trace of {what}: {how}",
                "Recovery by layer and position, counted back from the end (-1): the share of the "
                "distance between the two runs that one patch covers; 1 is all of it, and the last "
                "layer's -1 is 1 by construction. Positions before the first difference of a pair "
                "are the same in both runs and count as 0. Pairs of competent cells.", maps,
            ))  # fmt: skip
    for verb, how in VERBS.items():
        maps = partial(patch.heads, arms, patch.RECOVERY, verb)
        caption = "Recovery by one head's output; pairs of competent cells."
        found.append(_figure(f"recovery_heads_{verb}", f"Heads: {how}", caption, maps))
    found.append(_figure(
        "asymmetry_heads", "Heads: denoising less noising",
        "Above 0, putting clean values in covers more than taking them out does. Oriented pairs: "
        "the clean prompt is answered more clearly than the corrupt one.",
        partial(patch.heads, arms, patch.ASYMMETRY, "asymmetry"),
    ))  # fmt: skip
    for granularity, what in TRACED.items():
        found.append(_figure(
            f"shift_{granularity}", f"Change of the logit difference: {what}",
            "Clean values put into the corrupt run; all pairs of the test split, also where the "
            "model is not competent. Logits.",
            partial(patch.layers, arms, patch.SHIFT, granularity, "denoise"),
        ))  # fmt: skip
    return found


def _figure(name: str, title: str, caption: str, maps: Callable[[], Sequence[HeadMap]]) -> Figure:
    def draw() -> Any:
        return heatmap.draw(maps())

    def page() -> Any:
        return heatmap.page(maps())

    return Figure(name, title, caption, draw, page)


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Pairs, largest recoveries, windows."""
    return lab_tables.made([patch.pairs_table, patch.top_table, patch.windows_table], arms)
