"""What the report of `hsae_teacher` shows: angles beside nulls, and what noise cannot give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from allostasis.analysis import canvas, lab_tables
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

SHOWN = {
    "own": ("as estimated", canvas.BLUE),
    "shuffled": ("shuffled rows", canvas.ORANGE),
    "gaussian": ("Gaussian rows", canvas.GREY),
    "permuted": ("permuted nouns", canvas.PURPLE),
    "euclidean": ("Euclidean metric", canvas.GREEN),
    "random_parent": ("random parents", canvas.RED),
}
COSINE = 0.174  # of 80 degrees


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Angles, leave-child-out, existence, the tree, corners, doses; of one run each."""
    of = f"Of condition {_main(arms)[0]}, its first seed."
    return [
        Figure(
            "angles", "Angles of parent and difference, beside their nulls",
            "Left: with all training tokens, where noise gives 90 degrees by arithmetic; dashed: "
            "what random parents give in closed form. Right: cosines from lemmas that the two do "
            f"not share; dotted: 80 degrees, the bound. {of}",
            partial(_styled, _angles, arms),
        ),
        Figure(
            "leave_child_out", "Parents without the child's tokens",
            "Cosine of difference and parent, the parent from the tokens that are not the child's, "
            "by the child's share of both. Line: what noise gives in closed form; a perfect "
            f"hierarchy lies near 0, not at it. {of}",
            partial(_styled, _leave_child_out, arms),
        ),
        Figure(
            "existence", "Held-out members along their concept's vector",
            f"d' of held-out members against other tokens, one a concept; dotted: the bound. {of}",
            partial(_styled, _existence, arms),
        ),
        Figure(
            "tree", "Concepts in the order of the tree",
            "Left: cosine of each two concepts' vectors. Right: steps between them in the tree; "
            f"concepts below different roots are grey. {of}",
            partial(_styled, _tree, arms),
        ),
        Figure(
            "corners", "Held-out tokens of two children",
            "Along their parent's vector and along their difference, in units of both lengths; the "
            "children's vectors are at -0.5 and 0.5. Above: the model's rows; below: the same with "
            f"shuffled rows, at equal scale. {of}",
            partial(_styled, _corners, arms),
        ),
        Figure(
            "doses", "What adding a parent's vector does",
            "Left: change of the logits of its held-out members, of other parents' members, and of "
            "its members under random directions of the same length. Right: KL(before || after) "
            f"among its own members, nats, at doses by gain. One dot a parent. {of}",
            partial(_styled, _doses, arms),
        ),
    ]  # fmt: skip


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Controls beside the model, nulls beside closed forms, gates of every arm, doses."""
    makers = [gate_table, control_table, null_table, family_table, dose_table]
    return lab_tables.made(makers, arms)


# ---------------------------------------------------------------- tables


def gate_table(arms: Sequence[Arm]) -> Table:
    """Whether each run found a geometry: noise must not."""
    rows = []
    for condition, run in lab_tables.runs(arms):
        said: Any = run.summary
        scalars = [said[name] for name in ("angle", "dprime", "defined", "rms")]
        values = ["undefined" if one is None else number(one) for one in scalars]
        rows.append((condition, str(run.seed), *values, str(said["gate"])))
    return Table(
        "The gate",
        ("condition", "seed", "median angle", "mean d'", "edges defined", "RMS cosine", "gate"),
        tuple(rows),
        "Passed: the interval of d' lies above 1, most edges have a parent above noise, the root "
        "mean square cosine from disjoint lemmas lies below 0.174 with its interval, and random "
        "parents lie above it. It decides no claim; every run is shown, noise included.",
    )


def control_table(arms: Sequence[Arm]) -> Table:
    """Each statistic of the causal arm, beside its controls."""
    condition, run = _main(arms)
    rows = _readings(run)
    metrics = [name for name in rows["metric"].unique() if not name.startswith(("null.", "dose."))]
    cells = []
    for metric in metrics:
        own = rows[rows["metric"] == metric].set_index("control")
        cells.append((metric, str(own["unit"].iloc[0]), *(_cell(own, name) for name in SHOWN)))
    return Table(
        f"Controls of {condition}",
        ("statistic", "unit", *(title for title, _ in SHOWN.values())),
        tuple(cells),
        "Each control re-estimates every vector; random parents alone pair finished ones. "
        "Intervals resample subtrees, 95 %. Shuffled angles are expected at 90 degrees.",
    )


def null_table(arms: Sequence[Arm]) -> Table:
    """Simulated nulls beside their closed forms."""
    _, run = _main(arms)
    rows = _readings(run)
    rows = rows[rows["metric"].str.startswith("null.")]
    columns = ["value_clean", "value", "delta"]
    cells = [
        (name.removeprefix("null.").replace("_", " "), *map(number, values), str(n))
        for name, values, n in zip(
            rows["metric"], rows[columns].to_numpy(float), rows["n"], strict=True
        )
    ]
    said: Any = run.summary
    word = "" if said["checks"]["calibrated"] else "NOT "
    return Table(
        "Nulls",
        ("cosine of difference and parent", "closed form", "simulated", "difference", "edges"),
        tuple(cells),
        "Closed forms are of isotropic rows and means of tokens. Gaussian lines may differ by "
        f"0.05; here the instrument is {word}calibrated. "
        "Random parents of the model itself are not orthogonal to a child, since all nouns share a "
        "direction.",
    )


def family_table(arms: Sequence[Arm]) -> Table:
    """Level and simplex tests of the parents with most held-out tokens."""
    _, run = _main(arms)
    rows = _table(run, "families")
    rows = rows[rows["control"] == "own"].nlargest(12, "n")
    columns = ("k", "n", "eta", "eta_null", "p", "furthest", "own_weight", "accuracy",
               "accuracy_null", "effective_rank", "slant")  # fmt: skip
    values = rows.reindex(columns=[*columns]).to_numpy(float)  # older runs have no slant
    cells = [
        (str(name), *("undefined" if np.isnan(value) else number(value) for value in row))
        for name, row in zip(rows["concept"], values, strict=True)
    ]
    heads = ("parent", "children", "tokens", "eta^2", "eta^2 of permuted labels", "p",
             "furthest level from 1", "own weight", "nearest corner right", "of permuted labels",
             "effective rank", "largest |cos| with a difference")  # fmt: skip
    return Table(
        "Children of one parent", heads, tuple(cells),
        "Of held-out tokens of exactly one child. Were differences orthogonal to the parent, all "
        "children would lie at one level, and eta^2 be that of permuted labels. The last column is "
        "of the parent with the differences of its children, from unlike lemmas, where the parent "
        "is above noise; family.slant has it beside the controls.",
    )  # fmt: skip


def dose_table(arms: Sequence[Arm]) -> Table:
    """Median effect of adding a vector, by dose."""
    _, run = _main(arms)
    rows = _table(run, "doses")
    cells = []
    for (by, asked), group in rows.groupby(["by", "asked"]):
        there = group[group["reached"]]
        medians = [
            number(float(there[c].median())) if len(there) else "-"
            for c in ("alpha", "gain", "shift", "shift_siblings", "shift_random", "kl", "kl_random")
        ]
        cells.append((f"{by} {asked:g}", f"{len(there)} of {len(group)}", *medians))
    heads = ("dose", "reached", "in vectors", "gain, nat", "members, logit",
             "other parents' members", "random direction", "KL, nat", "of random")  # fmt: skip
    return Table(
        "Doses", heads, tuple(cells),
        "Medians over parents. A dose by gain is the least at which held-out members gain so many "
        "nats on average; it is not reached where more than twice the stream's own length would be "
        "needed, or where the gain falls again before.",
    )  # fmt: skip


def _cell(rows: pd.DataFrame, name: str) -> str:
    if name not in rows.index:
        return "-"
    row: Any = rows.loc[name]
    value, low, high = (row[column] for column in ("value", "ci_low", "ci_high"))
    return number(value) if pd.isna(low) else f"{number(value)} [{number(low)}, {number(high)}]"


# ---------------------------------------------------------------- what is read


def _main(arms: Sequence[Arm]) -> tuple[str, RunView]:
    """The causal arm's first run, or the first of any."""
    found = [*lab_tables.runs(arms)]
    if not found:
        raise UndefinedError("no finished run")
    return next((pair for pair in found if pair[0] == "causal"), found[0])


