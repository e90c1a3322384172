"""Figures from records: one style, readable in print and without colour vision.

Every function takes arms or results and gives a matplotlib figure. A figure that lacks its data
raises `UndefinedError` with the reason, which the report prints in its place.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from allostasis.analysis.curves import Curve, RunView, UndefinedError
from allostasis.analysis.survival import kaplan_meier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from allostasis.analysis.aggregate import Arm
    from allostasis.analysis.verdicts import Result

# Okabe & Ito (2008): told apart with every kind of colour vision
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
ARM_COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
INK, GREY, PALE = "#222222", "#777777", "#e8e8e8"
STEP_COLOURS = "viridis"
STEPS = "step (optimiser updates)"
EVENTS = {
    "t_mem": ("memorised (t_mem)", "o"),
    "t_clean": ("cleanup begins (t_clean)", "s"),
    "t_grok": ("generalised (T_grok)", "*"),
}
DPI = 130


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        name: Stem of its file.
        title: Heading in the report.
        caption: What it shows, of which runs.
        draw: Makes it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Canvas]


@dataclass(frozen=True)
class Quantity:
    """A curve to draw.

    Attributes:
        metric: Name in the records.
        label: Axis label: plain name, symbol, unit.
        split: Which data, or None for weights.
        part: Short name in a legend.
    """

    metric: str
    label: str
    split: str | None = None
    part: str = ""

    def of(self, run: RunView) -> Curve:
        """This curve of a run."""
        return run.curve(self.metric, split=self.split)


@contextmanager
def style() -> Iterator[Any]:
    """Matplotlib's pyplot in the report's style, drawing to memory only."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    settings: dict[str, Any] = {
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
    with style() as plt:
        canvas = figure.draw()
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", metadata={"Software": None})
        plt.close(canvas)
    return buffer.getvalue()


