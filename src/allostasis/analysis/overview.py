"""The claims table that a report begins with: every claim of every study, a row each."""

from __future__ import annotations

from dataclasses import dataclass

from allostasis.analysis.families import units_of
from allostasis.analysis.studies import Study
from allostasis.analysis.text import bracket, counted, number
from allostasis.analysis.verdicts import Result
from allostasis.analysis.wording import doubts


@dataclass(frozen=True)
class Line:
    """A claim in a line.

    Attributes:
        id: The claim.
        anchor: Where the page has its details.
        source: Who claims it.
        status: published, corrected or own.
        text: What is claimed.
        measured: Estimate, interval, units; or that there is none.
        verdict: The word.
        reason: What decided it, or what is missing.
        doubts: What could still be wrong with it.
    """

    id: str
    anchor: str
    source: str
    status: str
    text: str
    measured: str
    verdict: str
    reason: str
    doubts: str


def lines(study: Study) -> list[Line]:
    """One line a claim of a study, in the order of its file."""
    return [_line(study, result) for result in study.results]


def _line(study: Study, result: Result) -> Line:
    claim = result.claim
    return Line(
        id=claim.id,
        anchor=f"{study.anchor}-{claim.id}",
        source=claim.source,
        status=claim.status,
        text=claim.text,
        measured=_measured(result),
        verdict=result.verdict.word,
        reason=result.verdict.reason,
        doubts=_doubts(study, result),
    )


def _doubts(study: Study, result: Result) -> str:
    left = doubts(result, study.arms)
    atoms = result.atoms or (result,)
    is_named = any(atom.claim.confounds for atom in atoms)
    return "; ".join(left) or ("all that was named is excluded" if is_named else "none was named")


def _measured(result: Result) -> str:
    if result.claim.all_of:
        return f"see {', '.join(result.claim.all_of)}"
    if result.inference is None:
        return "nothing"
    found = number(result.inference.estimate)
    if result.interval is not None:
        found += f" {bracket(result.interval)} ({result.interval.level:.0%})"
    return f"{found}, {counted(result.inference.n, units_of(result.claim))}"
