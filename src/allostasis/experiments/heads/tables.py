"""From a sweep to the lab's tables: readings by intervention and example, means, intervals."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from allostasis.analysis import impact
from allostasis.engines.readouts import TRAJECTORY
from allostasis.engines.suffix import Swept
from allostasis.experiments.heads.asked import Asked
from allostasis.interventions.ablate import Unit

UNITS: Mapping[str, tuple[str, str, str]] = {
    "logit_diff": ("ld", "logit", "Psi"),
    "kl_divergence": ("kl", "nat", "Psi"),
    "kl_divergence.source": ("kl_source", "nat", "Psi"),
    "flip_rate": ("flip", "1", "Psi"),
    "top1_error": ("top1_error", "1", "Psi"),
    "top1_accuracy": ("top1_correct", "1", "Psi"),
    "accuracy": ("correct", "1", "Psi"),
    "prob_drop": ("prob_drop", "1", "Psi"),
    "output_entropy": ("entropy", "nat", "Psi"),
    "span_logit_diff": ("span_ld", "nat", "Psi"),
    "span_logit_diff.per_token": ("span_ld_per_token", "nat", "Psi"),
    "trajectory_step.first5": ("step_first5", "resid", "other"),
    "trajectory_step.rest": ("step_rest", "resid", "other"),
    "trajectory_step.no_first": ("step_no_first", "resid", "other"),
    "trajectory_curvature": ("curvature", "rad", "other"),
    "trajectory_curvature.no_first": ("curvature_no_first", "rad", "other"),
}
"""By metric: its column, its unit and its symbol; every one is a mean over examples."""


@dataclass(frozen=True)
class Planned:
    """A unit of the sweep and the intervention that it belongs to.

    Attributes:
        unit: What the engine does.
        intervention: Canonical key; units of several donors share one.
        set: What kind of intervention it is: `head`, `random`, `layer`, `pair`, `triple`.
        ablation: What stands in the heads' place.
        facts: Further columns of interventions.parquet.
    """

    unit: Unit
    intervention: str
    set: str
    ablation: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, units: Sequence[Unit], *, set: str, ablation: str, **facts: Any) -> list[Planned]:
        """Units whose readings are averaged: one, or one a donor."""
        first = units[0]
        key = first.key if first.donor is None else first.key.replace(f"{first.donor}:", ":", 1)
        return [cls(unit, key, set, ablation, facts) for unit in units]


@dataclass(frozen=True)
class Readings:
    """What a sweep said of every intervention and example.

    Attributes:
        asked: The examples.
        interventions: One a row of the columns; of several donors the first.
        columns: [intervention, example].
        clean: [example], of the untouched model.
    """

    asked: Asked
    interventions: tuple[Planned, ...]
    columns: Mapping[str, np.ndarray]
    clean: Mapping[str, np.ndarray]

    @property
    def effect(self) -> np.ndarray:
        """Change of the logit difference, [intervention, example]; above 0: it suppressed."""
        return self.columns["ld"] - self.clean["ld"]

    @property
    def keys(self) -> list[str]:
        """The interventions' canonical keys."""
        return [each.intervention for each in self.interventions]

    def clusters(self, at: np.ndarray) -> list[str]:
        """Groups of some examples."""
        return [self.asked.clusters[index] for index in at]

    def n_unique(self, at: np.ndarray) -> int:
        """Different prompts among some examples."""
        return len({self.asked.rows.prompts[index] for index in at})

    def mean_effects(self, split: str) -> np.ndarray:
        """Mean change of the logit difference over a split, one an intervention."""
        return self.effect[:, self.asked.at(split)].mean(axis=1)


