"""Tables of what ablations did to a pretrained model; brackets are 95 % intervals over clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from allostasis.analysis import ablations, clusters
from allostasis.analysis.ablations import ABLATIONS, KINDS, Group, estimate, logarithm
from allostasis.analysis.claims import Select
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.prompts import column, exchange_rate, positive
from allostasis.analysis.repair import PLAYERS, repair_shares, shapley_shares
from allostasis.analysis.surrogates import rank_correlation
from allostasis.analysis.tables import Table
from allostasis.analysis.text import bracket, number

if TYPE_CHECKING:
    from allostasis.analysis.aggregate import Arm
    from allostasis.analysis.prompts import Column, Pair

SETS = ["seed", "heads", "ablation"]


def discovery_table(arms: Sequence[Arm]) -> Table:
    """Which heads were chosen on the discovery split, and what they do on the other."""
    columns = {
        "q": "q", "de_discovery": "DE, discovery", "de_evaluation": "DE, evaluation",
        "shrinkage": "shrinkage", "attention": "attention END to IO less S",
        "copy_score": "copy score", "is_name_mover": "name mover",
    }  # fmt: skip
    rows = tuple(
        (str(seed), head, *(_said(about.get(key)) for key in columns))
        for seed, head, about in ablations.selected(arms)
    )
    return Table(
        "Heads chosen on the discovery split",
        ("seed", "head", *columns.values()),
        rows,
        "DE is the direct effect in logits at the clean scale of the final norm. Heads are chosen "
        "by DE on the discovery split alone, every effect in this report is of the evaluation "
        "split, which shares no pair of names with it; shrinkage is 1 - DE evaluation / DE "
        "discovery. "
        "Attention and copy score describe the heads and did not choose them.",
    )


def _said(value: object) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(float(value)) if isinstance(value, int | float) else str(value)


def effects_table(arms: Sequence[Arm]) -> Table:
    """Total effect, drop and self-repair of every set."""
    made = [_effects(group.name, "", group.rows) for group in ablations.groups(arms, "examples")]
    for arm in arms:
        for kind in ("single", "pair"):
            for ablation in ABLATIONS:
                select = Select.model_validate({"ablation": ablation, "set": kind})
                try:
                    rows = clusters.prompts(arm, "examples", select)
                except UndefinedError:
                    continue
                made += [
                    _effects(f"{kind}, {ablation}", str(key).partition(":")[2], own)
                    for key, own in rows.groupby("intervention", sort=True)
                ]
    return Table(
        "Effects and self-repair",
        ("what", "heads", "total effect", "of clean LD", "drop", "self-repair", "SR / drop", "n"),
        tuple(made),
        "Logits; total effect below 0: the heads helped. Drop is their direct effect, clean minus "
        "ablated; self-repair = total effect + drop; SR / drop is a ratio of sums over prompts, "
        "never a mean of ratios; n counts clusters. All prompts are in, so that no selection by "
        "direct effect is made here.",
    )


def _effects(what: str, heads: str, rows: pd.DataFrame) -> tuple[str, ...]:
    te, drop, sr, clean = (column(rows, name) for name in ("te", "drop", "sr", "ld_clean"))
    columns: list[Column | Pair] = [te, (te, clean), drop, sr, (sr, drop)]
    found = [estimate(rows, values) for values in columns]
    return (what, heads, *(one.text for one in found), str(found[0].n))


def percentiles_table(arms: Sequence[Arm]) -> Table:
    """Self-repair of all chosen heads by the size of their direct effect."""
    groups = ablations.critical(arms)
    own = ablations.own_direct_effect(groups)
    rows = tuple(
        (
            group.name, f"top {p.percent:g} %", number(p.least), f"{p.n} ({p.n_clusters})",
            number(p.ratio), p.reason if p.interval is None else bracket(p.interval),
        )
        for group in groups
        for p in ablations.by_percentile(group, own)
    )  # fmt: skip
    return Table(
        "Self-repair by size of the direct effect",
        ("what", "prompts by direct effect", "least of them, logit", "prompts (clusters)",
         "SR / drop", "95 %"),
        rows,
        "Prompts are ranked by the direct effect of the ablated heads in the clean run. Ratios of "
        "sums over the prompts named; published values are mostly of a few percent of tokens.",
    )  # fmt: skip


def shares_table(arms: Sequence[Arm]) -> Table:
    """Where the repair of all chosen heads is written, by both conventions."""
    made = []
    for group in ablations.critical(arms):
        rows = group.rows
        drop = column(rows, "drop")
        phi = {f"phi_{player}": column(rows, f"phi_{player}") for player in PLAYERS}
        split = shapley_shares(phi, drop=drop)
        parts: dict[str, Pair] = {
            "other heads": (split["heads"], drop),
            "of them by routing": (phi["phi_routing"], drop),
            "of them by content": (phi["phi_content"], drop),
            "MLPs": (split["mlps"], drop),
            "norm scale": (split["scale"], drop),
            "other heads, residual": (column(rows, "sr_heads"), drop),
            "MLPs, residual": (column(rows, "sr_mlps"), drop),
            "norm scale, residual (scale last)": (column(rows, "sr_scale"), drop),
        }
        if "phi_scale_first" in rows:
            parts["norm scale, first in order"] = (column(rows, "phi_scale_first"), drop)
        made += [_share(group, name, "drop", pair) for name, pair in parts.items()]
        named = {"A": "A (scale)", "G": "G (routing)", "C": "C (content, MLPs)"}
        repairs = repair_shares(phi)
        made += [_share(group, named[k], "repair R", repairs[k]) for k in named]
    return Table(
        "Shares of self-repair, all chosen heads",
        ("what", "part", "share of", "share", "n"),
        tuple(made),
        "Ratios of sums over prompts. Shapley values unless it says residual: the residual method "
        "calls the scale's what nothing else accounts for, one order of many. Parts of the "
        "drop sum to SR / drop. R is what all others than the heads themselves add; where its "
        "interval contains 0 no share of it is defined. Where something is written is not what "
        "caused it.",
    )


def _share(group: Group, part: str, of: str, pair: Pair) -> tuple[str, ...]:
    found = estimate(group.rows, pair)
    if of != "drop" and found.interval is None:
        return group.name, part, of, found.reason, str(found.n)
    return group.name, part, of, found.text, str(found.n)


def norms_table(arms: Sequence[Arm]) -> Table:
    """The compensation ratio at late depths: four variants, null and excess."""
    made = []
    for group in ablations.groups(arms, "depths"):
        for depth in clusters.late_depths(ablations.last_depth(group.rows)):
            rows = group.rows[group.rows["depth"] == depth]
            if not clusters.reached(rows):
                continue
            by_prompt = rows.groupby(["seed", "example"])[["norm_end", "norm_end_clean"]].mean()
            ratios = [
                estimate(rows, (column(rows, a), column(rows, b)))
                for a, b in (
                    ("norm_all", "norm_all_clean"), ("norm_rest", "norm_rest_clean"),
                    ("norm_end", "norm_end_clean"), ("norm_end_null", "norm_end_clean"),
                )
            ]  # fmt: skip
            pair = column(rows, "norm_end"), column(rows, "norm_end_null")
            excess = logarithm(estimate(rows, pair))
            median = by_prompt["norm_end"].median() / by_prompt["norm_end_clean"].median()
            made.append((
                group.name, str(depth), *(ratio.text for ratio in ratios[:3]), number(median),
                ratios[3].text, excess.text, number(float(np.degrees(rows["angle_end"].mean()))),
                number(float(rows["var_end"].sum() / rows["var_end_clean"].sum())),
            ))  # fmt: skip
    return Table(
        "Norm of the residual stream at late depths, ratio to clean",
        ("what", "depth", "published (all positions)", "without position 0", "END", "END, medians",
         "END, null", "END, excess, nat", "angle, degree", "variance ratio"),
        tuple(made),
        "Depth d is the input of block d. The null is the norm if nothing downstream reacted, "
        "which is below 1 where the heads write along the stream; excess = ln(ratio / null), "
        "0 where nothing reacted. A ratio above 1 is no compensation by itself. Position 0 has an "
        "outlying norm in most models and cannot react to later ones, which draws the published "
        "variant towards 1.",
    )  # fmt: skip


def random_table(arms: Sequence[Arm]) -> Table:
    """Where the chosen heads lie among random sets of their size in their layers."""
    rows: list[tuple[str, ...]] = []
    tables = {table: ablations.groups(arms, table) for table in ("examples", "depths")}
    for ablation in ABLATIONS:
        for table, groups in tables.items():
            here = {group.label: group.rows for group in groups if group.ablation == ablation}
            chosen = here.get(KINDS["critical", "all"])
            others = here.get(KINDS["random_control", "random"])
            if chosen is None or others is None:
                continue
            if table == "examples":
                series = {"total effect, logit": [ablations.by_set(r, "te")
                                                  for r in (chosen, others)]}  # fmt: skip
            else:
                last = ablations.last_depth(chosen)
                series = {
                    f"norm ratio at END, depth {d}": [
                        ablations.norm_by_set(r, d) for r in (chosen, others)
                    ]
                    for d in clusters.late_depths(last)
                }
            rows += [_among(ablation, name, *pair) for name, pair in series.items()]
    if not rows:
        raise UndefinedError("random sets or chosen heads were not run")
    return Table(
        "Chosen heads among random sets",
        ("ablation", "of", "chosen", "random: median [least, most]", "sets below", "percentile"),
        tuple(rows),
        "Random sets have as many heads in the same layers, none of them chosen, drawn anew by "
        "each seed; a set counts against the chosen one of its own seed, ties by half. For the "
        "total effect percentile 0 is the largest loss.",
    )


def _among(ablation: str, name: str, chosen: pd.Series, others: pd.Series) -> tuple[str, ...]:
    below, count = ablations.rank_among(chosen, others)
    ends = [number(float(q)) for q in np.quantile(others, (0.5, 0, 1))]
    rank = f"{100 * below / count:.3g}" if count else "no seed has both"
    return (
        ablation, name, number(float(chosen.mean())), f"{ends[0]} [{ends[1]}, {ends[2]}]",
        f"{below:g} of {count}", rank,
    )  # fmt: skip


def identity_table(arms: Sequence[Arm]) -> Table:
    """The identity log margin = log A + log G under ablation, and the exchange rate kappa."""
    made = []
    for group in ablations.groups(arms, "examples"):
        rows, both = group.rows, positive(group.rows)
        kept = f"{both.sum()} of {len(both)}"
        if not both.any():
            made.append((group.name, *["no prompt leads"] * 3, "undefined", kept))
            continue
        here = rows[both]
        terms = []
        for name in ("log_amplitude", "log_alignment", "log_margin"):
            clean = column(here, f"{name}_clean")
            change = estimate(here, column(here, name) - clean)
            terms.append(f"{number(float(clean.mean()))}; {change.text}")
        made.append((group.name, *terms, _kappa(group), kept))
    return Table(
        "log margin = log A + log G",
        ("what", "log A: clean; change", "log G: clean; change", "log margin: clean; change",
         "kappa", "prompts that lead before and after"),
        tuple(made),
        "Nats, of the margin over the runner-up in the vocabulary. The identity is exact; what an "
        "ablation does to its two terms is not fixed by it. kappa = - change of log A / change "
        "of log G, a ratio of sums: 1 the one makes up for the other, 0 nothing does, below 0 both "
        "fall or both rise. It says nothing of prompts that stopped leading, and where the "
        "interval of its denominator contains 0 it is undefined.",
    )  # fmt: skip


def _kappa(group: Group) -> str:
    found = estimate(group.rows, exchange_rate(group.rows))
    return found.text if found.interval is not None else f"undefined: {found.reason}"


def agreement_table(arms: Sequence[Arm]) -> Table:
    """Whether the ablations rank the same sets alike."""
    found = pd.concat([_set_means(arm) for arm in arms])
    if found.empty:
        raise UndefinedError("nothing was ablated")
    wide = found.pivot_table(index=["seed", "heads"], columns="ablation", values="te")
    rows = []
    for left, right in (("zero", "mean"), ("zero", "resample"), ("mean", "resample")):
        if {left, right} <= set(wide.columns):
            both = wide[[left, right]].dropna()
            rows.append((f"{left}, {right}", _spearman(both[left], both[right]), str(len(both))))
    return Table(
        "Agreement of the ablations",
        ("ablations", "Spearman's rho of total effects", "sets"),
        tuple(rows),
        "Over all sets that were ablated both ways. Zero ablation leaves the distribution that the "
        "model was trained on, mean and resample ablation stay closer to it.",
    )


def _set_means(arm: Arm) -> pd.DataFrame:
    frames = []
    for run in arm.runs:
        try:
            rows = run.prompts("examples")
        except UndefinedError:
            continue
        rows = rows[rows["ablation"] != "none"]
        heads = rows["intervention"].astype(str).str.split(":", n=1).str[-1]
        means = rows.assign(heads=heads).groupby(SETS)["te"].mean()
        frames.append(means.reset_index())
    return pd.concat(frames) if frames else pd.DataFrame(columns=[*SETS, "te"])


def _spearman(left: pd.Series, right: pd.Series) -> str:
    if len(left) < 3:
        return "fewer than 3 sets"
    rho, _ = rank_correlation(left.to_numpy(), right.to_numpy())
    return number(rho)


def baseline_table(arms: Sequence[Arm]) -> Table:
    """What the untouched model does, whole and by template."""
    by_prompt: dict[tuple[int, int], pd.Series] = {}
    for arm in arms:
        for run in arm.runs:
            try:
                rows = run.prompts("examples")
            except UndefinedError:
                continue
            once = rows.drop_duplicates("example")
            for _, row in once.iterrows():
                by_prompt.setdefault((int(row["seed"]), int(row["example"])), row)
    if not by_prompt:
        raise UndefinedError("examples.parquet was not recorded")
    table = pd.DataFrame(list(by_prompt.values())).infer_objects()
    parts: Mapping[str, pd.DataFrame] = {
        "all": table,
        **{f"template {name}": rows for name, rows in table.groupby("template")},
        **{str(name): rows for name, rows in table.groupby("order")},
    }
    made = []
    for name, rows in parts.items():
        ld = estimate(rows, column(rows, "ld_clean"))
        correct = column(rows, "correct_clean")
        made.append((name, ld.text, number(float(correct.mean())), str(len(rows)), str(ld.n)))
    return Table(
        "The untouched model",
        ("prompts", "logit difference, logit", "accuracy", "prompts", "clusters"),
        tuple(made),
        "Accuracy is the share of prompts with a positive logit difference. A model does the task "
        "from an accuracy of 0.9 with a logit difference whose interval lies above 0; otherwise no "
        "claim is decided.",
    )
