"""What the report of `heads_zero` shows: maps of heads, the largest effects, what is common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from allostasis.analysis import ablations, cross_condition, heatmap, lab_tables
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.heatmap import HeadMap
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number
from allostasis.core.records import RunRecord

MAPPED = {
    "logit_diff": ("Change of the logit difference", "logit"),
    "kl_divergence": ("KL from the clean prediction", "nat"),
    "flip_rate": ("Share of changed predictions", "1"),
    "prob_drop": ("Lost probability of the target", "1"),
    "output_entropy": ("Change of the entropy", "nat"),
}
SHOWN = 8


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """One map a metric, corpora side by side."""
    maps = [
        Figure(
            f"{metric}_heads",
            title,
            "Each head alone, test split, corpora side by side, each with its own scale; white is "
            "0. Above 0 in the logit difference: the head pushed against the target. A corpus "
            "without a finished run is hatched. Intervals: 95 % over groups of prompts, over "
            "seeds where there are several.",
            partial(_draw, arms, metric, unit),
            partial(_page, arms, metric, unit),
        )
        for metric, (title, unit) in MAPPED.items()
    ]
    across = Figure(
        "cross_condition",
        "What the corpora have in common",
        "Changes of the logit difference on test in standard deviations over the heads of each "
        "corpus, so that corpora can be compared, and their mean over corpora. A head that "
        "suppresses everywhere is red in all of them.",
        lambda: heatmap.draw(_standardised(arms)),
        lambda: heatmap.page(_standardised(arms)),
    )
    return [*maps, across]


def _standardised(arms: Sequence[Arm]) -> list[HeadMap]:
    """Maps of effects over their spread, and the mean of these."""
    maps = [one for one in _maps(arms, "logit_diff", "SD") if np.isfinite(one.values).any()]
    found = []
    for one in maps:
        spread = np.nanstd(one.values)
        values, low, high = one.values / spread, one.low / spread, one.high / spread
        found.append(HeadMap(one.title, "SD", values, low, high))
    nothing = np.full(found[0].values.shape, np.nan)
    whole = np.mean([one.values for one in found], axis=0)
    return [*found, HeadMap("mean over corpora", "SD", whole, nothing, nothing)]


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Largest effects, their confirmation, and what the corpora have in common."""
    makers = [suppressors_table, top_table, calibration_table, common_table, agreement_table]
    return lab_tables.made(makers, arms)


def _maps(arms: Sequence[Arm], metric: str, unit: str) -> list[HeadMap]:
    found: dict[str, Any] = {}
    for arm in arms:
        try:
            found[arm.condition] = ablations.head_values(
                arm.runs, metric, "delta", split="test", is_ablated=True
            )
        except UndefinedError:
            continue
    if not found:
        raise UndefinedError(f"{metric} was not recorded by head")
    shape = np.max([cells["value"].shape for cells in found.values()], axis=0)
    nothing = np.full(shape, np.nan)
    maps = []
    for condition in next(arm for arm in arms if arm.runs).config["conditions"]:
        cells = found.get(condition)
        values = {
            name: nothing if cells is None else _to(shape, cells[name])
            for name in ("value", "low", "high")
        }
        maps.append(HeadMap(condition, unit, values["value"], values["low"], values["high"]))
    return maps


def _to(shape: np.ndarray, values: np.ndarray) -> np.ndarray:
    missing = [(0, int(whole - there)) for whole, there in zip(shape, values.shape, strict=True)]
    return np.pad(values, missing, constant_values=np.nan)


def _draw(arms: Sequence[Arm], metric: str, unit: str) -> Any:
    return heatmap.draw(_maps(arms, metric, unit))


def _page(arms: Sequence[Arm], metric: str, unit: str) -> Any:
    return heatmap.page(_maps(arms, metric, unit))


def suppressors_table(arms: Sequence[Arm]) -> Table:
    """Heads of largest effect on train, and what they do on test."""
    rows = []
    for condition, run in lab_tables.runs(arms):
        train = lab_tables.effect_rows(run, "logit_diff", "train")
        test = lab_tables.effect_rows(run, "logit_diff", "test").to_dict("index")
        found = train.loc[train["delta"] > 0, "delta"].iloc[:SHOWN]
        for key, change in zip(map(str, found.index), found, strict=True):
            there = test[key]
            rows.append((
                condition, str(run.seed), key, number(float(change)),
                lab_tables.effect(there), lab_tables.optional(there["p"]),
                lab_tables.optional(there["q"]), lab_tables.optional(there["p_max"]),
                lab_tables.optional(there["percentile_layer"], ".0f"),
                lab_tables.optional(there["percentile_model"], ".0f"),
            ))  # fmt: skip
    return Table(
        "Suppressors found on train, measured on test",
        ("corpus", "seed", "intervention", "change on train", "change on test", "p", "q",
         "max-T p", "percentile in layer", "percentile in model"),
        tuple(rows),
        "Change of the logit difference in logits; above 0 the head pushed against the target. "
        "Chosen by train alone, so that the change there is too large by the choice; only the one "
        "on test is a finding. p flips signs of groups, two-sided; q is over all heads of the run "
        "(over all corpora in cross_condition/head_matrix.parquet), max-T holds for all at once. "
        "Percentiles are exact: the share of the other heads that lie below.",
    )  # fmt: skip


