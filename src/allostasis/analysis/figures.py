"""Figures of curves over training.

Every function takes arms, one a condition, and gives a matplotlib figure. A figure that lacks its
data raises `UndefinedError` with the reason, which the report prints in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from allostasis.analysis.canvas import (
    ARM_COLOURS,
    GREEN,
    GREY,
    INK,
    MIN_WIDTH,
    ORANGE,
    STEP_COLOURS,
    STEPS,
    Quantity,
    count,
    looks,
    style,
)
from allostasis.analysis.curves import RunView, UndefinedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from allostasis.analysis.aggregate import Arm

Events = Mapping[str, tuple[str, str]]
"""Events to mark, with what they are called and their marker."""

EVENTS: Events = {
    "t_mem": ("memorised (t_mem)", "o"),
    "t_clean": ("cleanup begins (t_clean)", "s"),
    "t_grok": ("generalised (T_grok)", "*"),
}

TERM_LOOKS = ((ORANGE, "--"), (GREEN, "-."), (INK, "-"))
"""Of log A, log G and their sum."""

WIDE = 1000  # ratio of ends from which an axis is logarithmic


def phase_diagram(
    arms: Sequence[Arm], across: Sequence[Quantity], up: Quantity, events: Events = EVENTS
) -> Canvas:
    """One quantity against others along training: rows are quantities, columns are arms.

    Colour is the step, markers are the runs' `events`, thin lines join a seed's records.
    """
    with style() as plt:
        figure, axes = plt.subplots(
            len(across),
            len(arms),
            figsize=(max(MIN_WIDTH, 4.4 * len(arms) + 1.2), 3.0 * len(across) + 0.5),
            sharey=True,
            sharex="row",
            squeeze=False,
        )
        last = max(run.last_step for arm in arms for run in arm.runs)
        points = None
        for row, quantity in zip(axes, across, strict=True):
            for axis, arm in zip(row, arms, strict=True):
                for run in arm.runs:
                    points = _trajectory(axis, run, quantity, up, last, events)
                axis.set_xlabel(quantity.label)
            values = np.concatenate([quantity.of(run).values for arm in arms for run in arm.runs])
            if 0 < values.min() < values.max() / WIDE:
                row[0].set_xscale("log")  # one arm of many would squeeze the others into a line
        for axis, arm in zip(axes[0], arms, strict=True):
            axis.set_title(f"{arm.condition}, {count(arm)}")
        for row in axes:
            row[0].set_ylabel(up.label)
        figure.colorbar(points, ax=axes, label=STEPS, aspect=40, pad=0.02)
        handles = [
            plt.Line2D(
                [], [], marker=marker, color="white", markeredgecolor=INK, ls="", ms=8, label=label
            )
            for label, marker in events.values()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _trajectory(
    axis: Axes, run: RunView, across: Quantity, up: Quantity, last: int, events: Events
) -> Any:
    x, y = across.of(run), up.of(run)
    steps, left, right = np.intersect1d(x.steps, y.steps, return_indices=True)
    axis.plot(x.values[left], y.values[right], color=GREY, lw=0.4, alpha=0.6, zorder=1)
    points = axis.scatter(
        x.values[left],
        y.values[right],
        c=steps,
        cmap=STEP_COLOURS,
        vmin=0,
        vmax=last,
        s=7,
        linewidths=0,
        zorder=2,
        rasterized=True,
    )
    for event, (_, marker) in events.items():
        step = run.event(event)
        if step is not None:
            axis.plot(
                x.at(step),
                y.at(step),
                marker=marker,
                ms=11 if marker == "*" else 7,
                color="white",
                markeredgecolor=INK,
                zorder=3,
                ls="",
            )
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
                        curve.steps[positive],
                        curve.values[positive],
                        color=ARM_COLOURS[number],
                        lw=1.8 if first else 0.6,
                        alpha=1.0 if first else 0.35,
                        ls=("-", "--", "-.", ":")[number % 4],
                        label=quantity.part if first else None,
                    )
            axis.set_yscale("log")
            _shade_phases(axis, arm.runs[0])
            axis.set_title(f"{arm.condition}: seed {arm.runs[0].seed} bold, {count(arm)}")
            axis.set_ylabel(curves[0].label)
            axis.set_xlim(0, max(run.last_step for run in arm.runs))
        axes[-1, 0].set_xlabel(STEPS)
        handles, _ = axes[0, 0].get_legend_handles_labels()
        handles += [
            plt.Rectangle((0, 0), 1, 1, fc=colour, label=name) for name, *_, colour in PHASES
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


PHASES = (
    ("memorisation", None, "t_mem", "#d9d9d9"),
    ("circuit formation", "t_mem", "t_clean", "#dbe9f6"),
    ("cleanup", "t_clean", "t_loss", "#fde9d0"),
)


def _shade_phases(axis: Axes, run: RunView) -> None:
    """Shade the phases that began; one that did not end is shaded to the run's end."""
    for _, begins, ends, colour in PHASES:
        start = 0 if begins is None else run.event(begins)
        if start is None:
            return
        end = run.event(ends)
        stop = run.last_step if end is None else end
        axis.axvspan(start, stop, color=colour, lw=0, zorder=0)


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
                steps,
                positions,
                values,
                cmap="cividis",
                vmin=0,
                vmax=top,
                shading="nearest",
                rasterized=True,
            )
            axis.set_xlim(0, steps[-1])
            axis.set_title(f"{arm.condition}, seed {arm.runs[0].seed}")
            axis.set_ylabel(index)
            axis.grid(visible=False)
            figure.colorbar(mesh, ax=axis, label=quantity.label, pad=0.01)
        axes[-1, 0].set_xlabel(STEPS)
    return figure