def readings(
    asked: Asked, planned: Sequence[Planned], swept: Swept, *, with_span: bool
) -> Readings:
    """Derive every readout by example, and average over donors what was done with several."""
    target = np.array([example.target_id for example in asked.examples])
    clean = _columns(asked, swept.clean, swept.clean, target, with_span)
    each = _columns(asked, swept.values, swept.clean, target, with_span)
    untouched = {name: values[0] for name, values in clean.items()}
    if not planned:
        return Readings(asked, (), {}, untouched)
    keys = list(dict.fromkeys(p.intervention for p in planned))
    first = {key: next(p for p in planned if p.intervention == key) for key in keys}
    members = [[i for i, p in enumerate(planned) if p.intervention == key] for key in keys]
    columns = {
        name: np.stack([values[some].mean(axis=0) for some in members])
        for name, values in each.items()
    }
    if any(len(some) > 1 for some in members):
        columns["ld_donor_sd"] = np.stack([
            each["ld"][some].std(axis=0, ddof=1) if len(some) > 1 else np.full(len(asked), np.nan)
            for some in members
        ])
        several = np.array([len(some) > 1 for some in members])
        columns["pred_id"][several] = np.nan  # predictions of several donors have no mean
    return Readings(asked, tuple(first.values()), columns, untouched)


def _columns(
    asked: Asked,
    values: Mapping[str, np.ndarray],
    clean: Mapping[str, np.ndarray],
    target: np.ndarray,
    with_span: bool,
) -> dict[str, np.ndarray]:
    n = len(asked)
    found = {name: np.atleast_2d(column) for name, column in values.items()}
    here = {name: column[:, :n].copy() for name, column in found.items()}
    here["flip"] = (here["pred_id"] != clean["pred_id"][:n]).astype(float)
    here["top1_error"] = (here["pred_id"] != target).astype(float)
    here["top1_correct"] = 1 - here["top1_error"]
    here["correct"] = (here["ld"] > 0).astype(float)
    here["prob_drop"] = np.exp(clean["logp_target"][:n]) - np.exp(here["logp_target"])
    if with_span:
        spans = asked.span(found["logp_target"], found["logp_foil"])
        here["span_ld"], here["span_ld_per_token"] = spans
    return here