def top_table(arms: Sequence[Arm]) -> Table:
    """Heads of largest absolute effect on test."""
    rows = []
    for condition, run in lab_tables.runs(arms):
        found = lab_tables.effect_rows(run, "logit_diff", "test")
        order = found["delta"].abs().sort_values(ascending=False, kind="stable").index[:SHOWN]
        table = found.to_dict("index")
        n_unique = run.record.units
        n_unique = n_unique[(n_unique["metric"] == "logit_diff") & (n_unique["split"] == "test")]
        unique = int(n_unique["n_unique"].iloc[0])
        rows += [
            (condition, str(run.seed), str(key), lab_tables.effect(table[str(key)]),
             lab_tables.optional(table[str(key)]["q"]), str(unique))
            for key in order
        ]  # fmt: skip
    return Table(
        "Largest effects on test",
        ("corpus", "seed", "intervention", "change of the logit difference", "q", "unique prompts"),
        tuple(rows),
        "By absolute change, never by the ablated value. Below 0 the head helped.",
    )


def calibration_table(arms: Sequence[Arm]) -> Table:
    """Calibration of the untouched model's choice between two answers."""
    names = ("ece", "equal_mass", "brier", "nll", "ece_self")
    rows = []
    for condition, run in lab_tables.runs(arms):
        cells = []
        for name in names:
            found = [r for r in run.records(f"choice_calibration.{name}") if r["split"] == "test"]
            cells.append(_interval(found[0]) if found else "not recorded")
        rows.append((condition, str(run.seed), *cells))
    return Table(
        "Calibration of the untouched model",
        ("corpus", "seed", "ECE", "ECE, equal mass", "Brier", "NLL, nat", "ECE, own labels"),
        tuple(rows),
        "p = sigmoid(logit difference) that the answer presented first is the true one, in random "
        "order, against true labels, on test; intervals over groups. The last column labels each "
        "prediction with itself, as the source does, and equals mean min(p, 1 - p) identically: "
        "tautological.",
    )


def _interval(row: dict[str, Any]) -> str:
    return f"{number(row['value'])} [{number(row['ci_low'])}, {number(row['ci_high'])}]"


def common_table(arms: Sequence[Arm]) -> Table:
    """Heads that are among the largest in every corpus."""
    found = cross_condition.crossed(_records(arms), allow_mixed=True)
    if len({record.run["condition"] for record in found.runs}) < 2:
        raise UndefinedError("one corpus has nothing in common with others")
    said = cross_condition.invariants(cross_condition.effects(found))
    rows = [
        (
            f"top {said['k']} by {kind} change in all of {', '.join(said['conditions'])}",
            ", ".join(said[kind]["heads"]) or "none", str(said[kind]["count"]),
            number(said[kind]["expected"]), number(said[kind]["p"]),
        )
        for kind in ("absolute", "signed")
    ]  # fmt: skip
    first = said["first_layer"]
    where = ", ".join(f"{name} {head}" for name, head in first["largest"].items())
    answer = "one and the same" if first["is_one_head"] else "not the same"
    rows.append((
        f"largest signed change in layer {first['layer']}: {where}", answer,
        "1" if first["is_one_head"] else "0", number(first["p_by_chance"]),
        number(first["p_by_chance"]) if first["is_one_head"] else "1",
    ))  # fmt: skip
    note = "By chance: corpora that rank heads at random, 9,999 permutations, or exactly."
    if found.missing:
        note += f" Missing: {', '.join(found.missing)}."
    if found.mixed:
        note += f" Runs differ in {'; '.join(found.mixed)}."
    return Table("What the corpora have in common", ("what", "heads", "count", "by chance", "p"),
                 tuple(rows), note)  # fmt: skip


def agreement_table(arms: Sequence[Arm]) -> Table:
    """Rank correlation of heads' effects between corpora, layer by layer, the strongest first."""
    found = cross_condition.crossed(_records(arms), allow_mixed=True)
    table = cross_condition.rank_correlations(found)
    if table.empty:
        raise UndefinedError("one corpus agrees with no other")
    best = table.sort_values("q", kind="stable").head(20)
    rows = [
        (
            str(row["layer"]), row["first"], row["second"], number(row["rho"]),
            f"[{number(row['ci_low'])}, {number(row['ci_high'])}]"
            if np.isfinite(row["ci_low"]) else "",
            number(row["p"]), number(row["q"]),
        )
        for row in best.to_dict("records")
    ]  # fmt: skip
    return Table(
        "Agreement of corpora on heads",
        ("layer", "corpus", "corpus", "Spearman's rho", "95 %", "p", "q"),
        tuple(rows),
        "Of changes of the logit difference on test; p permutes heads, q over all layers and pairs "
        "of corpora; the 20 of least q. All are in cross_condition/rank_correlation.parquet.",
    )


def _records(arms: Sequence[Arm]) -> list[RunRecord]:
    return [run.record for arm in arms for run in arm.runs]