def phase_diagram(arms: Sequence[Arm], across: Sequence[Quantity], up: Quantity) -> Canvas:
    """One quantity against others along training: rows are quantities, columns are arms.

    Colour is the step, markers are the runs' events, thin lines join a seed's records.
    """
    with style() as plt:
        figure, axes = plt.subplots(
            len(across), len(arms), figsize=(4.4 * len(arms) + 1.2, 3.0 * len(across) + 0.5),
            sharey=True, sharex="row", squeeze=False,
        )  # fmt: skip
        last = max(run.last_step for arm in arms for run in arm.runs)
        points = None
        for row, quantity in zip(axes, across, strict=True):
            for axis, arm in zip(row, arms, strict=True):
                for run in arm.runs:
                    points = _trajectory(axis, run, quantity, up, last)
                axis.set_xlabel(quantity.label)
        for axis, arm in zip(axes[0], arms, strict=True):
            axis.set_title(f"{arm.condition}, {_count(arm)}")
        for row in axes:
            row[0].set_ylabel(up.label)
        figure.colorbar(points, ax=axes, label=STEPS, aspect=40, pad=0.02)
        handles = [
            plt.Line2D([], [], marker=marker, color="white", markeredgecolor=INK, ls="", ms=8,
                       label=label)
            for label, marker in EVENTS.values()
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _trajectory(axis: Axes, run: RunView, across: Quantity, up: Quantity, last: int) -> Any:
    x, y = across.of(run), up.of(run)
    steps, left, right = np.intersect1d(x.steps, y.steps, return_indices=True)
    axis.plot(x.values[left], y.values[right], color=GREY, lw=0.4, alpha=0.6, zorder=1)
    points = axis.scatter(
        x.values[left], y.values[right], c=steps, cmap=STEP_COLOURS, vmin=0, vmax=last, s=7,
        linewidths=0, zorder=2, rasterized=True,
    )  # fmt: skip
    for event, (_, marker) in EVENTS.items():
        step = run.event(event)
        if step is not None:
            axis.plot(
                x.at(step), y.at(step), marker=marker, ms=11 if marker == "*" else 7,
                color="white", markeredgecolor=INK, zorder=3, ls="",
            )  # fmt: skip
    return points


def losses(arms: Sequence[Arm], curves: Sequence[Quantity]) -> Canvas:
    """Loss curves, a panel an arm; phases of the first seed shaded, other seeds thin."""
    with style() as plt:
        figure, axes = plt.subplots(
            len(arms), 1, figsize=(7.6, 2.9 * len(arms) + 0.4), squeeze=False, sharey=True
        )
        for (axis,), arm in zip(axes, arms, strict=True):
            for number, quantity in enumerate(curves):
                for run in arm.runs:
                    first = run is arm.runs[0]
                    try:
                        curve = quantity.of(run)
                    except UndefinedError:
                        continue
                    # a loss that is 0 in float64 has no place on a logarithmic axis
                    positive = curve.values > 0
                    axis.plot(
                        curve.steps[positive], curve.values[positive],
                        color=ARM_COLOURS[number], lw=1.8 if first else 0.6,
                        alpha=1.0 if first else 0.35, ls=("-", "--", "-.", ":")[number % 4],
                        label=quantity.part if first else None,
                    )  # fmt: skip
            axis.set_yscale("log")
            _shade_phases(axis, arm.runs[0])
            axis.set_title(f"{arm.condition}: seed {arm.runs[0].seed} bold, {_count(arm)}")
            axis.set_ylabel(curves[0].label)
            axis.set_xlim(0, max(run.last_step for run in arm.runs))
        axes[-1, 0].set_xlabel(STEPS)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


PHASES = (
    ("memorisation", None, "t_mem", "#d9d9d9"),
    ("circuit formation", "t_mem", "t_clean", "#dbe9f6"),
    ("cleanup", "t_clean", "t_loss", "#fde9d0"),
)


def _shade_phases(axis: Axes, run: RunView) -> None:
    """Shade the phases that began; one that did not end is shaded to the run's end."""
    for name, begins, ends, colour in PHASES:
        start = 0 if begins is None else run.event(begins)
        if start is None:
            return
        end = run.event(ends)
        stop = run.last_step if end is None else end
        axis.axvspan(start, stop, color=colour, lw=0, zorder=0)
        if stop - start > 0.09 * run.last_step:
            axis.text(
                (start + stop) / 2, 0.98, name, transform=axis.get_xaxis_transform(),
                ha="center", va="top", fontsize=8.5, color=INK,
            )  # fmt: skip


def heat_map(arms: Sequence[Arm], quantity: Quantity, *, index: str) -> Canvas:
    """A metric indexed by position (a frequency) over steps: first seed of each arm."""
    with style() as plt:
        figure, axes = plt.subplots(
            len(arms), 1, figsize=(7.6, 2.7 * len(arms) + 0.3), squeeze=False, sharex=False
        )
        grids = [_grid(arm.runs[0], quantity) for arm in arms]
        top = max(float(values.max()) for _, _, values in grids)
        for (axis,), arm, (steps, positions, values) in zip(axes, arms, grids, strict=True):
            mesh = axis.pcolormesh(
                steps, positions, values, cmap="cividis", vmin=0, vmax=top, shading="nearest",
                rasterized=True,
            )  # fmt: skip
            axis.set_title(f"{arm.condition}, seed {arm.runs[0].seed}")
            axis.set_ylabel(index)
            axis.grid(visible=False)
            figure.colorbar(mesh, ax=axis, label=quantity.label, pad=0.01)
        axes[-1, 0].set_xlabel(STEPS)
    return figure


def _grid(run: RunView, quantity: Quantity) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = run.table(quantity.metric, split=quantity.split)
    if rows.empty:
        raise UndefinedError(f"{quantity.metric} was not recorded")
    table = rows.pivot(index="position", columns="step", values="value")
    return table.columns.to_numpy(float), table.index.to_numpy(float), table.to_numpy(float)


def survival(arms: Sequence[Arm], event: str, label: str) -> Canvas:
    """Kaplan-Meier curve of each arm with its log-log Greenwood band."""
    with style() as plt:
        figure, axis = plt.subplots(figsize=(6.6, 3.6))
        end = max(run.last_step for arm in arms for run in arm.runs)
        for arm, colour in zip(arms, ARM_COLOURS, strict=False):
            times, censored = _times(arm, event)
            curve = kaplan_meier(times, censored)
            steps = np.concatenate([[0], curve.times, [times.max()]])
            heights = np.concatenate([[1.0], curve.survival, [curve.survival[-1:].sum() or 1.0]])
            if len(curve.survival):
                heights[-1] = curve.survival[-1]
            axis.step(steps, heights, where="post", color=colour,
                      label=f"{arm.condition}: {int((~censored).sum())} of {_count(arm)}")  # fmt: skip
            at, low, high = curve.band()
            if len(at):
                reach = np.append(at, times.max() if curve.survival[-1] > 0 else curve.times[-1])
                axis.fill_between(
                    reach, np.append(low, low[-1]), np.append(high, high[-1]), step="post",
                    color=colour, alpha=0.18, lw=0,
                )  # fmt: skip
            axis.plot(
                times[censored], np.full(int(censored.sum()), heights[-1]), "|", color=colour,
                ms=12, mew=1.8,
            )  # fmt: skip
        axis.set(xlabel=STEPS, ylabel=f"share of seeds without {label}", ylim=(-0.03, 1.05),
                 xlim=(0, end * 1.02))  # fmt: skip
        figure.legend(loc="outside lower center", ncols=len(arms), title="| censored at the end")
    return figure


def event_times(arms: Sequence[Arm], event: str, label: str) -> Canvas:
    """Box and points of the time to an event; arrows mark runs that ended before it came."""
    with style() as plt:
        figure, axis = plt.subplots(figsize=(6.6, 0.8 * len(arms) + 1.4))
        for row, (arm, colour) in enumerate(zip(arms, ARM_COLOURS, strict=False)):
            times, censored = _times(arm, event)
            if (~censored).any() and not censored.any():
                axis.boxplot(
                    times, positions=[row], vert=False, widths=0.5, showfliers=False,
                    medianprops={"color": INK}, boxprops={"color": GREY},
                    whiskerprops={"color": GREY}, capprops={"color": GREY},
                )  # fmt: skip
            offsets = row + np.linspace(-0.16, 0.16, len(times))
            axis.plot(times[~censored], offsets[~censored], "o", color=colour, ms=6)
            axis.plot(times[censored], offsets[censored], ">", color="white",
                      markeredgecolor=colour, ms=7, mew=1.5)  # fmt: skip
        axis.set_yticks(range(len(arms)), [f"{a.condition}\n({_count(a)})" for a in arms])
        axis.set(ylim=(len(arms) - 0.5, -0.5), xlabel=f"{label}, {STEPS}")
        axis.set_xlim(left=0)
        axis.grid(visible=False, axis="y")
        handles = [
            plt.Line2D([], [], marker="o", color=GREY, ls="", label="reached"),
            plt.Line2D([], [], marker=">", color="white", markeredgecolor=GREY, ls="",
                       label="not reached by the end (censored)"),
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _times(arm: Arm, event: str) -> tuple[np.ndarray, np.ndarray]:
    steps = [run.event(event) for run in arm.runs]
    ends = [run.last_step if s is None else s for run, s in zip(arm.runs, steps, strict=True)]
    return np.array(ends, dtype=float), np.array([step is None for step in steps])


def by_head(arms: Sequence[Arm], quantities: Sequence[Quantity], title: str) -> Canvas:
    """Norms of each head over steps, first seed, with the decay that weight decay alone gives."""
    with style() as plt:
        figure, axes = plt.subplots(
            len(quantities), len(arms), figsize=(4.6 * len(arms), 2.6 * len(quantities) + 0.6),
            squeeze=False, sharey="row", sharex="col",
        )  # fmt: skip
        for row, quantity in zip(axes, quantities, strict=True):
            for axis, arm in zip(row, arms, strict=True):
                _heads(axis, arm, quantity)
            row[0].set_ylabel(quantity.label)
        for axis, arm in zip(axes[0], arms, strict=True):
            axis.set_title(f"{arm.condition}, seed {arm.runs[0].seed}")
        for axis in axes[-1]:
            axis.set_xlabel(STEPS)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5, title=title)
    return figure


def _heads(axis: Axes, arm: Arm, quantity: Quantity) -> None:
    run = arm.runs[0]
    rows = run.table(quantity.metric, split=quantity.split)
    if rows.empty:
        raise UndefinedError(f"{quantity.metric} was not recorded")
    heads = sorted({(int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True)})  # fmt: skip
    for (layer, head), colour in zip(heads, ARM_COLOURS, strict=False):
        curve = run.curve(quantity.metric, split=quantity.split, layer=layer, head=head)
        axis.plot(curve.steps, curve.values, color=colour, label=f"head {layer}.{head}")
    first = run.curve(quantity.metric, split=quantity.split, layer=heads[0][0], head=heads[0][1])
    rate = arm.setting("module.lr") * arm.setting("module.weight_decay")
    # each factor of a product of two weights decays by itself
    decay = first.values[0] * np.exp(-2 * rate * first.steps)
    axis.plot(first.steps, decay, color=INK, ls=":", label="weight decay alone, exp(-2 lr wd t)")
    axis.set_ylim(bottom=0)


def terms(arms: Sequence[Arm], quantities: Sequence[Quantity], unit: str) -> Canvas:
    """Terms of an identity over steps: a panel an arm, every seed thin, their mean bold."""
    with style() as plt:
        figure, axes = plt.subplots(
            1, len(arms), figsize=(4.6 * len(arms) + 0.4, 3.6), squeeze=False, sharey=True
        )
        for axis, arm in zip(axes[0], arms, strict=True):
            for quantity, colour in zip(quantities, (RED, BLUE, INK), strict=False):
                curves = [quantity.of(run) for run in arm.runs]
                for curve in curves:
                    axis.plot(curve.steps, curve.values, color=colour, lw=0.5, alpha=0.4)
                shared = min(curve.steps[-1] for curve in curves)
                steps = curves[0].steps[curves[0].steps <= shared]
                values = np.mean([np.interp(steps, c.steps, c.values) for c in curves], axis=0)
                axis.plot(steps, values, color=colour, lw=2, label=quantity.label)
            axis.set_title(f"{arm.condition}, {_count(arm)}")
            axis.set_xlabel(STEPS)
        axes[0, 0].set_ylabel(unit)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def forest(results: Sequence[Result]) -> Canvas:
    """Every atom with an estimate: what is claimed shaded, the bound drawn, estimate and interval.

    Each row has a scale of its own. All verdicts are drawn alike.
    """
    rows = [r for r in results if r.inference is not None and r.inference.estimate is not None]
    if not rows:
        raise UndefinedError("no claim has an estimate yet")
    with style() as plt:
        figure, axes = plt.subplots(
            len(rows), 1, figsize=(7.6, 0.62 * len(rows) + 0.3), squeeze=False
        )
        for (axis,), result in zip(axes, rows, strict=True):
            _forest_row(axis, result)
    return figure


def _forest_row(axis: Axes, result: Result) -> None:
    claim, interval = result.claim, result.interval
    assert result.inference is not None
    estimate = result.inference.estimate
    bounds = list(claim.bound) if isinstance(claim.bound, tuple) else [claim.bound]
    ends = [] if interval is None else [x for x in (interval.low, interval.high) if x is not None]
    marks = [float(x) for x in (*bounds, *ends, estimate) if x is not None]
    span = max(marks) - min(marks) or abs(marks[0]) or 1.0
    low, high = min(marks) - 0.15 * span, max(marks) + 0.15 * span
    axis.set_xlim(low, high)
    claimed = {
        "greater": [(bounds[0], high)],
        "less": [(low, bounds[0])],
        "inside": [(bounds[0], bounds[-1])],
        "outside": [(low, bounds[0]), (bounds[-1], high)],
    }[claim.direction or "inside"]
    for start, end in claimed:
        axis.axvspan(start, end, color=PALE, lw=0, zorder=0)
    for bound in bounds:
        axis.axvline(bound, color=INK, lw=1.2, ls="--", zorder=1)
    if interval is not None:
        right = high if interval.high is None else interval.high
        axis.plot([interval.low, right], [0, 0], color=INK, lw=2.2, solid_capstyle="butt")
    axis.plot(estimate, 0, "o", color=INK, ms=6.5)
    axis.set(ylim=(-1, 1), yticks=[])
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False)
    axis.tick_params(axis="x", labelsize=7.5, length=2, pad=1)
    axis.locator_params(axis="x", nbins=6)
    axis.text(-0.01, 0.5, claim.id, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    axis.text(
        1.01, 0.5, result.verdict.word, transform=axis.transAxes, ha="left", va="center",
        fontsize=9, fontweight="bold",
    )  # fmt: skip


def _count(arm: Arm) -> str:
    return f"{len(arm.runs)} seed{'s' if len(arm.runs) != 1 else ''}"
