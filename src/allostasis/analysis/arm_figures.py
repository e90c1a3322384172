"""Figures that set many arms side by side: their curves, their ends, their profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from allostasis.analysis import statistics as st
from allostasis.analysis.canvas import (
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    STEPS,
    Quantity,
    count,
    looks,
    style,
    wrapped,
)
from allostasis.analysis.curves import Curve, UndefinedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from allostasis.analysis.aggregate import Arm

BOX_FROM = 5  # seeds: quartiles of fewer are the points themselves


def chosen(arms: Sequence[Arm], conditions: Sequence[str]) -> list[Arm]:
    """The arms of some conditions, in the order given; those that were not run are left out.

    Raises:
        UndefinedError: None of them was run.
    """
    by_name = {arm.condition: arm for arm in arms}
    found = [by_name[name] for name in conditions if name in by_name]
    if not found:
        raise UndefinedError(f"no run of {', '.join(conditions)} is finished")
    return found


def overlay(
    arms: Sequence[Arm], quantities: Sequence[Quantity], ceiling: Mapping[int, float] | None = None
) -> Canvas:
    """Quantities against steps: a panel a quantity, a colour an arm, every seed thin.

    Args:
        arms: One line style each.
        quantities: From top to bottom.
        ceiling: Of the first quantities, by place: the best that any model can reach, dashed.
    """
    with style() as plt:
        figure, axes = plt.subplots(
            len(quantities), 1, figsize=(7.4, 2.3 * len(quantities) + 0.6), sharex=True,
            squeeze=False,
        )  # fmt: skip
        for place, (axis, quantity) in enumerate(zip(axes[:, 0], quantities, strict=True)):
            for arm, look in zip(arms, looks(), strict=False):
                curves = _curves(arm, quantity)
                if curves:
                    _bundle(axis, curves, look, f"{arm.condition}, {count(arm)}")
            if ceiling is not None and place in ceiling:
                axis.axhline(ceiling[place], color=INK, ls="--", lw=1)
            axis.set_ylabel(wrapped(quantity.label))
        axes[-1, 0].set_xlabel(STEPS)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _curves(arm: Arm, quantity: Quantity) -> list[Curve]:
    found = []
    for run in arm.runs:
        try:
            found.append(quantity.of(run))
        except UndefinedError:
            continue  # an arm where the site cannot move has no such curve
    return found


def _bundle(axis: Axes, curves: Sequence[Curve], look: tuple[str, str], label: str) -> None:
    """Seeds as thin lines; mean and 95 % t interval at the steps that all have, from three up."""
    colour, dashes = look
    for curve in curves:
        axis.plot(curve.steps, curve.values, color=colour, lw=0.5, alpha=0.5)
    steps = sorted(set.intersection(*({*curve.steps.tolist()} for curve in curves)))
    values = np.array([np.interp(steps, curve.steps, curve.values) for curve in curves])
    axis.plot(steps, values.mean(axis=0), color=colour, ls=dashes, lw=1.8, label=label)
    if len(curves) < 3:
        return
    ends = [_ends(column) for column in values.T]
    axis.fill_between(steps, [e[0] for e in ends], [e[1] for e in ends], color=colour, alpha=0.15)


def _ends(values: np.ndarray) -> tuple[float, float]:
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    interval = st.t_interval(values)
    assert interval.low is not None
    assert interval.high is not None
    return interval.low, interval.high


def divergence(arms: Sequence[Arm], control: str, quantities: Sequence[Quantity]) -> Canvas:
    """An arm minus the control, paired by seed, over steps; a mark where 0 is first excluded.

    Raises:
        UndefinedError: The control was not run, or shares fewer than three seeds with every arm.
    """
    base = chosen(arms, [control])[0]
    others = [arm for arm in arms if arm.condition != control]
    others = [arm for arm in others if len({*arm.seeds} & {*base.seeds}) >= 3]
    if not others:
        raise UndefinedError("an interval of paired differences takes three seeds of two arms")
    with style() as plt:
        figure, axes = plt.subplots(
            len(quantities), 1, figsize=(7.4, 2.2 * len(quantities) + 0.6), sharex=True,
            squeeze=False,
        )  # fmt: skip
        for axis, quantity in zip(axes[:, 0], quantities, strict=True):
            axis.axhline(0, color=INK, lw=0.8)
            for arm, look in zip(others, islice(looks(), 1, None), strict=False):
                pairs = _differences(arm, base, quantity)
                if len(pairs) < 3:
                    continue
                _bundle(axis, pairs, look, arm.condition)
                _mark_first(axis, pairs, look[0])
            axis.set_ylabel(wrapped(quantity.label))
        axes[-1, 0].set_xlabel(STEPS)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _differences(arm: Arm, base: Arm, quantity: Quantity) -> list[Curve]:
    controls = {run.seed: run for run in base.runs}
    found = []
    for run in arm.runs:
        if run.seed not in controls:
            continue
        try:
            left, right = quantity.of(run), quantity.of(controls[run.seed])
        except UndefinedError:
            continue
        steps, at, there = np.intersect1d(left.steps, right.steps, return_indices=True)
        found.append(Curve(steps, left.values[at] - right.values[there]))
    return found


def _mark_first(axis: Axes, pairs: Sequence[Curve], colour: str) -> None:
    steps = sorted(set.intersection(*({*curve.steps.tolist()} for curve in pairs)))
    for step in steps:
        low, high = _ends(np.array([curve.at(float(step)) for curve in pairs]))
        if low > 0 or high < 0:
            axis.axvline(step, color=colour, lw=0.9, ls=":")
            return


def ends(arms: Sequence[Arm], quantities: Sequence[Quantity]) -> Canvas:
    """What each arm ends with: a panel a quantity, a row an arm, points and a box of its seeds."""
    with style() as plt:
        figure, axes = plt.subplots(
            1, len(quantities), figsize=(3.1 * len(quantities) + 2.2, 0.32 * len(arms) + 1.3),
            sharey=True, squeeze=False,
        )  # fmt: skip
        for axis, quantity in zip(axes[0], quantities, strict=True):
            for row, arm in enumerate(arms):
                values = np.array([curve.values[-1] for curve in _curves(arm, quantity)])
                if not len(values):
                    continue
                if len(values) >= BOX_FROM:
                    axis.boxplot(
                        values, positions=[row], orientation="horizontal", widths=0.6,
                        showfliers=False, manage_ticks=False, patch_artist=True,
                        boxprops={"facecolor": PALE, "edgecolor": GREY},
                        medianprops={"color": INK},
                    )  # fmt: skip
                axis.plot(values, np.full(len(values), row), "o", ms=3.5, color=INK, alpha=0.7)
            axis.set_xlabel(wrapped(quantity.label))
            axis.grid(visible=False, axis="y")
            axis.locator_params(axis="x", nbins=4)
        axes[0, 0].set_yticks(range(len(arms)), [arm.condition for arm in arms])
        axes[0, 0].set_ylim(len(arms) - 0.5, -0.5)
    return figure


def identity_terms(arms: Sequence[Arm], base: str, quantities: Sequence[Quantity]) -> Canvas:
    """Change of each term of log margin = log A + log G from the base arm, paired by seed.

    Args:
        arms: The arms; `base` among them.
        base: Condition that the others are compared with.
        quantities: Mean log margin and its two terms, the sum last.

    Raises:
        UndefinedError: The base was not run.
    """
    reference = chosen(arms, [base])[0]
    rows = [arm for arm in arms if arm.condition != base and {*arm.seeds} & {*reference.seeds}]
    if not rows:
        raise UndefinedError(f"no other arm shares a seed with {base}")
    with style() as plt:
        figure, axis = plt.subplots(figsize=(7.6, 0.5 * len(rows) + 1.4))
        for place, quantity, colour in zip(
            (-0.25, 0, 0.25), quantities, (ORANGE, GREEN, INK), strict=True
        ):
            for row, arm in enumerate(rows):
                values = np.array([c.values[-1] for c in _differences(arm, reference, quantity)])
                if not len(values):
                    continue
                axis.barh(row + place, values.mean(), 0.23, color=colour, zorder=2,
                          label=quantity.label if row == 0 else None)  # fmt: skip
                if len(values) >= 3:
                    low, high = _ends(values)
                    axis.plot([low, high], [row + place] * 2, color=GREY, lw=1.4, zorder=3)
        axis.axvline(0, color=INK, lw=0.8)
        axis.set_yticks(range(len(rows)), [arm.condition for arm in rows])
        axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"change from {base}, paired by seed, nat")
        axis.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def by_position(arms: Sequence[Arm], metric: str, label: str, split: str) -> Canvas:
    """A metric at each position at the end of the run: a line an arm, the mean over seeds."""
    with style() as plt:
        figure, axis = plt.subplots(figsize=(7.4, 3.6))
        for arm, (colour, dashes) in zip(arms, looks(), strict=False):
            profiles = []
            for run in arm.runs:
                rows = run.table(metric, split=split)
                last = rows[rows["step"] == rows["step"].max()].sort_values("position")
                profiles.append(last["value"].to_numpy())
            profiles = [profile for profile in profiles if len(profile)]
            if profiles:
                values = np.mean(profiles, axis=0)
                axis.plot(np.arange(len(values)), values, color=colour, ls=dashes, lw=1.4,
                          label=f"{arm.condition}, {count(arm)}")  # fmt: skip
        if not axis.lines:
            raise UndefinedError(f"{metric} was not recorded by position")
        axis.set(xlabel="position of the target", ylabel=label, ylim=(-0.02, 1.02))
        figure.legend(loc="outside lower center", ncols=2)
    return figure