def metric_rows(found: Readings, splits: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Rows of metrics.parquet: means over a split's examples, with intervals.

    Of the clean model, with the interval of the mean, and of each intervention, with that of the
    change.

    Args:
        found: The readings.
        splits: Indices of examples by the name of the split.
    """
    for split, at in splits.items():
        if not len(at):
            continue
        clusters, n_unique = found.clusters(at), found.n_unique(at)
        for metric, (column, unit, symbol) in UNITS.items():
            if column not in found.columns:
                continue
            now, then = found.columns[column][:, at], found.clean[column][at]
            base = {
                "metric": metric, "symbol": symbol, "unit": unit, "split": split, "n": len(at),
                "n_unique": n_unique,
            }  # fmt: skip
            ends = impact.intervals(impact.clustered(then[None], clusters))
            yield {
                **base, "value": float(then.mean()), "ci_low": ends[0][0], "ci_high": ends[1][0],
            }  # fmt: skip
            low, high = impact.intervals(impact.clustered(now - then, clusters))
            means, clean = now.mean(axis=1), float(then.mean())
            for index, each in enumerate(found.interventions):
                yield {
                    **base, **place(each), "value": means[index], "value_clean": clean,
                    "delta": means[index] - clean, "ci_low": low[index], "ci_high": high[index],
                }  # fmt: skip


def place(each: Planned) -> dict[str, Any]:
    """Columns that say which intervention a row is of; layer and head of single heads alone."""
    unit = each.unit
    where: dict[str, Any] = {"intervention": each.intervention}
    if unit.op == "scale":
        where["scale"] = unit.scale
    if len(unit.members) == 1:
        where["layer"], index = unit.members[0]
        where["head"] = index if unit.site == "z" else None
    if each.facts.get("position") is not None:
        where["position"] = each.facts["position"]
    return where


def interventions(found: Readings, marks: Mapping[str, str]) -> pd.DataFrame:
    """interventions.parquet: one row an intervention of the plan."""
    return pd.DataFrame([
        {
            "intervention": each.intervention,
            "unit": each.unit.key,
            "set": marks.get(each.intervention, each.set),
            "ablation": each.ablation,
            "site": each.unit.site,
            "layer_min": each.unit.layer,
            "members": "+".join(_member(m) for m in sorted(each.unit.members, key=str)),
            "size": len(each.unit.members),
            "op": each.unit.op,
            "scale": each.unit.scale if each.unit.op == "scale" else np.nan,
            "positions": str(each.unit.positions),
            "direction": None,
            "donor": None if each.unit.source is None else each.ablation,
            "degenerate": None,
            **each.facts,
        }
        for each in found.interventions
    ])


def _member(member: tuple[int, int | None]) -> str:
    layer, head = member
    return str(layer) if head is None else f"{layer}.{head}"


COLUMNS = {
    "pred_id": "pred_id", "ld": "ld", "logp_target": "logp_target", "logp_foil": "logp_foil",
    "kl": "kl", "kl_source": "kl_source", "entropy": "entropy", "rank_target": "rank_target",
    "correct": "correct", "span_ld": "span_ld", "ld_donor_sd": "ld_donor_sd",
}  # fmt: skip
OF_CLEAN = ("pred_id", "ld", "logp_target", "entropy", "correct")


MOST_ROWS = 20_000_000
FALLBACK = 50


def kept(
    found: Readings, keep: Literal["all", "none"] | int, marks: Collection[str]
) -> tuple[list[int], str]:
    """Indices of the interventions whose single examples are kept, and what is to be said of it.

    Marked ones always are, because claims read them.
    """
    n = len(found.interventions)
    notice = ""
    if keep == "all" and n * len(found.asked) > MOST_ROWS:
        notice = (
            f"examples.parquet would have {n * len(found.asked)} rows, more than {MOST_ROWS}: it "
            f"has the {FALLBACK} interventions of largest effect"
        )
        keep = FALLBACK
    if keep == "all":
        return [*range(n)], notice
    marked = {index for index, key in enumerate(found.keys) if key in marks}
    effects = np.abs(found.effect.mean(axis=1))
    largest = np.argsort(-effects, kind="stable")[: 0 if keep == "none" else keep]
    return sorted(marked | {int(index) for index in largest}), notice


def examples(
    found: Readings,
    keep: Sequence[int],
    marks: Mapping[str, str],
    extra: Mapping[str, np.ndarray] | None = None,
) -> pd.DataFrame:
    """examples.parquet: one row an example and intervention.

    Args:
        found: The readings.
        keep: Which interventions.
        marks: Kinds of set by intervention, where not those of the plan.
        extra: Further columns, [intervention, example].
    """
    said = baseline(found)[["example", "row_id", "group", "cell", "split", "target_id", "foil_id"]]
    clean = {f"{name}_clean": found.clean[name] for name in OF_CLEAN}
    frames = []
    for index in keep:
        each = found.interventions[index]
        now = {
            name: found.columns[column][index]
            for name, column in COLUMNS.items()
            if column in found.columns
        }
        now |= {name: values[index] for name, values in (extra or {}).items()}
        what = {"ablation": each.ablation, "intervention": each.intervention}
        what["set"] = marks.get(each.intervention, each.set)
        frames.append(said.assign(**what, **now, **clean))
    table = pd.concat(frames, ignore_index=True)
    whole = ["target_id", "foil_id", "pred_id", "pred_id_clean"]
    table = table.astype(dict.fromkeys(whole, "Int64"))
    names = ["row_id", "group", "cell", "split", "ablation", "intervention", "set"]
    return table.astype(dict.fromkeys(names, "category"))


def baseline(found: Readings) -> pd.DataFrame:
    """baseline.parquet: what the untouched model says of each example."""
    said = pd.DataFrame([
        {
            "example": e.example, "row_id": e.row.id, "group": e.group, "cell": e.cell,
            "split": e.split, "recency": e.recency, "target_id": e.target_id,
            "foil_id": e.foil_id,
        }
        for e in found.asked.examples
    ])  # fmt: skip
    kept = [*OF_CLEAN, *(name for name in TRAJECTORY if name in found.clean)]
    return said.assign(**{name: found.clean[name] for name in kept})