def _readings(run: RunView) -> pd.DataFrame:
    rows = run.record.units
    return rows.assign(control=rows["intervention"].fillna("own"))


def _table(run: RunView, name: str) -> pd.DataFrame:
    path = run.record.folder / f"{name}.parquet"
    if not path.is_file():
        raise UndefinedError(f"{name}.parquet was not recorded")
    return pd.read_parquet(path)


def _edges(run: RunView, statistic: str) -> pd.DataFrame:
    """One column a control, one row a child."""
    rows = _table(run, "edges")
    rows = rows[rows["statistic"] == statistic]
    return rows.pivot(index="child", columns="control", values="value")


# ---------------------------------------------------------------- figures


def _styled(draw: Callable[[Sequence[Arm]], Any], arms: Sequence[Arm]) -> Any:
    """A figure in the report's style."""
    with canvas.style():
        return draw(arms)


def _angles(arms: Sequence[Arm]) -> Any:
    import matplotlib.pyplot as plt

    _, run = _main(arms)
    whole, cross, null = (_edges(run, name) for name in ("angle", "cross", "null"))
    canvas_, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for axes, frame, bins in ((left, whole, np.linspace(60, 150, 61)),
                              (right, cross, np.linspace(-1, 1, 61))):  # fmt: skip
        for name, (title, colour) in SHOWN.items():
            if name in frame and frame[name].notna().any():
                axes.hist(
                    frame[name].dropna().clip(bins[0], bins[-1]), bins, histtype="step", lw=1.6,
                    color=colour, label=title,
                )  # fmt: skip
        axes.set_ylabel("edges")
    left.axvline(90, color=canvas.INK, lw=0.8)
    angle = np.degrees(np.arccos(null["random_parent"].mean()))
    left.axvline(angle, color=canvas.RED, ls="--", lw=1)
    for bound in (-COSINE, COSINE):
        right.axvline(bound, color=canvas.INK, ls=":", lw=1)
    left.set(xlabel="angle of parent and difference (degrees)", title="all training tokens")
    right.set(xlabel="cosine of parent and difference", title="no lemma in common")
    handles, labels = left.get_legend_handles_labels()
    canvas_.legend(handles, labels, loc="outside lower center", ncols=6)
    return canvas_


