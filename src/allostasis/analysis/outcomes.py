"""Figures of what came out: times to an event, and claims with their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from allostasis.analysis.canvas import (
    GREY,
    INK,
    MIN_WIDTH,
    PALE,
    STEPS,
    count,
    looks,
    plain_ticks,
    style,
)
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.survival import kaplan_meier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from allostasis.analysis.aggregate import Arm
    from allostasis.analysis.verdicts import Result

NARROW = 20  # ratio of an axis's ends
BOX_FROM = 5  # seeds: quartiles of fewer are the points themselves


def survival(arms: Sequence[Arm], event: str, label: str) -> Canvas:
    """Kaplan-Meier curve of each arm with its log-log Greenwood band."""
    with style() as plt:
        legend_rows = len(arms) // 2 + 1
        figure, axis = plt.subplots(figsize=(MIN_WIDTH, 3.4 + 0.2 * legend_rows))
        end = max(run.last_step for arm in arms for run in arm.runs)
        for arm, (colour, dashes) in zip(arms, looks(), strict=False):
            times, censored = arm.times_to(event)
            curve = kaplan_meier(times, censored)
            steps = np.concatenate([[0], curve.times, [times.max()]])
            heights = np.concatenate([[1.0], curve.survival])
            heights = np.append(heights, heights[-1])
            axis.step(
                steps,
                heights,
                where="post",
                color=colour,
                ls=dashes,
                label=f"{arm.condition}: {int((~censored).sum())} of {count(arm)}",
            )
            at, low, high = curve.band()
            if len(at):
                reach = np.append(at, times.max() if curve.survival[-1] > 0 else curve.times[-1])
                axis.fill_between(
                    reach,
                    np.append(low, low[-1]),
                    np.append(high, high[-1]),
                    step="post",
                    color=colour,
                    alpha=0.18,
                    lw=0,
                )
            axis.plot(
                times[censored],
                np.full(int(censored.sum()), heights[-1]),
                "|",
                color=colour,
                ms=12,
                mew=1.8,
            )
        axis.set(
            xlabel=STEPS,
            ylabel=f"share without {label}",
            ylim=(-0.03, 1.05),
            xlim=(0, end * 1.02),
        )
        handles, _ = axis.get_legend_handles_labels()
        censored_mark = plt.Line2D(
            [], [], marker="|", ls="", color=GREY, ms=12, mew=1.8, label="censored (run ended)"
        )
        figure.legend(handles=[*handles, censored_mark], loc="outside lower center", ncols=2)
    return figure


def event_times(arms: Sequence[Arm], event: str, label: str) -> Canvas:
    """Box and points of the time to an event; arrows mark runs that ended before it came."""
    with style() as plt:
        figure, axis = plt.subplots(figsize=(6.6, 0.8 * len(arms) + 1.4))
        for row, (arm, (colour, _)) in enumerate(zip(arms, looks(), strict=False)):
            times, censored = arm.times_to(event)
            if len(times) >= BOX_FROM and not censored.any():
                axis.boxplot(
                    times,
                    positions=[row],
                    orientation="horizontal",
                    widths=0.5,
                    showfliers=False,
                    medianprops={"color": INK},
                    boxprops={"color": GREY},
                    whiskerprops={"color": GREY},
                    capprops={"color": GREY},
                )
            offsets = row + 0.36 * (np.arange(len(times)) * 0.618 % 1 - 0.5)
            axis.plot(times[~censored], offsets[~censored], "o", color=colour, ms=6)
            axis.plot(
                times[censored],
                offsets[censored],
                ">",
                color="white",
                markeredgecolor=colour,
                ms=7,
                mew=1.5,
            )
        axis.set_yticks(range(len(arms)), [f"{a.condition}\n({count(a)})" for a in arms])
        axis.set(ylim=(len(arms) - 0.5, -0.5), xlabel=f"{label}, {STEPS}")
        axis.set_xlim(left=0)
        axis.grid(visible=False, axis="y")
        handles = [
            plt.Line2D([], [], marker="o", color=GREY, ls="", label="reached"),
            plt.Line2D(
                [],
                [],
                marker=">",
                color="white",
                markeredgecolor=GREY,
                ls="",
                label="not reached by the end (censored)",
            ),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
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
    assert estimate is not None
    assert claim.bound is not None
    bounds = claim.bound if isinstance(claim.bound, tuple) else (claim.bound,)
    ends = [] if interval is None else [x for x in (interval.low, interval.high) if x is not None]
    beyond = [] if claim.refuted_at is None else [claim.refuted_at]
    marks = np.array([*bounds, *beyond, *ends, estimate])
    is_ratio = claim.estimand is not None and claim.estimand.of == "log_ratio"
    if is_ratio:
        axis.set_xscale("log")
    places = np.log(marks) if is_ratio else marks
    margin = 0.15 * (np.ptp(places) or abs(places[0]) or 1.0)
    edges = np.array([places.min() - margin, places.max() + margin])
    low, high = (np.exp(edges) if is_ratio else edges).tolist()
    axis.set_xlim(low, high)
    if is_ratio:
        plain_ticks(axis, is_narrow=high < NARROW * low)
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
    for level in beyond:
        axis.axvline(level, color=INK, lw=1.2, ls=":", zorder=1)
    if interval is not None:
        left = low if interval.low is None else interval.low
        right = high if interval.high is None else interval.high
        axis.plot([left, right], [0, 0], color=INK, lw=2.2, solid_capstyle="butt")
    axis.plot(estimate, 0, "o", color=INK, ms=6.5)
    axis.set(ylim=(-1, 1), yticks=[])
    axis.spines["left"].set_visible(False)
    axis.grid(visible=False)
    axis.tick_params(axis="x", labelsize=7.5, length=2, pad=1)
    if not is_ratio:
        axis.locator_params(axis="x", nbins=6)
    axis.text(-0.01, 0.5, claim.id, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    axis.text(
        1.01,
        0.5,
        result.verdict.word,
        transform=axis.transAxes,
        ha="left",
        va="center",
        fontsize=9,
        fontweight="bold",
    )
