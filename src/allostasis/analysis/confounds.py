"""What else could give a claim's result, and what the records say of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from allostasis.analysis.aggregate import Arm, shown, summarise
from allostasis.analysis.claims import Arms, Claim
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.summaries import parse
from allostasis.analysis.text import number
from allostasis.analysis.verdicts import POSITIVE, Result


@dataclass(frozen=True)
class Confound:
    """One thing that could give a claim's result as well.

    Attributes:
        name: In words.
        told: What the records say of it.
        is_excluded: Whether a claim excludes it.
    """

    name: str
    told: str
    is_excluded: bool = False


def confounds(result: Result, results: Iterable[Result], arms: Sequence[Arm]) -> list[Confound]:
    """Every confound that a claim names.

    That the arm which could exclude it was run excludes nothing: a claim of the same treatment
    against that arm does, where it is supported. Without one the arm's number stands beside.

    Args:
        result: Of the claim.
        results: Of all claims of the experiment.
        arms: All arms of the experiment.
    """
    claim, others = result.claim, list(results)
    found = []
    for key, arm in claim.confounds.items():
        name = key.replace("_", " ")
        if arm is None:
            found.append(Confound(name, "not excluded"))
        elif not any(other.condition == arm and other.runs for other in arms):
            found.append(Confound(name, f"not excluded (arm '{arm}' was not run)"))
        else:
            found.append(_judged(name, arm, result, others, arms))
    return found


def _judged(
    name: str, arm: str, result: Result, results: Sequence[Result], arms: Sequence[Arm]
) -> Confound:
    claim = result.claim
    assert claim.arms is not None
    against = Arms(treatment=claim.arms.treatment, control=arm)
    deciding = [r for r in results if r.claim.arms == against and r.claim.id != claim.id]
    words = ", ".join(f"{r.claim.id} is {r.verdict.word}" for r in deciding)
    if deciding and all(r.verdict.word in POSITIVE for r in deciding):
        return Confound(name, f"excluded by {arm} ({words})", is_excluded=True)
    told = f"measured by {arm}: {_value(claim, arm, arms)}"
    if result.treatment is not None and result.treatment.unit == "seed":
        told += f", against {_value(claim, claim.arms.treatment, arms)} in {against.treatment}"
    return Confound(name, f"{told}; {words or 'no claim decides on it'}")


def _value(claim: Claim, condition: str, arms: Sequence[Arm]) -> str:
    """Mean over seeds of a claim's summary in an arm that is not its own."""
    reads_beside = claim.estimand is not None and parse(claim.estimand.summary).reads_beside
    if claim.estimand is None or claim.estimand.unit != "seed" or reads_beside:
        return "see its own claims"
    arm, _ = shown(arms, condition, claim.settings)
    cells = [a for a in arms if (a.condition, a.device) == (arm.condition, arm.device)]
    try:
        sample = summarise(claim, arm, cells)
    except UndefinedError as error:
        return f"undefined ({error})"
    if not len(sample.values):
        return f"undefined ({next(iter(sample.undefined.values()))})"
    return number(float(sample.values.mean()))
