"""From single prompts to clusters of them: the units of one pretrained model.

A cluster is a template with an unordered pair of names. Averaging goes from the inside out:
interventions of a kind, then prompts, then the cluster, whatever the run that a prompt was drawn
in, so that a cluster that two seeds drew counts once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from allostasis.analysis import summaries
from allostasis.analysis.aggregate import Arm, Sample
from allostasis.analysis.claims import Claim, Select
from allostasis.analysis.curves import Table, UndefinedError
from allostasis.analysis.prompts import column

if TYPE_CHECKING:
    from allostasis.analysis.prompts import Column, Pair

LATE = 10 / 12  # of the layers: the source's "layers 10-12" of a model of 12
PROMPT = ["seed", "example"]
REACHED = 1e-9  # a smaller relative change of every prompt's norm is none


@dataclass(frozen=True)
class Totals:
    """Prompts added up by cluster.

    Attributes:
        names: Of the clusters; each begins with its template and a colon.
        numerators: One a cluster: the sum over its prompts.
        denominators: One a cluster, likewise; the number of its prompts where a mean is taken.
        n_prompts: How many went in.
        n_left_out: How many have no value.
    """

    names: tuple[str, ...]
    numerators: np.ndarray
    denominators: np.ndarray
    n_prompts: int
    n_left_out: int

    @property
    def means(self) -> np.ndarray:
        """One a cluster: mean over its prompts, where the denominator counts them."""
        return self.numerators / self.denominators


def prompts(arm: Arm, table: Table, select: Select, *, split: str | None = None) -> pd.DataFrame:
    """Rows of an arm's runs that a claim selects; one intervention counts once a prompt.

    Args:
        arm: The arm.
        table: Which records.
        select: Ablation, set or intervention, and, of `depths`, one depth.
        split: Which prompts; all where None.

    Raises:
        UndefinedError: There are no such records, or no such rows in them.
    """
    columns: dict[str, str | int | None] = {
        "ablation": select.ablation,
        "set": select.set,
        "intervention": select.intervention,
    }
    if isinstance(select.depth, int):
        columns["depth"] = select.depth
    if split is not None:
        columns["split"] = split
    found: list[pd.DataFrame] = []
    for run in arm.runs:
        rows = run.prompts(table)
        for name, wanted in columns.items():
            if wanted is not None:
                rows = rows[rows[name] == wanted]
        found.append(rows)
    rows = pd.concat(found, ignore_index=True)
    if rows.empty:
        if none := _none_found(arm, select.ablation):
            raise UndefinedError(none)
        wanted = ", ".join(f"{k}={v}" for k, v in columns.items() if v is not None)
        raise UndefinedError(f"not run (no rows of {wanted} in {arm.name})")
    places = [name for name in ("depth", "layer", "head") if name in rows]
    return rows.drop_duplicates([*PROMPT, "intervention", *places])


def _none_found(arm: Arm, ablation: str | None) -> str:
    """Why runs that look for something have nothing to tell of it; empty where they found it."""
    told = []
    for run in arm.runs:
        why = run.summary.get("no_ratio")
        if isinstance(why, Mapping) and ablation in why:
            told.append(f"seed {run.seed}: {why[ablation]}")
    return "; ".join(told) if len(told) == len(arm.runs) else ""


def add_up(rows: pd.DataFrame, values: Column | Pair) -> Totals:
    """Sums over the prompts of each cluster, interventions averaged prompt by prompt first.

    Args:
        rows: As `prompts` gives them, at one depth.
        values: One a row; NaN where it has none. A pair is a ratio's.

    Raises:
        UndefinedError: No prompt has a value.
    """
    pair = values if isinstance(values, tuple) else (values, np.ones(len(rows)))
    table = rows[["cluster", *PROMPT]].assign(num=pair[0], den=pair[1])
    there = np.isfinite(pair).all(axis=0)
    n_prompts = table.groupby(PROMPT).ngroups
    by_prompt = table[there].groupby(["cluster", *PROMPT])[["num", "den"]].mean()
    if by_prompt.empty:
        raise UndefinedError("no prompt has a value")
    sums = by_prompt.groupby("cluster").sum()
    return Totals(
        tuple(sums.index.astype(str)),
        sums["num"].to_numpy(),
        sums["den"].to_numpy(),
        len(by_prompt),
        n_prompts - len(by_prompt),
    )


def late_depths(n_layers: int) -> range:
    """Depths that stand for the source's layers 10 to 12 of 12: from ceil(10 L / 12) to L.

    Depth d is the input of block d, depth L the output of the last block.

    Example:
        >>> late_depths(12), late_depths(30)
        (range(10, 13), range(25, 31))
    """
    return range(math.ceil(round(LATE * n_layers, 9)), n_layers + 1)


def reached(rows: pd.DataFrame) -> bool:
    """Whether an intervention changes the residual stream at the depth of these rows at all."""
    clean = column(rows, "norm_end_clean")
    changes = [column(rows, name) / clean - 1 for name in ("norm_end", "norm_end_null")]
    return bool(np.max(np.abs(changes)) > REACHED)


def samples(claim: Claim, arm: Arm) -> dict[str, Sample]:
    """Reduce an arm's prompts to what a claim is about: one number or pair a cluster.

    Returns:
        One sample, or one a late depth that the intervention reaches, by name.

    Raises:
        UndefinedError: The records do not hold what the claim selects.
    """
    assert claim.estimand is not None
    assert claim.select is not None
    summary = summaries.parse(claim.estimand.summary)
    assert summary.prompts is not None
    if not arm.runs:
        raise UndefinedError("no finished run")
    rows = prompts(arm, summary.prompts, claim.select, split=claim.estimand.split)
    if claim.estimand.of == "geometric_ratio":
        return {"": _by_layer(arm, rows, summary.of_prompts(rows))}
    takes_mean = claim.estimand.of == "mean"
    if claim.select.depth != "late":
        name = "" if claim.select.depth is None else f"depth {claim.select.depth}"
        return {name: _sample(arm, add_up(rows, summary.of_prompts(rows)), takes_mean=takes_mean)}
    found: dict[str, Sample] = {}
    for depth in late_depths(int(rows["depth"].max())):
        here = rows[rows["depth"] == depth]
        if len(here) and reached(here):
            totals = add_up(here, summary.of_prompts(here))
            found[f"depth {depth}"] = _sample(arm, totals, takes_mean=takes_mean)
    if not found:
        raise UndefinedError("no late depth lies behind the intervention")
    return found


def _by_layer(arm: Arm, rows: pd.DataFrame, values: Column | Pair) -> Sample:
    """Numerators and denominators of each layer, one column a layer.

    A sequence that a layer was not looked at on counts 0 above and below.

    Raises:
        UndefinedError: No row has a layer and a value.
    """
    assert isinstance(values, tuple), "a ratio is made of a pair"
    found: dict[int, Totals] = {}
    layers = rows["layer"].to_numpy(dtype=float, na_value=np.nan)
    there = np.isfinite(layers) & np.isfinite(values).all(axis=0)
    for layer in np.unique(layers[there]):
        here = there & (layers == layer)
        found[int(layer)] = add_up(rows[here], (values[0][here], values[1][here]))
    if not found:
        raise UndefinedError("no sequence has a value in any layer")
    names = sorted({name for totals in found.values() for name in totals.names})
    above, below = np.zeros((2, len(names), len(found)))
    for place, totals in enumerate(found.values()):
        at = [names.index(name) for name in totals.names]
        above[at, place], below[at, place] = totals.numerators, totals.denominators
    return Sample(
        arm,
        tuple(names),
        tuple(run.run_id for run in arm.runs),
        above,
        np.zeros(len(names), dtype=bool),
        below,
        unit="cluster",
        n_prompts=max(totals.n_prompts for totals in found.values()),
    )


def _sample(arm: Arm, totals: Totals, *, takes_mean: bool) -> Sample:
    return Sample(
        arm,
        totals.names,
        tuple(run.run_id for run in arm.runs),
        totals.means if takes_mean else totals.numerators,
        np.zeros(len(totals.names), dtype=bool),
        None if takes_mean else totals.denominators,
        unit="cluster",
        n_prompts=totals.n_prompts,
        n_left_out=totals.n_left_out,
    )


def templates(names: Sequence[object]) -> np.ndarray:
    """The template of each cluster, by its name."""
    return np.array([str(name).partition(":")[0] for name in names])