def _leave_child_out(arms: Sequence[Arm]) -> Any:
    import matplotlib.pyplot as plt

    _, run = _main(arms)
    values, rest, child = (_edges(run, name) for name in ("lco", "n_rest", "n_child"))
    share = (child["own"] / (child["own"] + rest["own"])).reindex(values.index)
    canvas_, axes = plt.subplots(figsize=(7.4, 4.4))
    for name in ("shuffled", "own"):
        if name in values:
            title, colour = SHOWN[name]
            axes.scatter(share, values[name], s=14, color=colour, alpha=0.7, label=title, lw=0)
    line = np.linspace(0.005, max(0.6, float(share.max())), 200)
    axes.plot(line, -np.sqrt(line), color=canvas.INK, lw=1.2, label="noise, closed form")
    axes.axhline(0, color=canvas.INK, lw=0.6)
    axes.set(xlabel="child's tokens / (child's + parent's others)",
             ylabel="cosine of difference and parent")  # fmt: skip
    axes.legend(loc="lower left")
    return canvas_


def _existence(arms: Sequence[Arm]) -> Any:
    import matplotlib.pyplot as plt

    _, run = _main(arms)
    rows = _table(run, "existence")
    canvas_, axes = plt.subplots(figsize=(7.4, 4))
    bins = np.linspace(float(rows["dprime"].min()), float(rows["dprime"].max()), 50)
    for name, group in rows.groupby("control"):
        title, colour = SHOWN[str(name)]
        axes.hist(group["dprime"], [*bins], histtype="step", lw=1.6, color=colour, label=title)
    axes.axvline(1, color=canvas.INK, ls=":", lw=1)
    axes.set(xlabel="d' of held-out members", ylabel="concepts")
    axes.legend()
    return canvas_


def _tree(arms: Sequence[Arm]) -> Any:
    import matplotlib.pyplot as plt
    import seaborn as sns

    _, run = _main(arms)
    rows = _table(run, "pairs")
    size = int(rows["other_place"].max()) + 1
    cosines = np.eye(size)
    cosines[rows["place"], rows["other_place"]] = rows["cosine"]
    cosines[rows["other_place"], rows["place"]] = rows["cosine"]
    canvas_, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    for axes, values, label, colours, limits in (
        (left, cosines, "cosine", "RdBu_r", (-1, 1)),
        (right, _steps(run, rows), "steps in the tree", "viridis_r", (None, None)),
    ):
        axes.set_facecolor(canvas.PALE)
        sns.heatmap(
            values, ax=axes, square=True, xticklabels=50, yticklabels=50, rasterized=True,
            cmap=colours, vmin=limits[0], vmax=limits[1],
            cbar_kws={"label": label, "shrink": 0.8},
        )  # fmt: skip
        axes.grid(visible=False)
        axes.set(xlabel="concept, in the order of the tree", ylabel="concept")
    return canvas_


