"""What the report of `hsae_train` shows: scores beside each other, and how they came about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from allostasis.analysis import canvas
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.intervals import t_interval
from allostasis.analysis.seed_agreement import agreement_table
from allostasis.analysis.summaries import end
from allostasis.analysis.tables import Table
from allostasis.analysis.text import bracket, number

SCORES = {
    "explained_variance": "explained variance",
    "l0": "L0 (latents on a token)",
    "purity": "purity (AUROC, mean over concepts)",
    "leakage": "leakage (share of matched mass)",
    "ce_recovered": "cross-entropy recovered",
    "hierarchy_recovery": "children below their parent",
    "mcc_truth.parents": "cosine with the truth, parents",
    "mcc_truth.children": "cosine with the truth, children",
    "absorption": "absorption",
}
OF_LATENTS = ("dead_fraction", "dead_fraction.silent")
ON_THE_WAY = {
    "explained_variance": "explained variance, val",
    "l0": "L0, val",
    "dead_fraction.silent": "latents that never fired, val",
}


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Scores by arm, the curves on the way, and the losses with their gradients."""
    return [
        Figure(
            "scores", "Scores on held-out rows, by arm",
            "Bars: mean over seeds with its 95 % interval (t); dots: seeds. The dashed line is the "
            "explained variance of as many principal components as there are parents, which no "
            "parents alone can pass.",
            partial(_scores, arms),
        ),
        Figure(
            "frontier", "Explained variance by L0",
            "One dot a run. Flat autoencoders have the L0 and the number of parameters of the arm "
            "that they read.",
            partial(_frontier, arms),
        ),
        Figure(
            "dynamics", "On the way",
            "Thin: seeds; thick: their mean. Dotted: the end of stage A.",
            partial(_dynamics, arms),
        ),
        Figure(
            "losses", "Losses, their gradients, and how far atoms went",
            "Of each arm's first seed. Left: losses times their weights; middle: norms of their "
            "gradients on what the stage trains; right: mean cosine of the first atoms with where "
            "they began, solid for parents, dashed for children.",
            partial(_losses, arms),
        ),
    ]  # fmt: skip


def cells(arms: Sequence[Arm]) -> list[Figure]:
    """The frontier over K, where arms were run at several."""
    found = sweeps(arms)
    if not found:
        return []
    return [
        Figure(
            "k_sweep", "Explained variance by L0, over K",
            "K: the parents at once. Large: means over seeds; small: seeds. Circles are "
            "hierarchical. A flat autoencoder has the L0 that the arm it read has at that K, and "
            "its latents (diamonds), parameters (squares) or operations of a forward pass "
            "(triangles).",
            partial(_sweep, found),
        )
    ]  # fmt: skip


def sweeps(arms: Sequence[Arm]) -> list[tuple[str, list[Arm]]]:
    """Arms that differ in K alone, by rising K, under the name of their condition and device.

    Of two that differ in what is not looked at here, such as the metrics, the one with more seeds.
    """
    groups: dict[tuple[str, ...], dict[int, Arm]] = {}
    for arm in arms:
        if arm.runs:
            of_k = groups.setdefault(_but_for_k(arm), {})
            k = int(arm.setting("module.k"))
            if k not in of_k or len(arm.runs) > len(of_k[k].runs):
                of_k[k] = arm
    return [
        (key[0] if key[1] == "cpu" else f"{key[0]}, {key[1]}", [of_k[k] for k in sorted(of_k)])
        for key, of_k in groups.items()
        if len(of_k) > 1
    ]


def _but_for_k(arm: Arm) -> tuple[str, ...]:
    """Condition, device, and all settings but K and the seed."""
    settings = {part: dict(arm.config.get(part) or {}) for part in ("task", "model", "module")}
    for part in settings.values():
        part.pop("seed", None)
    settings["module"].pop("k")
    settings["module"].setdefault("k_child", 1)  # runs of before there was a choice
    return arm.condition, arm.device, json.dumps(settings, sort_keys=True)


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Every score of every arm, and how far seeds agree."""
    names = _recorded(arms, [*SCORES, *OF_LATENTS])
    rows = tuple(
        (arm.condition, str(len(arm.runs)), *(_cell(_ends(arm, name)) for name in names),
         str(arm.runs[0].summary.get("d_sae")), str(arm.runs[0].summary.get("n_parameters")))
        for arm in arms
    )  # fmt: skip
    columns = ("condition", "seeds", *names, "latents", "parameters")
    note = (
        "Mean over seeds and its 95 % interval (t) on held-out rows, after the last update. "
        "dead_fraction takes 100,000 of them (module.n_test, of 2 million of task.n_tokens); "
        "dead_fraction.silent is the share that fired in none of those there were."
    )
    return [Table("Scores", columns, rows, note), *agreement_table(arms)]


def _cell(values: np.ndarray) -> str:
    if len(values) == 0:
        return ""
    if np.ptp(values) == 0:  # one seed, or seeds that are all alike: no interval
        return number(values[0])
    found = t_interval(values)
    return f"{number(values.mean())} {bracket(found)}"


def _ends(arm: Arm, metric: str) -> np.ndarray:
    """The last held-out value of each run that has one."""
    found = []
    for run in arm.runs:
        try:
            found.append(end(run.curve(metric, split="test")))
        except UndefinedError:
            continue
    return np.array(found)


def _recorded(arms: Sequence[Arm], names: Sequence[str] | dict[str, str]) -> list[str]:
    there = {metric for arm in arms for run in arm.runs for metric in run.metrics}
    return [name for name in names if name in there]


def _scores(arms: Sequence[Arm]) -> Any:
    with canvas.style() as plt:
        names = _recorded(arms, SCORES)
        n_rows = -(-len(names) // 3)
        height = max(2.2, 0.24 * len(arms) + 0.7)
        drawn, axes = plt.subplots(
            n_rows, 3, figsize=(11, height * n_rows), squeeze=False, sharey=True
        )
        for axis, name in zip(axes.flat, names, strict=False):
            for place, arm in enumerate(arms):
                values = _ends(arm, name)
                if not len(values):
                    continue
                colour = canvas.ARM_COLOURS[place % len(canvas.ARM_COLOURS)]
                reach = None
                if np.ptp(values) > 0:
                    found = t_interval(values)
                    reach = [[values.mean() - found.low], [found.high - values.mean()]]
                axis.barh(place, values.mean(), xerr=reach, color=colour, alpha=0.5)
                axis.plot(values, np.full(len(values), place), ".", color=colour)
            if name == "explained_variance":
                bound = arms[0].runs[0].summary.get("explained_variance_pca")
                if isinstance(bound, float):
                    axis.axvline(bound, color=canvas.INK, linestyle="--", linewidth=1)
            axis.set_xlabel(canvas.wrapped(SCORES[name]))
        axes[0, 0].set_yticks(range(len(arms)), [arm.condition for arm in arms])
        axes[0, 0].set_ylim(len(arms) - 0.4, -0.6)
        for axis in axes.flat[len(names) :]:
            axis.set_visible(False)
    return drawn


def _frontier(arms: Sequence[Arm]) -> Any:
    with canvas.style() as plt:
        drawn, axis = plt.subplots(figsize=(canvas.MIN_WIDTH, 4))
        for place, arm in enumerate(arms):
            axis.plot(
                _ends(arm, "l0"), _ends(arm, "explained_variance"), "os^vD"[place % 5],
                color=canvas.ARM_COLOURS[place % len(canvas.ARM_COLOURS)], label=arm.condition,
            )  # fmt: skip
        axis.set_xlabel("L0 (latents on a token)")
        axis.set_ylabel("explained variance")
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


EQUAL = {"latents": ("D", "latents"), "params": ("s", "parameters"), "flops": ("^", "operations")}
"""Markers of flat autoencoders and the words for them, by what of them is a hierarchical one's."""


