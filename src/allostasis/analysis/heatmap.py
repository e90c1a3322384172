"""Maps of layers by heads or positions: a number a cell, as a picture and as a page that says it.

The page is HTML and CSS alone: it runs nothing, asks for nothing from outside, and shows a cell's
numbers where one points at it, taps it or reaches it with the keyboard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.stats import rankdata

from allostasis.analysis.canvas import GREY, INK, style
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.text import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = "RdBu_r"  # diverging, told apart with every kind of colour vision
HATCH = "//////"
SIGNED = 0.2  # of the limit: cells further below 0 have a minus, for print without colour
DARK = 0.6  # of the limit: from here on a dark mark would not be seen
CELL = 0.2  # inches, the least height of a layer
STOPS = 9  # colours of the page's scale


@dataclass(frozen=True)
class HeadMap:
    """One quantity of every head, or of every position of every layer.

    Attributes:
        title: What it is, in plain words.
        unit: Its unit.
        values: By layer and head; NaN where there is none.
        low: Lower limits of the intervals, likewise.
        high: Upper limits.
        interval: What the intervals are, such as "95 % t over clusters".
        marked: (layer, head) pairs to outline.
        across: What the columns are.
        columns: Their names, where they are not counted from 0.
        hints: What else there is to say of each column, such as its tokens.
    """

    title: str
    unit: str
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    interval: str = "95 %"
    marked: Sequence[tuple[int, int]] = field(default=())
    across: str = "head"
    columns: Sequence[str] = field(default=())
    hints: Sequence[str] = field(default=())

    @property
    def limit(self) -> float:
        """Largest absolute value: the colours run from minus this to this."""
        there = np.abs(self.values[np.isfinite(self.values)])
        return float(there.max()) or 1.0 if len(there) else 1.0

    @cached_property
    def percentiles(self) -> np.ndarray:
        """Rank of each head among all that have a value, in percent; ties share their middle rank.

        The share of the other heads that lie below it.
        """
        flat = np.full(self.values.size, np.nan)
        there = np.isfinite(self.values.ravel())
        ranks = rankdata(self.values.ravel()[there])
        flat[there] = 100 * (ranks - 1) / max(1, len(ranks) - 1)
        return flat.reshape(self.values.shape)

    def describe(self, layer: int, head: int) -> str:
        """What is known of one head, in a line."""
        value = self.values[layer, head]
        where = f"head {layer}.{head}"
        if self.columns:
            hint = f" {self.hints[head]}" if self.hints else ""
            where = f"layer {layer}, {self.across} {self.columns[head]}{hint}"
        if not np.isfinite(value):
            return f"{where}, {self.title}: not measured"
        text = f"{where}, {self.title}: {number(float(value))} {self.unit}"
        low, high = self.low[layer, head], self.high[layer, head]
        if np.isfinite([low, high]).all():
            text += f", {self.interval} [{number(float(low))}, {number(float(high))}]"
        every = "cells" if self.columns else "heads"
        return f"{text}, percentile {self.percentiles[layer, head]:.0f} of all {every}"

    @property
    def names(self) -> list[str]:
        """What the columns are called."""
        return [*self.columns] or [str(head) for head in range(self.values.shape[1])]


def draw(maps: Sequence[HeadMap]) -> Canvas:
    """Maps side by side, each with its own scale, 0 white, missing heads hatched.

    Raises:
        UndefinedError: No map has a value.
    """
    _check(maps)
    layers, heads = maps[0].values.shape
    height = max(2.6, CELL * layers)
    width = max(2.3, min(height, CELL * 1.6 * heads))
    with style() as plt:
        figure, axes = plt.subplots(
            1, len(maps), figsize=(len(maps) * (width + 1.5), height + 0.9), squeeze=False,
            sharey=True,
        )  # fmt: skip
        for axis, one in zip(axes[0], maps, strict=True):
            mesh = _panel(axis, one)
            figure.colorbar(mesh, ax=axis, label=one.unit, aspect=30, pad=0.03)
        axes[0, 0].set_ylabel("layer")
        handles = []
        if any(len(one.marked) for one in maps):
            handles.append(plt.Rectangle((0, 0), 1, 1, fc="none", ec=INK, lw=1.6, label="ablated"))
        if any((one.values < -SIGNED * one.limit).any() for one in maps):
            handles.append(plt.Line2D([], [], ls="", marker="_", color=INK, label="well below 0"))
        if any(not np.isfinite(one.values).all() for one in maps):
            missing = plt.Rectangle(
                (0, 0), 1, 1, fc="white", ec=GREY, hatch=HATCH, lw=0, label="not measured"
            )
            handles.append(missing)
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _panel(axis: Axes, one: HeadMap) -> object:
    from matplotlib.patches import Rectangle

    layers, heads = one.values.shape
    mesh = axis.pcolormesh(
        np.arange(heads + 1) - 0.5, np.arange(layers + 1) - 0.5, np.ma.masked_invalid(one.values),
        cmap=COLOURS, vmin=-one.limit, vmax=one.limit, edgecolors="white", linewidth=0.4,
    )  # fmt: skip
    for layer, head in np.argwhere(~np.isfinite(one.values)):
        axis.add_patch(
            Rectangle(
                (head - 0.5, layer - 0.5), 1, 1, fc="white", ec=GREY, hatch=HATCH, lw=0, zorder=0.5
            )
        )
    share = -one.values / one.limit
    for there, colour in ((share > SIGNED) & (share <= DARK), INK), (share > DARK, "white"):
        below = np.argwhere(there)
        axis.plot(below[:, 1], below[:, 0], ls="", marker="_", ms=5, color=colour, zorder=2)
    for layer, head in one.marked:
        axis.add_patch(
            Rectangle((head - 0.5, layer - 0.5), 1, 1, fc="none", ec=INK, lw=1.6, zorder=3)
        )
    axis.set_title(one.title)
    axis.set(xlim=(-0.5, heads - 0.5), ylim=(layers - 0.5, -0.5), xlabel=one.across)
    ticks = range(0, heads, 1 if heads <= 16 else 4)
    axis.set_xticks(ticks, [one.names[tick] for tick in ticks])
    axis.set_yticks(range(0, layers, 1 if layers <= 16 else 5))
    axis.grid(visible=False)
    axis.tick_params(length=2)
    return mesh


def page(maps: Sequence[HeadMap]) -> Markup:
    """The same maps as an HTML fragment, every text in it escaped.

    Raises:
        UndefinedError: No map has a value.
    """
    _check(maps)
    environment = Environment(
        loader=PackageLoader("allostasis.analysis"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return Markup(environment.get_template("heatmap.html.jinja").render(panels=map(_cells, maps)))


def _cells(one: HeadMap) -> dict[str, object]:
    """What the template draws of one map."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colours, marked = colormaps[COLOURS], set(one.marked)

    def colour(value: float) -> str:
        return to_hex(colours((value / one.limit + 1) / 2))

    rows = [
        [
            {
                "text": one.describe(layer, head),
                "colour": colour(value) if np.isfinite(value) else None,
                "is_marked": (layer, head) in marked,
            }
            for head, value in enumerate(values)
        ]
        for layer, values in enumerate(one.values)
    ]
    stops = [colour(one.limit * stop) for stop in np.linspace(-1, 1, STOPS)]
    ends = [number(-one.limit), "0", number(one.limit)]
    return {
        "title": one.title, "unit": one.unit, "rows": rows, "stops": stops, "ends": ends,
        "names": one.names,
    }  # fmt: skip


def _check(maps: Sequence[HeadMap]) -> None:
    if not any(np.isfinite(one.values).any() for one in maps):
        raise UndefinedError("no head has a value")