def _grid(run: RunView, quantity: Quantity) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = run.table(quantity.metric, split=quantity.split).drop_duplicates()
    if rows.empty:
        raise UndefinedError(f"{quantity.metric} was not recorded")
    table = rows.pivot(index="position", columns="step", values="value")
    return table.columns.to_numpy(float), table.index.to_numpy(float), table.to_numpy(float)


def by_head(arms: Sequence[Arm], quantities: Sequence[Quantity]) -> Canvas:
    """Norms of each head over steps, first seed, with the decay that weight decay alone gives."""
    with style() as plt:
        figure, axes = plt.subplots(
            len(quantities),
            len(arms),
            figsize=(max(MIN_WIDTH, 4.6 * len(arms)), 2.6 * len(quantities) + 0.6),
            squeeze=False,
            sharey="row",
            sharex="col",
        )
        for row, quantity in zip(axes, quantities, strict=True):
            for axis, arm in zip(row, arms, strict=True):
                _heads(axis, arm, quantity)
            row[0].set_ylabel(quantity.label)
            row[0].set_ylim(bottom=0)  # once all arms are drawn: it fixes the shared upper end too
        for axis, arm in zip(axes[0], arms, strict=True):
            axis.set_title(f"{arm.condition}, seed {arm.runs[0].seed}")
        for axis in axes[-1]:
            axis.set_xlabel(STEPS)
            axis.locator_params(axis="x", nbins=5)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _heads(axis: Axes, arm: Arm, quantity: Quantity) -> None:
    run = arm.runs[0]
    rows = run.table(quantity.metric, split=quantity.split)
    if rows.empty:
        raise UndefinedError(f"{quantity.metric} was not recorded")
    heads = sorted({
        (int(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True)
    })
    for (layer, head), (colour, dashes) in zip(heads, looks(), strict=False):
        curve = run.curve(quantity.metric, split=quantity.split, layer=layer, head=head)
        axis.plot(curve.steps, curve.values, color=colour, ls=dashes, label=f"head {layer}.{head}")
    first = run.curve(quantity.metric, split=quantity.split, layer=heads[0][0], head=heads[0][1])
    rate = arm.setting("module.lr") * arm.setting("module.weight_decay")
    # each factor of a product of two weights decays by itself
    decay = first.values[0] * np.exp(-2 * rate * first.steps)
    axis.plot(first.steps, decay, color=INK, ls=":", label="weight decay alone, exp(-2 lr wd t)")


def terms(arms: Sequence[Arm], quantities: Sequence[Quantity], unit: str) -> Canvas:
    """Terms of an identity over steps: a panel an arm, every seed thin, their mean bold."""
    with style() as plt:
        figure, axes = plt.subplots(
            1,
            len(arms),
            figsize=(max(MIN_WIDTH, 4.6 * len(arms) + 0.4), 3.6),
            squeeze=False,
            sharey=True,
        )
        for axis, arm in zip(axes[0], arms, strict=True):
            for quantity, (colour, dashes) in zip(quantities, TERM_LOOKS, strict=True):
                curves = [quantity.of(run) for run in arm.runs]
                for curve in curves:
                    axis.plot(curve.steps, curve.values, color=colour, lw=0.5, alpha=0.4)
                shared = min(curve.steps[-1] for curve in curves)
                steps = curves[0].steps[curves[0].steps <= shared]
                values = np.mean([np.interp(steps, c.steps, c.values) for c in curves], axis=0)
                axis.plot(steps, values, color=colour, ls=dashes, lw=2, label=quantity.label)
            axis.set_title(f"{arm.condition}, {count(arm)}")
            axis.set_xlabel(STEPS)
            axis.locator_params(axis="x", nbins=5)
        axes[0, 0].set_ylabel(unit)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure
