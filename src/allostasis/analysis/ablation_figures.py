"""Figures of what ablations did to a pretrained model.

Bars and bands are 95 % intervals over clusters of prompts. A figure that lacks its data raises
`UndefinedError` with the reason, which the report prints in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from allostasis.analysis import ablations
from allostasis.analysis.ablations import ABLATIONS, KINDS, Estimate, Group, estimate
from allostasis.analysis.canvas import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, style
from allostasis.analysis.clusters import late_depths
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.prompts import column, positive
from allostasis.analysis.repair import PLAYERS, shapley_shares

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from allostasis.analysis.aggregate import Arm
    from allostasis.analysis.prompts import Column

COLOURS: dict[str, str] = dict(zip(ABLATIONS, (BLUE, ORANGE, GREEN), strict=True))
MARKERS: dict[str, str] = dict(zip(ABLATIONS, ("o", "s", "^"), strict=True))
DIVERGING = "RdBu_r"
WIDTH = 0.26  # of a bar; three stand side by side
SPREAD = 0.34  # half the height over which points of a row are scattered


def compensation(arms: Sequence[Arm]) -> Canvas:
    """Norm of the END residual by depth: against clean (C), its null, and their log ratio.

    One colour scale in logarithms for all three panels, white where nothing changed.
    """
    groups = ablations.groups(arms, "depths")
    panels = {
        "ratio to clean, $C$": ("norm_end", "norm_end_clean"),
        "null: nothing downstream reacts, $C_{null}$": ("norm_end_null", "norm_end_clean"),
        "excess, $\\ln(C / C_{null})$": ("norm_end", "norm_end_null"),
    }
    values = {
        title: np.log([ablations.ratio_by_depth(group.rows, *pair) for group in groups])
        for title, pair in panels.items()
    }
    limit = max(float(np.abs(table).max()) for table in values.values()) or 1.0
    n_layers = ablations.last_depth(groups[0].rows)
    with style() as plt:
        figure, axes = plt.subplots(
            3, 1, figsize=(7.6, 3 * (0.26 * len(groups) + 0.5) + 0.5), sharex=True
        )
        for axis, (title, table) in zip(axes, values.items(), strict=True):
            axis.pcolormesh(
                np.arange(n_layers + 2) - 0.5, np.arange(len(groups) + 1) - 0.5, table,
                cmap=DIVERGING, vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.3,
            )  # fmt: skip
            axis.set_title(title)
            axis.set_yticks(range(len(groups)), [group.name for group in groups], fontsize=8)
            axis.invert_yaxis()
            axis.grid(visible=False)
            axis.tick_params(length=2)
            axis.axvline(late_depths(n_layers)[0] - 0.5, color=INK, lw=1, ls="--")
        scale = plt.cm.ScalarMappable(plt.Normalize(-limit, limit), DIVERGING)
        ratios = figure.colorbar(scale, ax=axes[:2], label="ratio, log scale", pad=0.02, aspect=22)
        ticks = _round_ratios(limit)
        ratios.set_ticks(np.log(ticks).tolist(), labels=[f"{tick:.4g}" for tick in ticks])
        figure.colorbar(scale, ax=axes[2], label="nat", pad=0.02, aspect=9)
        axes[-1].set_xlabel("depth: input of block d (dashed: late depths begin)")
    return figure


def _round_ratios(limit: float) -> np.ndarray:
    """Round ratios to label on a log scale from exp(-limit) to exp(limit), about three a side.

    Example:
        >>> _round_ratios(0.035).tolist()
        [0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03]
    """
    reach = -np.expm1(-limit)
    power = 10.0 ** np.floor(np.log10(reach))
    step = next(power * part for part in (0.2, 0.5, 1, 2, 5) if reach < 4 * power * part)
    ticks = np.round(1 + step * np.arange(-3, 4), 12)
    return ticks[np.abs(np.log(ticks)) <= limit]


def repair(arms: Sequence[Arm]) -> Canvas:
    """Total effect, drop and self-repair; and what share of the drop each part makes up for."""
    groups = ablations.critical(arms)
    with style() as plt:
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 3.9), gridspec_kw={"width_ratios": [3, 4]}
        )
        effects = {"total effect": "te", "drop": "drop", "self-repair": "sr"}
        for group in groups:
            _bars(left, group.ablation, [_mean(group, name) for name in effects.values()])
            _bars(right, group.ablation, [_share(group, part) for part in _shapley(group.rows)])
            residual = [_share(group, part) for part in _residual(group.rows)]
            places = np.arange(3) + _offset(group.ablation)
            right.plot(
                places, [share.value for share in residual], ls="", marker="D", ms=5,
                mfc="white", mec=INK, mew=1.1, zorder=4,
            )  # fmt: skip
        left.set_xticks(range(3), list(effects))
        left.set_ylabel("logit difference, logit")
        left.set_title("What is lost and made up for")
        right.set_xticks(range(4), ["other heads", "MLPs", "norm scale", "self-repair"])
        right.set_ylabel("share of the drop, 1")
        right.set_title("Where the repair is written")
        for axis in (left, right):
            axis.axhline(0, color=INK, lw=0.8)
            axis.grid(visible=False, axis="x")
        handles = [plt.Rectangle((0, 0), 1, 1, fc=COLOURS[g.ablation], label=g.ablation)
                   for g in groups]  # fmt: skip
        handles.append(
            plt.Line2D(
                [],
                [],
                ls="",
                marker="D",
                ms=5,
                mfc="white",
                mec=INK,
                label="residual method (scale last)",
            )  # fmt: skip
        )
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _shapley(rows: pd.DataFrame) -> list[Column]:
    """Shapley's split of self-repair: other heads, MLPs, the norm's scale, and their sum."""
    phi = {f"phi_{player}": column(rows, f"phi_{player}") for player in PLAYERS}
    parts = shapley_shares(phi, drop=column(rows, "drop"))
    return [parts["heads"], parts["mlps"], parts["scale"], column(rows, "sr")]


def _residual(rows: pd.DataFrame) -> list[Column]:
    return [column(rows, f"sr_{part}") for part in ("heads", "mlps", "scale")]


def _mean(group: Group, name: str) -> Estimate:
    return estimate(group.rows, column(group.rows, name))


def _share(group: Group, part: Column) -> Estimate:
    return estimate(group.rows, (part, column(group.rows, "drop")))


def _offset(ablation: str) -> float:
    return (ABLATIONS.index(ablation) - 1) * WIDTH


def _bars(axis: Axes, ablation: str, found: Sequence[Estimate]) -> None:
    places = np.arange(len(found)) + _offset(ablation)
    axis.bar(places, [one.value for one in found], WIDTH * 0.92, color=COLOURS[ablation], zorder=2)
    axis.errorbar(
        places, [one.value for one in found], np.transpose([one.bars for one in found]),
        fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5, zorder=3,
    )  # fmt: skip


def percentiles(arms: Sequence[Arm]) -> Canvas:
    """Self-repair over drop in the prompts with the largest direct effects."""
    groups = ablations.critical(arms)
    own = ablations.own_direct_effect(groups)
    with style() as plt:
        figure, axis = plt.subplots(figsize=(7.2, 4.0))
        for group in groups:
            curve = ablations.by_percentile(group, own)
            aside = 1.04 ** (ABLATIONS.index(group.ablation) - 1)
            x = np.array([point.percent for point in curve]) * aside
            y = np.array([point.ratio for point in curve])
            has = np.array([point.interval is not None for point in curve])
            colour, marker = COLOURS[group.ablation], MARKERS[group.ablation]
            axis.plot(x, y, color=colour, lw=1.1, zorder=2)
            axis.plot(x[has], y[has], marker, color=colour, ms=6, zorder=3, label=group.ablation)
            axis.plot(x[~has], y[~has], marker, mfc="white", mec=colour, ms=6, zorder=3)
            for place, point in zip(x, curve, strict=True):
                if point.interval is not None:
                    ends = point.interval.low, point.interval.high
                    axis.plot([place, place], ends, color=colour, lw=1.3, zorder=1)
        first = ablations.by_percentile(groups[0], own)
        labels = [f"{point.percent:g} %\nn = {point.n}" for point in first]
        axis.set_xscale("log")
        axis.set_xticks([point.percent for point in first], labels, fontsize=8)
        axis.minorticks_off()
        axis.axhline(0, color=INK, lw=0.8)
        _keep_sight(axis, [point.ratio for point in first])
        axis.set_xlabel("prompts with the largest direct effect of the ablated heads, share, %")
        axis.set_ylabel("self-repair over drop, 1")
        handles, _ = axis.get_legend_handles_labels()
        hollow = plt.Line2D([], [], ls="", marker="o", mfc="white", mec=GREY, label="no interval")
        figure.legend(handles=[*handles, hollow], loc="outside lower center", ncols=4)
    return figure


def _keep_sight(axis: Axes, ratios: Sequence[float]) -> None:
    """Hold the points in view where an interval of few prompts would fill the axis."""
    low, high = min(*ratios, 0.0), max(*ratios, 0.0)
    room = 1.2 * (high - low or 1.0)
    axis.set_ylim(max(axis.get_ylim()[0], low - room), min(axis.get_ylim()[1], high + room))


def identity(arms: Sequence[Arm]) -> Canvas:
    """Change of log margin and of its two terms, of prompts that lead before and after."""
    groups = ablations.groups(arms, "examples")
    terms = {"log A": ("log_amplitude", ORANGE), "log G": ("log_alignment", GREEN),
             "log margin, their sum": ("log_margin", INK)}  # fmt: skip
    with style() as plt:
        figure, axis = plt.subplots(figsize=(7.6, 0.5 * len(groups) + 1.3))
        for row, group in enumerate(groups):
            both = positive(group.rows)
            if not both.any():
                continue
            for place, (name, colour) in zip((-0.25, 0, 0.25), terms.values(), strict=True):
                rows = group.rows[both]
                change = column(rows, name) - column(rows, f"{name}_clean")
                found = estimate(rows, change)
                axis.barh(row + place, found.value, 0.23, color=colour, zorder=2)
                axis.errorbar(
                    found.value, row + place, xerr=np.transpose([found.bars]),
                    fmt="none", ecolor=GREY if colour == INK else INK, elinewidth=1.1, capsize=2,
                    zorder=3,
                )  # fmt: skip
        axis.axvline(0, color=INK, lw=0.8)
        axis.set_yticks(range(len(groups)), [group.name for group in groups])
        axis.set(ylim=(len(groups) - 0.4, -0.6), xlabel="change from the clean run, mean, nat")
        axis.grid(visible=False, axis="y")
        handles = [plt.Rectangle((0, 0), 1, 1, fc=colour, label=name)
                   for name, (_, colour) in terms.items()]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def random_sets(arms: Sequence[Arm]) -> Canvas:
    """Chosen heads among random sets of their size and layers: effect, and norm at the end."""
    examples, depths = (ablations.groups(arms, table) for table in ("examples", "depths"))
    kept = [a for a in ABLATIONS if any(g.ablation == a for g in examples)]
    if all(group.label != KINDS["random_control", "random"] for group in examples):
        raise UndefinedError("no run of condition 'random_control' ablated random sets")
    last = ablations.last_depth(depths[0].rows)
    with style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(8.6, 0.62 * len(kept) + 1.5), sharey=True)
        for group in examples:
            _points(axes[0], group, kept, ablations.by_set(group.rows, "te").to_numpy())
        for group in depths:
            _points(axes[1], group, kept, ablations.norm_by_set(group.rows, last).to_numpy())
        axes[0].set_xlabel("change of the logit difference, logit")
        axes[1].set_xlabel(f"norm at END, depth {last}, ratio to clean, 1")
        axes[0].set_yticks(range(len(kept)), kept)
        axes[0].set_ylim(len(kept) - 0.5, -0.5)
        for axis, nothing in zip(axes, (0, 1), strict=True):
            axis.axvline(nothing, color=INK, lw=0.8)
            axis.grid(visible=False, axis="y")
        there = dict.fromkeys(group.label for group in examples)
        handles = [
            plt.Line2D([], [], ls="", marker=LOOKS[label][0], ms=LOOKS[label][2] + 1,
                       color=LOOKS[label][1], label=label)
            for label in there
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


LOOKS = {
    KINDS["critical", "all"]: ("D", RED, 7),
    KINDS["critical", "published"]: ("X", PURPLE, 8),
    KINDS["random_control", "random"]: ("o", GREY, 4),
    KINDS["random_control", "published"]: ("P", BLUE, 7),
}


def _points(axis: Axes, group: Group, kept: Sequence[str], values: np.ndarray) -> None:
    marker, colour, size = LOOKS[group.label]
    is_random = group.label == KINDS["random_control", "random"]
    scatter = SPREAD * (np.arange(len(values)) * 0.618 % 1 - 0.5) * is_random * 2
    axis.plot(
        values, kept.index(group.ablation) + scatter, ls="", marker=marker, color=colour, ms=size,
        alpha=0.6 if is_random else 0.9, mec="white" if not is_random else colour, mew=0.6,
        zorder=2 if is_random else 3,
    )  # fmt: skip
