"""Positive control: a suppressor of known strength is planted, and has to be found and measured."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from allostasis.analysis.curves import UndefinedError
from allostasis.engines.subjects import Filling, Head, ToySubject, Value
from allostasis.experiments.superposition.collected import Collected
from allostasis.experiments.superposition.survey import Rule, Survey
from allostasis.interventions.plant import plant, strength
from allostasis.metrics.head_write_variance import deviations
from allostasis.models.toy_transformer import Block, ToyTransformer
from allostasis.tasks.sequences import Sequences
from allostasis.tasks.splits import Split

COST = 0.1
"""Nats a token by which a plant must hurt, so that not finding it is a failure."""
RATIOS = (3.0, 1.0)
"""E1 that plants are made for: one that D1 must support, one whose interval must cover 1."""


@dataclass(frozen=True)
class Plant:
    """One planted suppressor.

    Attributes:
        source: The head that is copied with the opposite sign.
        host: The head that it is written over.
        ratio: E1 that its strength was made for.
        alpha: That strength.
    """

    source: Head
    host: Head
    ratio: float
    alpha: float


def plants(
    model: ToyTransformer, calibrate: Sequences, n_plants: int
) -> Iterator[tuple[Plant, ToyTransformer]]:
    """Plants, strongest source first, each for every ratio, with the model that holds it.

    The strength is set on sequences that nothing is reported of, and many of them, so that the
    ratio in the population is the one that is asked for.

    Args:
        model: A trained model, which stays as it is.
        calibrate: Sequences.
        n_plants: Pairs of a source and a host.
    """
    subject = ToySubject(model)
    with torch.no_grad():
        variances = torch.stack([
            deviations(z, subject.W_O(layer)).mean(dim=(0, 1))
            for layer, z in enumerate(subject.z(calibrate.tokens))
        ])
        clean = subject.losses(calibrate).mean()
        heads = list(itertools.product(range(model.n_layers), range(model.n_heads)))
        silenced = subject.ablated_losses(calibrate, heads, Filling("zero")).mean(dim=1)
    strongest = sorted(range(len(heads)), key=lambda index: float(clean - silenced[index]))
    pairs = [
        (heads[index], (heads[index][0], host))
        for index in strongest
        for host in range(model.n_heads)
        if host != heads[index][1]
    ]
    for (source, host), ratio in itertools.product(pairs[:n_plants], RATIOS):
        alpha = strength(variances[source[0]], host=host[1], source=source[1], ratio=ratio)
        planted = copy.deepcopy(model)
        block = planted.blocks[source[0]]
        assert isinstance(block, Block)
        plant(block.attn, host=host[1], source=source[1], alpha=alpha)
        yield Plant(source, host, ratio, alpha), planted


def check_plants(
    model: ToyTransformer,
    splits: Mapping[Split, Sequences],
    calibration: Sequences,
    *,
    n_plants: int,
    values: Sequence[Value],
    seed: int,
    rule: Rule,
    found: Collected,
) -> dict[str, Any]:
    """Look for every plant as for any suppressor; gives what run.json says of it.

    A plant alone is compared with the other heads of its layer, whatever else was selected, so that
    the ratio that it was made for is the one that is estimated.

    Args:
        model: A trained model.
        splits: Sequences that it never trained on.
        calibration: Others, which strengths are set on.
        n_plants: Pairs of a source and a host.
        values: What stands in a head's place.
        seed: The run's seed.
        rule: What counts as a suppressor.
        found: The records.
    """
    heads = list(itertools.product(range(model.n_layers), range(model.n_heads)))
    rows: list[dict[str, Any]] = []
    for number, (what, planted) in enumerate(plants(model, calibration, n_plants)):
        survey = Survey(ToySubject(planted), splits, heads, seed=seed, rule=rule)
        at = heads.index(what.host)
        cost = float(survey.effects("zero", "measure", [what.host]).mean())
        alone = np.arange(len(heads)) == at
        compared = survey.energies[""].compared(alone)
        interval = compared.interval(survey.rng, draws=rule.draws)
        assert interval.low is not None
        assert interval.high is not None
        for value in values:
            seen = survey.detect(survey.effects(value, "select"))
            rows.append({
                "example": len(rows), "plant": number, "ablation": value,
                "layer": what.host[0], "head": what.host[1], "source_head": what.source[1],
                "planted_ratio": what.ratio, "alpha": what.alpha, "cost": cost,
                "effect": float(seen.effect[at]), "q": float(seen.q[at]),
                "is_found": bool(seen.selected[at]), "n_selected": seen.count,
                "ratio": compared.ratio, "ratio_low": interval.low, "ratio_high": interval.high,
                "split": "measure", "set": "planted",
                "intervention": f"{value}:{what.host[0]}.{what.host[1]}",
            })  # fmt: skip
    found.add({name: [row[name] for row in rows] for name in rows[0]})
    return _told(rows, found)


def checks(facts: Mapping[str, Any]) -> tuple[dict[str, bool], dict[str, str]]:
    """Whether what was planted came out as it must, and why a check could not be made.

    An interval of 95 % misses 1 plant in 20 at its best, so that `plant_1_covers_1` allows as many
    misses as chance does: it fails where so few intervals cover what was planted that chance alone
    (a binomial count) gives as few in 5 % of runs or less. Of five plants, one may be missed. The
    count takes plants to be independent; those of a run share sequences and often a source, so that
    it fails more often than that.

    Args:
        facts: What `check_plants` gave.

    Returns:
        Checks by name, and reasons by the name of those that could not be made.
    """
    made: dict[str, bool] = {}
    undefined: dict[str, str] = {}
    try:
        made["every_costly_plant_is_found"] = _costly_found(facts)
    except UndefinedError as error:
        undefined["every_costly_plant_is_found"] = str(error)
    strong, even = facts["ratio_3"], facts["ratio_1"]
    made["plant_3_is_above_2"] = strong["above_2"] == 1.0
    chance = stats.binom.cdf(round(even["covers"] * even["n"]), even["n"], 0.95)
    made["plant_1_covers_1"] = bool(chance > 0.05 + 1e-9)  # 0 of 1 is 0.05 and a last digit
    return made, undefined


def _costly_found(facts: Mapping[str, Any]) -> bool:
    """Whether every plant that costs enough was found.

    Raises:
        UndefinedError: None costs enough, so that nothing had to be found.
    """
    if facts["n_costly"] == 0:
        raise UndefinedError(
            f"no plant costs {COST} nats a token (the costliest {facts['largest_cost']:.3f}), so "
            "that none had to be found"
        )
    return facts["n_costly_found"] == facts["n_costly"]


def _told(rows: Sequence[Mapping[str, Any]], found: Collected) -> dict[str, Any]:
    """Counts over plants, and how they came out."""
    costly = [row for row in rows if row["cost"] >= COST]
    at: dict[str, Any] = {"split": "measure", "unit": "1"}
    if costly:
        share = float(np.mean([row["is_found"] for row in costly]))
        found.read("planted.found", share, n=len(costly), symbol="Psi", **at)
    facts: dict[str, Any] = {
        "n": len(rows), "n_costly": len(costly),
        "n_costly_found": sum(row["is_found"] for row in costly),
        "largest_cost": max(row["cost"] for row in rows),
    }  # fmt: skip
    for ratio in RATIOS:
        some = [row for row in rows if row["planted_ratio"] == ratio]
        logs = [np.log(row["ratio"]) for row in some]
        mean = float(np.exp(np.mean(logs)))
        found.read(f"planted.ratio_{ratio:g}", mean, n=len(some), symbol="sigma2", **at)
        facts[f"ratio_{ratio:g}"] = {
            "n": len({row["plant"] for row in some}),
            "mean": mean,
            "covers": float(np.mean([r["ratio_low"] <= ratio <= r["ratio_high"] for r in some])),
            "above_2": float(np.mean([row["ratio_low"] > 2 for row in some])),
            "above_1": float(np.mean([row["ratio_low"] > 1 for row in some])),
        }
    return facts
