"""Figures of suppressors and of features in superposition.

A figure that lacks its data raises `UndefinedError` with the reason, which the report prints in its
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from allostasis.analysis.canvas import ARM_COLOURS, BLUE, GREY, INK, RED, STEPS, style
from allostasis.analysis.curves import RunView, UndefinedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from allostasis.analysis.aggregate import Arm

SEARCHED = {"suppressors_toy": "toy transformer", "suppressors_lm": "language model"}
VALUES = ("resample", "mean", "zero")
LEAST_BOX = 5
LABELLED = 10  # layers at most that an axis names
TICKS = (0.1, 0.2, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10, 20, 50)


def _first(arms: Sequence[Arm], *conditions: str) -> list[RunView]:
    """The first run of each of these conditions that has one."""
    runs = [arm.runs[0] for arm in arms if arm.condition in conditions and arm.runs]
    if not runs:
        raise UndefinedError(f"not run (no finished run of {' or '.join(conditions)})")
    return runs


def _name(run: RunView) -> str:
    if run.model:
        return run.title.partition(" (")[0]
    return SEARCHED.get(run.condition, run.condition)


def _scans(run: RunView) -> dict[str, dict[str, Any]]:
    """What each ablation of a run found."""
    scans = run.run.get("suppressors") or {}
    found = {value: scans[value] for value in VALUES if value in scans}
    if not found:
        raise UndefinedError("the run looked for no suppressors")
    return found


def _told_apart(run: RunView) -> dict[str, dict[str, Any]]:
    """Ablations that found suppressors, or one of them all if none did: the heads are the same."""
    scans = _scans(run)
    found = {value: scan for value, scan in scans.items() if scan["selected"]}
    return found or dict([*scans.items()][:1])


def _panels(
    plt: Any, runs: Sequence[RunView], scans: Sequence[dict[str, dict[str, Any]]], ylabel: str
) -> tuple[Canvas, list[tuple[Axes, RunView, str, dict[str, Any]]]]:
    """A panel for each run, in rows, and each of some of its ablations, with what it found."""
    width = max(map(len, scans))
    figure, axes = plt.subplots(
        len(runs), width, figsize=(max(5.6, 3.6 * width + 0.8), 3.6 * len(runs)), squeeze=False,
        sharey="row",
    )  # fmt: skip
    panels = []
    for row, run, found in zip(axes, runs, scans, strict=True):
        row[0].set_ylabel(ylabel)
        for axis, (value, scan) in zip(row, found.items(), strict=False):
            axis.set_title(f"{_name(run)}, {value}")
            panels.append((axis, run, value, scan))
        for axis in row[len(found) :]:
            axis.axis("off")
    return figure, panels


def effects(arms: Sequence[Arm]) -> Canvas:
    """Effect of each head, sorted, with what passes."""
    runs = _first(arms, *SEARCHED)
    with style() as plt:
        scans = [_scans(run) for run in runs]
        figure, panels = _panels(plt, runs, scans, "loss clean - loss ablated,\nnat a token")
        for axis, run, value, scan in panels:
            rows = run.interventions("ablation_effect", split="select")
            rows = rows[rows["intervention"].str.startswith(f"{value}:")].sort_values("value")
            q = run.interventions("ablation_effect.q", split="select")
            q = q.set_index("intervention")["value"].reindex(rows["intervention"]).to_numpy()
            where = np.arange(len(rows))
            chosen = _heads(rows).isin(scan["selected"]).to_numpy()
            middle = rows["value"].to_numpy()
            off = np.abs(rows[["ci_low", "ci_high"]].to_numpy().T - middle)
            axis.errorbar(where, middle, yerr=off, fmt="none", ecolor=GREY, elinewidth=0.8)
            for mask, colour, label in ((~chosen, BLUE, "clean"), (chosen, RED, "suppressor")):
                if mask.any():
                    axis.plot(where[mask], middle[mask], "o", ms=4, color=colour, label=label)
            axis.axhline(0, color=INK, lw=0.8)
            least = run.record.config["module"]["min_effect"]
            axis.axhline(least, color=GREY, ls="--", lw=1, label=f"least effect, {least:g} nat")
            passing = middle[(q <= run.record.config["module"]["q"]) & (middle > 0)]
            if len(passing):
                axis.axhline(passing.min(), color=RED, ls=":", lw=1.2, label="passes the rate")
            axis.set(xlabel=f"{len(rows)} heads, by effect")
            axis.locator_params(axis="x", integer=True)
            axis.legend(loc="lower right")
    return figure


def _heads(rows: pd.DataFrame) -> pd.Series:
    layers, heads = rows["layer"].astype(int), rows["head"].astype(int)
    return layers.astype(str) + "." + heads.astype(str)


def variances(arms: Sequence[Arm]) -> Canvas:
    """Variance of heads' writes by layer, suppressors apart, by what found them."""
    runs = _first(arms, *SEARCHED)
    with style() as plt:
        scans = [_told_apart(run) for run in runs]
        figure, panels = _panels(plt, runs, scans, "variance of a head's write, resid$^2$")
        for axis, run, _, scan in panels:
            rows = run.table("head_write_variance", split="measure")
            rows = rows[rows["step"] == rows["step"].max()]
            chosen = _heads(rows).isin(scan["selected"])
            layers = sorted(rows["layer"].astype(int).unique())
            for mask, colour, shift in ((~chosen, BLUE, -0.18), (chosen, RED, 0.18)):
                for place, layer in enumerate(layers):
                    _box(axis, place + shift, rows[mask & (rows["layer"] == layer)], colour)
            every = -(-len(layers) // LABELLED)
            axis.set_xticks(range(0, len(layers), every), map(str, layers[::every]))
            axis.set(yscale="log", xlabel="layer", xlim=(-0.6, len(layers) - 0.4))
            handles = [
                plt.Line2D([], [], ls="", marker="o", color=colour, label=label)
                for colour, label in ((BLUE, "clean"), (RED, f"suppressor ({chosen.sum()})"))
            ]
            axis.legend(handles=handles)
    return figure


def _box(axis: Axes, place: float, rows: pd.DataFrame, colour: str) -> None:
    values = rows["value"].to_numpy()
    if len(values) >= LEAST_BOX:
        line = {"color": colour}
        axis.boxplot(
            [values], positions=[place], widths=0.28, boxprops=line, whiskerprops=line,
            capprops=line, medianprops=line, flierprops={"markeredgecolor": colour, "ms": 3},
            manage_ticks=False,
        )  # fmt: skip
    else:
        axis.plot(np.full(len(values), place), values, "o", ms=5, color=colour, alpha=0.8)


def ratios(arms: Sequence[Arm]) -> Canvas:
    """E1 and E2 by model and ablation, one point a seed."""
    rows: list[tuple[str, list[tuple[float, float, float]], list[float]]] = []
    for arm in arms:
        if arm.condition not in SEARCHED:
            continue
        for value in VALUES:
            e1, e2 = [], []
            for run in arm.runs:
                if value not in (run.run.get("suppressors") or {}):
                    continue
                found = run.records(f"head_write_variance.ratio_{value}")
                e1 += [(r["value"], r["ci_low"], r["ci_high"]) for r in found]
                e2 += [r["value"] for r in run.records(f"residual_variance.ratio_{value}")]
            if any(value in (run.run.get("suppressors") or {}) for run in arm.runs):
                rows.append((f"{_name(arm.runs[0])}\n{value}", e1, e2))
    if not rows:
        raise UndefinedError("not run (no run looked for suppressors)")
    if not any(e1 for _, e1, _ in rows):
        raise UndefinedError("no run found a suppressor, so there is no ratio to draw")
    with style() as plt:
        figure, axes = plt.subplots(1, 2, figsize=(8.6, 0.6 * len(rows) + 1.4), sharey=True)
        for place, (_, e1, e2) in enumerate(rows):
            spread = np.linspace(-0.2, 0.2, len(e1)) if len(e1) > 1 else np.zeros(1)
            for shift, (middle, low, high) in zip(spread, e1, strict=False):
                axes[0].plot([low, high], [place + shift] * 2, color=BLUE, lw=1.2)
                axes[0].plot(middle, place + shift, "o", ms=4, color=BLUE)
            axes[1].plot(e2, place + spread[: len(e2)], "o", ms=4, color=BLUE)
            if not e1:
                axes[0].text(1.05, place, "none found", va="center", color=GREY, fontsize=9)
        for axis, label in zip(axes, ("E1, suppressors over clean", "E2, ablated over intact"),
                               strict=True):  # fmt: skip
            axis.axvline(1, color=INK, ls=":", lw=1)
            axis.axvline(2, color=INK, ls="--", lw=1)
            low, high = axis.get_xlim()
            axis.set(xscale="log", xlabel=label, xlim=(min(low, 0.7), max(high, 2.4)))
            ticks = [tick for tick in TICKS if min(low, 0.7) <= tick <= max(high, 2.4)]
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        axes[0].set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def plants(arms: Sequence[Arm]) -> Canvas:
    """The interval of each planted suppressor."""
    runs = [run for arm in arms if arm.condition == "planted" for run in arm.runs]
    if not runs:
        raise UndefinedError("not run (no finished run of planted)")
    table = pd.concat([run.prompts("examples") for run in runs], ignore_index=True)
    table = table.sort_values(["planted_ratio", "seed", "plant", "ablation"], ignore_index=True)
    found = table.groupby(["seed", "plant", "planted_ratio"], sort=False).agg({
        "is_found": "all",
        "ratio": "first",
        "ratio_low": "first",
        "ratio_high": "first",
    })
    found = found.reset_index().sort_values(["planted_ratio", "seed", "plant"], ignore_index=True)
    with style() as plt:
        figure, axis = plt.subplots(figsize=(7.2, 3.4))
        for place, row in found.iterrows():
            colour = RED if row["planted_ratio"] > 2 else BLUE
            off = [[row["ratio"] - row["ratio_low"]], [row["ratio_high"] - row["ratio"]]]
            axis.errorbar(
                place, row["ratio"], yerr=off, fmt="o", ms=3, color=colour, elinewidth=1.2,
                capsize=4, mfc=colour if row["is_found"] else "white",
            )  # fmt: skip
        for ratio in sorted(found["planted_ratio"].unique()):
            axis.axhline(ratio, color=GREY, ls="--", lw=1)
        axis.set(yscale="log", xlabel="plant, all seeds", ylabel="E1 of the plant")
        axis.set_yticks([0.5, 1, 2, 3, 4], ["0.5", "1", "2", "3", "4"])
        axis.minorticks_off()
        axis.set_xticks([])
    return figure


def divergence(arms: Sequence[Arm]) -> Canvas:
    """Variance of each head's write over training."""
    (run,) = _first(arms, "suppressors_toy")
    scan = next(iter(_scans(run).values()))
    rows = run.table("head_write_variance.trained", split="measure")
    if rows.empty:
        raise UndefinedError("head_write_variance.trained was not recorded")
    layers = sorted(rows["layer"].astype(int).unique())
    with style() as plt:
        figure, axes = plt.subplots(
            1, len(layers), figsize=(3.8 * len(layers) + 0.6, 3.2), sharey=True, squeeze=False
        )
        for axis, layer in zip(axes[0], layers, strict=True):
            here = rows[rows["layer"] == layer]
            for head in sorted(here["head"].astype(int).unique()):
                is_one = f"{layer}.{head}" in scan["selected"]
                curve = here[here["head"] == head].sort_values("step")
                axis.plot(
                    curve["step"], curve["value"], color=RED if is_one else BLUE,
                    alpha=1 if is_one else 0.6, label=f"head {head}",
                    ls=("-", "--", ":", "-.")[head % 4],
                )  # fmt: skip
            axis.set(title=f"layer {layer}", xlabel=STEPS, yscale="log")
        axes[0, -1].legend()
        axes[0, 0].set_ylabel("variance of a head's write, resid$^2$")
    return figure


def _features(arms: Sequence[Arm]) -> pd.DataFrame:
    (run,) = _first(arms, "toy_models")
    table = run.prompts("examples")
    return table[table["represented"].astype(bool)]


def dimensionality(arms: Sequence[Arm]) -> Canvas:
    """D_i by density, one panel for each n/m and decay."""
    table = _features(arms)
    ratios_, decays = sorted(table["ratio"].unique()), sorted(table["decay"].unique())
    hidden = sorted(table["hidden"].unique())
    with style() as plt:
        figure, axes = plt.subplots(
            len(decays), len(ratios_), figsize=(2.6 * len(ratios_) + 1.6, 2.6 * len(decays) + 0.6),
            sharex=True, sharey=True, squeeze=False,
        )  # fmt: skip
        for row, decay in zip(axes, decays, strict=True):
            for axis, ratio in zip(row, ratios_, strict=True):
                for index, (colour, m) in enumerate(zip(ARM_COLOURS, hidden, strict=False)):
                    cell = table[(table["ratio"] == ratio) & (table["decay"] == decay)]
                    cell = cell[cell["hidden"] == m]
                    scatter = np.exp(0.12 * ((np.arange(len(cell)) * 0.618) % 1 - 0.5))
                    axis.plot(
                        cell["density"] * scatter * 1.4 ** (index - (len(hidden) - 1) / 2),
                        cell["dimensionality"], "o", ms=3, color=colour, alpha=0.5, mew=0,
                        label=f"m = {m}",
                    )  # fmt: skip
                axis.axhline(0.5, color=GREY, ls=":", lw=1)
                axis.set(xscale="log", title=f"n/m = {ratio}, decay {decay:g}", ylim=(-0.03, 1.05))
        for axis in axes[-1]:
            axis.set_xlabel("density")
        for axis in axes[:, 0]:
            axis.set_ylabel("dimensionality D")
        axes[0, 0].legend()
    return figure


def capacity(arms: Sequence[Arm]) -> Canvas:
    """Norm of each feature against its capacity, by cell."""
    table = _features(arms)
    hidden, decays = sorted(table["hidden"].unique()), sorted(table["decay"].unique())
    densities = sorted(table["density"].unique(), reverse=True)
    with style() as plt:
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(densities)))
        figure, axes = plt.subplots(
            len(hidden), len(decays), figsize=(3.6 * len(decays) + 1.6, 2.9 * len(hidden) + 0.6),
            sharex=True, sharey=True, squeeze=False,
        )  # fmt: skip
        for row, m in zip(axes, hidden, strict=True):
            for axis, decay in zip(row, decays, strict=True):
                for colour, density in zip(colours, densities, strict=True):
                    cell = table[(table["hidden"] == m) & (table["decay"] == decay)]
                    cell = cell[cell["density"] == density]
                    axis.plot(
                        cell["capacity"], cell["norm"], "o", ms=3.5, color=colour, alpha=0.7,
                        mew=0, label=f"density {density:g}",
                    )  # fmt: skip
                kind = "equal importance" if decay == 1 else f"importance {decay:g}$^i$"
                axis.set_title(f"m = {m}, {kind}")
        for axis in axes[-1]:
            axis.set_xlabel("capacity C")
        for axis in axes[:, 0]:
            axis.set_ylabel("norm $\\|W_i\\|$")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure
