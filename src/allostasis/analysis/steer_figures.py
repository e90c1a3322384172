"""What the report of `hsae_steer` shows: leakage at equal gain, features' effects, their heads.

A figure that lacks its data raises `UndefinedError` with the reason, which the report prints in its
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from allostasis.analysis.canvas import ARM_COLOURS, GREY, INK, RED, Figure, plain_ticks, style
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from allostasis.analysis.aggregate import Arm

SOURCES = {
    "teacher": "teacher's vector", "sae": "autoencoder's atom", "means": "difference of means",
    "random": "random direction",
}  # fmt: skip
MARKS = "os^DvP*X<>"  # of arms: where colours are sources, or once all colours are taken
MOST = 30  # features in the matrix
SMALLEST = 1e-6  # nats that a logarithmic axis shows
SHARED = "several arms"
CLAIMED = 1.0  # nats of gain at which claims compare leakage


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Figures of the experiment, in the report's order."""
    return [
        Figure(
            "leakage", "Leakage at equal gain",
            "KL(before || after) over tokens that are no members, at the dose at which held-out "
            "members gain the same; one point a concept of a run, bars are medians. A direction "
            "that several arms have in common is drawn once; one that does not reach the gain is "
            "counted in the table, not drawn.",
            partial(leakage, arms),
        ),
        Figure(
            "success", "Success against leakage at equal gain",
            "Share of contexts whose likeliest token is a member of the concept, along the doses; "
            "means over the directions that reach every dose, which may be few (the table counts "
            "them). Directions that several arms have in common are drawn once.",
            partial(success, arms),
        ),
        Figure(
            "features", "What single features do to the logit difference",
            "Set to 0, over the prompts in which they are active; features with the largest "
            "attribution on other prompts, and controls that are active as often.",
            partial(volcano, arms),
        ),
        Figure(
            "feature_heads", "Which heads can write which feature",
            "Share of a feature's direction in what a head can write, over its value for a random "
            "direction (d_head / d_model); features with the largest effect.",
            partial(matrix, arms),
        ),
    ]  # fmt: skip


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Tables of the experiment, in the report's order."""
    found = []
    if any(arm.condition != "features" and arm.runs for arm in arms):
        found.append(_steering_table(_steering(arms)))
    return found


def _read(arms: Sequence[Arm], name: str, *, features: bool) -> pd.DataFrame:
    pieces = [
        pd.read_parquet(run.record.folder / f"{name}.parquet").assign(
            arm=arm.condition, run=run.run_id, seed=run.seed
        )
        for arm in arms
        if (arm.condition == "features") == features
        for run in arm.runs
    ]
    if not pieces:
        wanted = "condition 'features'" if features else "a steering condition"
        raise UndefinedError(f"not run (no finished run of {wanted})")
    return pd.concat(pieces, ignore_index=True)


def _steering(arms: Sequence[Arm]) -> pd.DataFrame:
    return _read(arms, "steering", features=False)


def _reached(table: pd.DataFrame) -> pd.DataFrame:
    there = table[table["reached"]]
    if there.empty:
        raise UndefinedError("no direction reached its gain")
    return there