def _steps(run: RunView, pairs: pd.DataFrame) -> np.ndarray:
    """Steps between each two concepts; NaN where they have no root in common."""
    edges = _table(run, "edges").drop_duplicates("child")
    above = dict(zip(edges["child"], edges["parent"], strict=True))
    ends = (("synset", "place"), ("other", "other_place"))
    places = {s: p for a, b in ends for s, p in zip(pairs[a], pairs[b], strict=True)}

    def line(synset: int) -> list[int]:
        return [synset] if synset not in above else [synset, *line(above[synset])]

    lines = {synset: line(synset) for synset in places}
    found = np.full((len(places), len(places)), np.nan)
    for one, first in places.items():
        for other, second in places.items():
            common = next((s for s in lines[one] if s in set(lines[other])), None)
            if common is not None:
                found[first, second] = lines[one].index(common) + lines[other].index(common)
    return found


def _corners(arms: Sequence[Arm]) -> Any:
    import matplotlib.pyplot as plt

    _, run = _main(arms)
    rows = _table(run, "projections")
    parents = list(dict.fromkeys(rows.loc[rows["control"] == "own", "parent"]))
    controls = [name for name in ("own", "shuffled") if (rows["control"] == name).any()]
    canvas_, grid = plt.subplots(
        len(controls), len(parents), figsize=(3.2 * len(parents), 3.2 * len(controls)),
        squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    for place, parent in enumerate(parents):
        for axes, control in zip(grid[:, place], controls, strict=True):
            here = rows[(rows["parent"] == parent) & (rows["control"] == control)]
            children = [c for c in dict.fromkeys(here["child"]) if c != -1]
            colours = dict(zip(sorted(children), (canvas.BLUE, canvas.RED), strict=True))
            for child, colour in {-1: canvas.PALE, **colours}.items():
                own = here[here["child"] == child]
                edge = canvas.GREY if child == -1 else colour
                axes.scatter(own["across"], own["along"], s=9, color=colour, ec=edge, lw=0.3,
                             label=str(own["child_name"].iloc[0]) if len(own) else "")  # fmt: skip
            axes.axhline(1, color=canvas.INK, lw=0.6)
            if control == "own":
                axes.set_title(str(here["parent_name"].iloc[0]))
                axes.legend(fontsize=7, loc="upper left")
            axes.set(xlim=(-2, 2), ylim=(-1.5, 3))
    for axes, control in zip(grid[:, 0], controls, strict=True):
        axes.set_ylabel(f"{SHOWN[control][0]}\nalong the parent")
    for axes in grid[-1]:
        axes.set_xlabel("along the difference")
    return canvas_


def _doses(arms: Sequence[Arm]) -> Any:
    import matplotlib.pyplot as plt

    _, run = _main(arms)
    rows = _table(run, "doses")
    rows = rows[rows["reached"]]
    canvas_, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    by_alpha, by_gain = (rows[rows["by"] == kind] for kind in ("alpha", "gain"))
    parts = {"shift": ("its held-out members", canvas.BLUE),
             "shift_siblings": ("other parents' members", canvas.ORANGE),
             "shift_random": ("its members, random directions", canvas.GREY)}  # fmt: skip
    for nudge, (column, (title, colour)) in zip((-0.04, 0, 0.04), parts.items(), strict=True):
        left.scatter(
            by_alpha["asked"] + nudge, by_alpha[column], s=16, color=colour, label=title, lw=0
        )
    left.axhline(0, color=canvas.INK, lw=0.6)
    left.set(xlabel="dose (vectors)", ylabel="change of logits (logit)")
    left.legend()
    within = ((-0.02, "kl", "its vector", canvas.BLUE),
              (0.02, "kl_random", "random directions", canvas.GREY))  # fmt: skip
    for nudge, column, title, colour in within:
        right.scatter(
            by_gain["asked"] + nudge, by_gain[column], s=16, color=colour, label=title, lw=0
        )
    right.axhline(0.1, color=canvas.INK, ls=":", lw=1)
    right.set(xlabel="gain of held-out members (nat)", ylabel="KL within the concept (nat)",
              yscale="log")  # fmt: skip
    if len(by_gain):
        right.legend()
    return canvas_
