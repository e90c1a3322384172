"""One style for all figures: readable in print and without colour vision."""

from __future__ import annotations

import io
import itertools
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from allostasis.analysis.curves import Curve, RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from allostasis.analysis.aggregate import Arm

# Okabe & Ito (2008): told apart with every kind of colour vision
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
ARM_COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
INK, GREY, PALE = "#222222", "#777777", "#e8e8e8"
STEP_COLOURS = "viridis"
STEPS = "step (optimiser updates)"
DPI = 130
LINE = 24  # characters of an axis label
MIN_WIDTH = 7.2  # inches, so that a legend below a single panel has room


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        name: Stem of its file.
        title: Heading in the report.
        caption: What it shows, of which runs.
        draw: Makes it.
        page: Makes its interactive twin, HTML that runs nothing; None where it has none.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Canvas]
    page: Callable[[], Markup] | None = None


@dataclass(frozen=True)
class Quantity:
    """A curve to draw.

    Attributes:
        metric: Name in the records.
        label: Axis label: plain name, symbol, unit.
        split: Which data, or None for weights.
        part: Short name in a legend.
        is_summed: Whether to add up layers and heads.
    """

    metric: str
    label: str
    split: str | None = None
    part: str = ""
    is_summed: bool = False

    def of(self, run: RunView) -> Curve:
        """This curve of a run."""
        if self.is_summed:
            return run.total(self.metric, split=self.split)
        return run.curve(self.metric, split=self.split)


@contextmanager
def style() -> Iterator[Any]:
    """Matplotlib's pyplot in the report's style, drawing to memory only."""
    import matplotlib as mpl

    if "MPLBACKEND" not in os.environ:  # as in a notebook, which shows what a cell returns
        mpl.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = {
        "figure.dpi": DPI,
        "savefig.dpi": DPI,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "font.family": "DejaVu Sans",
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": PALE,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
    }
    with mpl.rc_context(settings):
        yield plt


def png(figure: Figure) -> bytes:
    """Draw a figure as PNG; the same records give the same bytes."""
    return rendered(figure.draw())


def rendered(drawn: Canvas) -> bytes:
    """A drawn figure as PNG; it stays usable, though pyplot no longer keeps it."""
    with style() as plt:
        buffer = io.BytesIO()
        drawn.savefig(buffer, format="png", metadata={"Software": None})
        plt.close(drawn)
    return buffer.getvalue()


DASHES = ("-", "--", ":", "-.")


def looks() -> Iterator[tuple[str, str]]:
    """Colour and dashes of one arm after another, told apart in grey print as well.

    Example:
        >>> found = looks()
        >>> len({next(found) for _ in range(24)})
        24
    """
    yield from itertools.cycle(
        (colour, DASHES[(place + round_) % len(DASHES)])
        for round_ in range(len(DASHES))
        for place, colour in enumerate(ARM_COLOURS)
    )


def wrapped(label: str) -> str:
    """An axis label in lines as long as a low panel has room for."""
    return textwrap.fill(label, LINE)


def count(arm: Arm) -> str:
    """How many seeds an arm has, in words."""
    return f"{len(arm.runs)} seed{'s' if len(arm.runs) != 1 else ''}"


def plain_ticks(axis: Axes, *, is_narrow: bool) -> None:
    """Numbers, not powers of ten, at a logarithmic axis; round ones where it has no decade."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    if is_narrow:
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
