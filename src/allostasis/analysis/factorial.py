"""Figures of a factorial: arms of one condition that differ in two settings of their module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from allostasis.analysis import summaries
from allostasis.analysis.canvas import GREY, INK, STEP_COLOURS, STEPS, style
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.survival import kaplan_meier
from allostasis.analysis.text import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from allostasis.analysis.aggregate import Arm
    from allostasis.analysis.curves import RunView


def cells_of(arms: Sequence[Arm], condition: str) -> list[Arm]:
    """The arms of a condition that have a finished run.

    Raises:
        UndefinedError: There is none.
    """
    found = [arm for arm in arms if arm.condition == condition and arm.runs]
    if not found:
        raise UndefinedError(f"not run (no finished run of condition '{condition}')")
    return found


def heat_map(arms: Sequence[Arm], condition: str, event: str, *, rows: str, columns: str) -> Canvas:
    """Kaplan-Meier median of the time to an event, one cell for each pair of settings.

    A cell in which at most half of the seeds got there is hatched and says how many did.

    Args:
        arms: All arms of the experiment.
        condition: The factorial.
        event: Which event.
        rows: Dotted name of the setting that changes downwards.
        columns: Of the one that changes to the right.
    """
    cells = {
        (float(arm.setting(rows)), float(arm.setting(columns))): arm
        for arm in cells_of(arms, condition)
    }
    down, right = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    medians = np.full((len(down), len(right)), np.nan)
    said = np.full(medians.shape, "", dtype=object)
    for (row, column), arm in cells.items():
        at = down.index(row), right.index(column)
        times, censored = arm.times_to(event)
        median = kaplan_meier(times, censored).median
        label = f"> {number(times.max())}" if median is None else number(median)
        said[at] = f"{label}\n{int((~censored).sum())} of {len(times)}"
        if median is not None:
            medians[at] = median
    with style() as plt:
        import seaborn as sns

        figure, axis = plt.subplots(figsize=(1.25 * len(right) + 2.6, 0.75 * len(down) + 1.6))
        axis.patch.set(hatch="///", edgecolor=GREY)
        sns.heatmap(
            medians, ax=axis, cmap=STEP_COLOURS, cbar=bool(np.isfinite(medians).any()),
            cbar_kws={"label": f"median {event}, {STEPS}"},
            xticklabels=[number(value) for value in right],
            yticklabels=[number(value) for value in down],
        )  # fmt: skip
        for (row, column), label in np.ndenumerate(said):  # unreached cells have a label too
            axis.text(
                column + 0.5, row + 0.5, label, ha="center", va="center", fontsize=8,
                color=INK, bbox={"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 1.5},
            )  # fmt: skip
        axis.set(xlabel=columns.rpartition(".")[2], ylabel=rows.rpartition(".")[2])
        axis.grid(visible=False)
    return figure


def mediation(arms: Sequence[Arm], condition: str) -> Canvas:
    """Time to grok against effective logit scale and against norm, both at memorisation.

    One point a run that grokked, one colour a seed; the others have no delay and are counted in
    the title.
    """
    runs = [run for arm in cells_of(arms, condition) for run in arm.runs]
    there = [run for run in runs if run.event("t_grok") is not None]
    if not there:
        raise UndefinedError(f"no run of '{condition}' reached t_grok")
    panels = (
        ("effective logit scale at t_mem", "logit_scale", summaries.effective_logit_scale),
        ("norm of all parameters at t_mem", "norm", summaries.norm_at_memorisation),
    )
    with style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(7.8, 3.4), sharey=True)
        shades = None
        for axis, (label, name, predictor) in zip(axes, panels, strict=True):
            shades = axis.scatter(
                [predictor(run) for run in there],
                [run.at_event("t_grok") for run in there],
                c=[run.seed for run in there], cmap="tab10", s=18,
            )  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel=label, title=_explained(runs, name))
        axes[0].set_ylabel(f"t_grok, {STEPS}")
        figure.colorbar(shades, ax=axes, label="seed")
        figure.suptitle(f"{len(there)} of {len(runs)} runs grokked", fontsize=9)
    return figure


def _explained(runs: Sequence[RunView], predictor: str) -> str:
    """Mean over seeds of R^2 within a seed."""
    found = []
    for seed in sorted({run.seed for run in runs}):
        try:
            found.append(summaries.mediation([r for r in runs if r.seed == seed], predictor))
        except UndefinedError:
            continue
    return f"R² within a seed {np.mean(found):.2f}" if found else "too few cells for R²"