def _sweep(found: Sequence[tuple[str, list[Arm]]]) -> Any:
    with canvas.style() as plt:
        drawn, axis = plt.subplots(figsize=(canvas.MIN_WIDTH, 4))
        for (name, arms), (colour, dashes) in zip(found, canvas.looks(), strict=False):
            kind, match = (str(arms[0].setting(f"module.{key}")) for key in ("kind", "match"))
            marker, equal = ("o", "") if kind == "hsae" else EQUAL[match]
            label = f"{name}, equal {equal}" if equal else name
            points = []
            for arm in arms:
                l0, variance = _ends(arm, "l0"), _ends(arm, "explained_variance")
                axis.plot(l0, variance, marker, color=colour, ms=3, alpha=0.5)
                points.append((l0.mean(), variance.mean()))
                if not equal:
                    axis.annotate(
                        f"K={arm.setting('module.k')}", points[-1], xytext=(0, -14),
                        textcoords="offset points", ha="center", fontsize=8, color=colour,
                    )  # fmt: skip
            axis.plot(
                *zip(*points, strict=True), marker=marker, ls=dashes, color=colour, label=label
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(0.1)
        axis.set_xlabel("L0 (latents on a token)")
        axis.set_ylabel("explained variance")
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def _dynamics(arms: Sequence[Arm]) -> Any:
    with canvas.style() as plt:
        names = _recorded(arms, ON_THE_WAY)
        drawn, axes = plt.subplots(1, len(names), figsize=(11, 3.2), squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            for arm, (colour, dashes) in zip(arms, canvas.looks(), strict=False):
                curves = [run.curve(name, split="val") for run in arm.runs]
                for curve in curves:
                    axis.plot(curve.steps, curve.values, color=colour, alpha=0.3, linewidth=0.7)
                if all(np.array_equal(curve.steps, curves[0].steps) for curve in curves):
                    mean = np.mean([curve.values for curve in curves], axis=0)
                    axis.plot(curves[0].steps, mean, color=colour, ls=dashes, label=arm.condition)
            stage = (arms[0].config.get("module") or {}).get("stage_a") or {}
            if stage.get("steps"):
                axis.axvline(stage["steps"], color=canvas.GREY, linestyle=":")
            axis.set_xlabel(canvas.STEPS)
            axis.set_ylabel(ON_THE_WAY[name])
        axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def _curves_of(run: RunView) -> pd.DataFrame:
    path = run.record.folder / "training.parquet"
    columns = ["step", "stage", "name", "kind", "value"]
    return pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=columns)


def _losses(arms: Sequence[Arm]) -> Any:
    with canvas.style() as plt:
        drawn, axes = plt.subplots(len(arms), 3, figsize=(11, 2 * len(arms)), squeeze=False)
        for row, arm in zip(axes, arms, strict=True):
            table = _curves_of(arm.runs[0])
            for axis, kind in zip(
                row, ("weighted", "gradient_norm", "cosine_to_start"), strict=True
            ):
                chosen = table[table["kind"] == kind]
                for name, part in chosen.groupby("name"):
                    style = "--" if name == "children" else "-"
                    axis.plot(part["step"], part["value"], style, label=str(name))
                if kind != "cosine_to_start" and (chosen["value"] > 0).any():
                    axis.set_yscale("log")
                if chosen.empty:
                    axis.set_visible(False)
                axis.set_title(f"{arm.condition}: {kind.replace('_', ' ')}", fontsize=9)
            if not table.empty:
                row[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        for axis in axes[-1]:
            axis.set_xlabel(canvas.STEPS)
    return drawn