def leakage(arms: Sequence[Arm]) -> Canvas:
    """Points and medians, by source and arm, at the gain of the claims.

    Where no direction reached that: at the gain that most did.
    """
    there = _reached(_steering(arms))
    reached = there["asked"].value_counts()
    asked = CLAIMED if CLAIMED in reached else reached.idxmax()
    there = once(there[there["asked"] == asked])
    looks = _looks(there)
    levels = [level for level in ("parent", "child") if (there["level"] == level).any()]
    half = min(0.08, 0.3 / len(looks))  # of a median's bar
    with style() as plt:
        figure, axes = plt.subplots(
            1, len(levels), figsize=(4.2 * len(levels) + 1, 3.6), squeeze=False, sharey=True
        )
        for axis, level in zip(axes[0], levels, strict=True):
            for place, source in enumerate(SOURCES):
                rows = there[(there["level"] == level) & (there["source"] == source)]
                names = [name for name in looks if (rows["arm"] == name).any()]
                for at, name in enumerate(names):
                    colour, marker = looks[name]
                    values = (
                        rows.loc[rows["arm"] == name, "leakage"].clip(lower=SMALLEST).to_numpy()
                    )
                    x = place + (at - (len(names) - 1) / 2) * 0.7 / len(looks)
                    axis.plot(
                        np.full(len(values), x), values, marker, ms=3, alpha=0.5, color=colour
                    )
                    axis.hlines(np.median(values), x - half, x + half, color=INK, lw=2)
            axis.set_xticks(range(len(SOURCES)), [*SOURCES.values()], rotation=20, ha="right")
            axis.set(yscale="log", title=f"{level} concepts, gain {asked:g} nat")
        axes[0, 0].set_ylabel("leakage, nat")
        handles = [
            plt.Line2D([], [], ls="", marker=marker, color=colour, label=name)
            for name, (colour, marker) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def once(table: pd.DataFrame) -> pd.DataFrame:
    """Directions that several arms steer with, once, under the name of no arm.

    An autoencoder is its arm's own. Chance, means and the vectors of one teacher are what they are
    in every arm, and leak the same but for last digits.
    """
    one = ["seed", "level", "source", "synset", "draw", "asked", "same"]
    rows = table.assign(same=table["leakage"].map("{:.4e}".format))
    is_shared = (rows.groupby(one)["arm"].transform("nunique") > 1) & (rows["source"] != "sae")
    rows["arm"] = rows["arm"].mask(is_shared, SHARED)
    return rows[~(is_shared & rows.duplicated([*one, "arm"]))].drop(columns="same")


def _looks(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and marker of each arm; last, in grey, of what several have in common."""
    names = [name for name in dict.fromkeys(table["arm"]) if name != SHARED]
    looks = {}
    for at, name in enumerate(names):
        round_, place = divmod(at, len(ARM_COLOURS))
        looks[name] = (ARM_COLOURS[place], MARKS[round_ % len(MARKS)])
    return looks | ({SHARED: (GREY, ".")} if len(names) < table["arm"].nunique() else {})


def success(arms: Sequence[Arm]) -> Canvas:
    """One line a source and arm over doses, by level: of the directions that reach every dose."""
    there = once(every_dose(_steering(arms)))
    names = [name for name in _looks(there) if name != SHARED]
    marks = {name: MARKS[at % len(MARKS)] for at, name in enumerate(names)} | {SHARED: "."}
    levels = [level for level in ("parent", "child") if (there["level"] == level).any()]
    with style() as plt:
        figure, axes = plt.subplots(
            1, len(levels), figsize=(4.2 * len(levels) + 1, 3.8), squeeze=False, sharey=True
        )
        for axis, level in zip(axes[0], levels, strict=True):
            of_level = there[there["level"] == level]
            for (source, arm), rows in of_level.groupby(["source", "arm"], sort=False):
                means = rows.groupby("asked")[["leakage", "success"]].mean()
                axis.plot(
                    means["leakage"].clip(lower=SMALLEST), means["success"], "-",
                    marker=marks[str(arm)], ms=5,
                    color=_source_colour(str(source)), label=f"{source} of {arm}",
                )  # fmt: skip
            axis.set(xlabel="leakage, nat", xscale="log", title=f"{level} concepts")
            low, high = axis.get_xlim()
            plain_ticks(axis, is_narrow=bool(high < 10 * low))
        axes[0, 0].set_ylabel("share of contexts")
        handles = [
            plt.Line2D([], [], color=_source_colour(source), label=label)
            for source, label in SOURCES.items()
        ]
        handles += [
            plt.Line2D([], [], ls="", marker=marker, color=INK, label=name)
            for name, marker in marks.items()
            if (there["arm"] == name).any()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def every_dose(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of directions that reach every dose, so that doses are told of the same concepts.

    Raises:
        UndefinedError: No direction does.
    """
    one = ["run", "source", "synset", "draw"]
    found = table[table.groupby(one)["reached"].transform("all")]
    if found.empty:
        raise UndefinedError("no direction reached every gain")
    return found


def _source_colour(source: str) -> str:
    return ARM_COLOURS[list(SOURCES).index(source)]


def volcano(arms: Sequence[Arm]) -> Canvas:
    """Effect on the logit difference against its q-value."""
    impact = _read(arms, "feature_impact", features=True)
    rows = impact[(impact["kind"] == "zero") & (impact["metric"] == "logit_diff")]
    rows = rows[rows["q_value"].notna()]
    if rows.empty:
        raise UndefinedError("no feature was active in enough prompts")
    with style() as plt:
        figure, axis = plt.subplots(figsize=(6, 3.8))
        for role, colour in (("control", GREY), ("attribution", RED)):
            some = rows[rows["role"] == role]
            if some.empty:  # a small dictionary's features are all among those attributed
                continue
            q = -np.log10(np.maximum(some["q_value"].astype(float), 1e-30))
            axis.plot(some["value"], q, "o", ms=4, alpha=0.7, color=colour, label=role)
        axis.axhline(-np.log10(0.05), color=INK, ls=":", lw=1, label="q = 0.05")
        axis.set(xlabel="change of the logit difference, logit", ylabel="-log10 q")
        axis.legend(loc="best")
    return figure


def matrix(arms: Sequence[Arm]) -> Canvas:
    """Features with the largest effect against heads; a feature is one of one run's autoencoder."""
    grid = alignment_grid(
        _read(arms, "feature_impact", features=True),
        _read(arms, "feature_head_alignment", features=True),
    )
    with style() as plt:
        figure, axis = plt.subplots(figsize=(8, 0.16 * len(grid) + 1.6))
        axis.grid(visible=False)
        image = axis.imshow(grid.to_numpy(), aspect="auto", cmap="viridis", vmin=0)
        figure.colorbar(image, ax=axis, label="share / null")
        layers = grid.columns.get_level_values("layer").to_numpy()
        first = np.flatnonzero(np.diff(layers, prepend=-1))[:: max(1, len(set(layers)) // 10)]
        axis.set_xticks(first, [str(layer) for layer in layers[first]])
        labels = [f"{seed}: {feature}" for _, seed, feature in grid.index]
        axis.set_yticks(range(len(grid)), labels, fontsize=6)
        axis.set(xlabel="head, by layer", ylabel="seed: feature")
    return figure


def alignment_grid(impact: pd.DataFrame, aligned: pd.DataFrame) -> pd.DataFrame:
    """Share of a feature in what each head writes, over its null; largest effects first.

    Args:
        impact: Rows of feature_impact.parquet, with `run` and `seed`.
        aligned: Rows of feature_head_alignment.parquet, likewise.

    Returns:
        One row a run, seed and feature, for latent 7 of one seed has nothing to do with that of
        another; one column a layer and head.

    Raises:
        UndefinedError: No feature was active.
    """
    one = ["run", "seed", "feature"]
    rows = impact[(impact["kind"] == "zero") & (impact["metric"] == "logit_diff")]
    effect = rows.groupby(one)["value"].mean().abs().dropna().sort_values(ascending=False)
    if effect.empty:
        raise UndefinedError("no feature was active")
    ratio = aligned.assign(ratio=aligned["share"] / aligned["share_null"])
    grid = ratio.pivot_table(index=one, columns=["layer", "head"], values="ratio")
    return grid.reindex(effect.index[:MOST])


def _steering_table(table: pd.DataFrame) -> Table:
    rows = []
    by = ["arm", "source", "level", "asked"]
    for (arm, source, level, asked), some in table.groupby(by, sort=True):
        there = some[some["reached"]]
        cells = [
            number(float(there[name].mean())) if there[name].notna().any() else "-"
            for name in ("leakage", "leakage_logit", "success", "log_perplexity_change", "hedges_g")
        ]
        share = f"{len(there)} of {len(some)}"
        rows.append((str(arm), SOURCES[str(source)], str(level), f"{asked:g}", share, *cells))
    return Table(
        "Steering at equal gain",
        ("arm", "direction", "concepts", "gain, nat", "reached", "leakage, nat", "logit share",
         "success", "log perplexity, change", "Hedges' g"),
        tuple(rows),
        "Means over the concepts that reached the gain within twice the stream's median length. "
        "Hedges' g is of the gain over that of random directions of the same length, by context.",
    )  # fmt: skip
