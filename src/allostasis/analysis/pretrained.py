"""Pretrained models as units: one number a model, whatever the runs that looked at it.

Averaging goes from the inside out: the prompts of a cluster, the clusters or seeds of a model.
Every model weighs the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allostasis.analysis import clusters, summaries
from allostasis.analysis.aggregate import Arm, Sample, shown, summarise
from allostasis.analysis.claims import Claim
from allostasis.analysis.curves import RunView, UndefinedError


def name(run: RunView) -> str:
    """A model's name, with its revision where one is pinned.

    Quantisations, number formats and prompts of one model are not several models.
    """
    known, revision = run.model.get("name") or run.title, run.model.get("revision")
    return f"{known}@{revision}" if revision else str(known)


def samples(claim: Claim, arms: Sequence[Arm]) -> tuple[Sample, Sample | None, list[Arm]]:
    """One number a model that has all arms of a claim.

    Args:
        claim: With `unit: model`.
        arms: Of one experiment, of whatever models.

    Returns:
        Treatment, control where the claim has one, and the arms that were read.

    Raises:
        UndefinedError: No model has a number; the message says why each has none.
    """
    assert claim.arms is not None
    found: list[dict[str, tuple[Arm, float]]] = []
    undefined: dict[int | str, str] = {}
    for condition in filter(None, (claim.arms.treatment, claim.arms.control)):
        read: dict[str, tuple[Arm, float]] = {}
        for model, theirs in _by_model(arms, condition).items():
            try:
                arm = _shown(theirs, condition, claim)
                read[model] = (arm, _mean(claim, arm))
            except UndefinedError as error:
                undefined[model] = str(error)
        found.append(read)
    models = sorted(set.intersection(*map(set, found)))
    if not models:
        reasons = "; ".join(f"{model}: {why}" for model, why in undefined.items())
        raise UndefinedError(reasons or "not run (no pretrained model has finished runs of it)")
    made = [
        Sample(
            read[models[0]][0],
            tuple(models),
            tuple(run.run_id for model in models for run in read[model][0].runs),
            np.array([read[model][1] for model in models]),
            np.zeros(len(models), dtype=bool),
            undefined=undefined,
            unit="model",
        )
        for read in found
    ]
    used = [read[model][0] for read in found for model in models]
    return made[0], made[1] if len(made) > 1 else None, used


def _by_model(arms: Sequence[Arm], condition: str) -> dict[str, list[Arm]]:
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.condition == condition and arm.runs and arm.runs[0].model:
            found.setdefault(name(arm.runs[0]), []).append(arm)
    return found


def _shown(arms: Sequence[Arm], condition: str, claim: Claim) -> Arm:
    """The arm that stands for one model.

    Raises:
        UndefinedError: The model does not do the task, or was not run as registered.
    """
    arm, unlike = shown(arms, condition, claim.settings)
    if unlike:
        raise UndefinedError(f"not run at the registered settings: {unlike}")
    refused = [run.gate for run in arm.runs if run.gate]
    if refused:
        raise UndefinedError(refused[0])
    return arm


def _mean(claim: Claim, arm: Arm) -> float:
    """Mean over a model's clusters of prompts, or over its seeds."""
    assert claim.estimand is not None
    if summaries.parse(claim.estimand.summary).prompts is not None:
        (sample,) = clusters.samples(claim, arm).values()
    else:
        sample = summarise(claim, arm)
    if not len(sample.values):
        raise UndefinedError("; ".join(sample.undefined.values()) or "no finished run")
    return float(sample.values.mean())
