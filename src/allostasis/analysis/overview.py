"""What a report begins with: every claim in a line, and the source documents line by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from allostasis.analysis import registry
from allostasis.analysis.families import units_of
from allostasis.analysis.registry import Answer, Row
from allostasis.analysis.studies import WORDS, Study, anchor, title
from allostasis.analysis.text import bracket, counted, number
from allostasis.analysis.verdicts import Result
from allostasis.analysis.wording import doubts


@dataclass(frozen=True)
class Line:
    """A claim in a line.

    Attributes:
        id: The claim.
        anchor: Where the page has its details; empty where it has none.
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
    doubts: str = ""


@dataclass(frozen=True)
class Group:
    """Claims that one study judged, or those of an experiment that none did.

    Attributes:
        title: Its heading.
        anchor: Where the page has the study; empty where it has none.
        question: What the experiment asks.
        lines: Its claims.
    """

    title: str
    anchor: str
    question: str
    lines: tuple[Line, ...]

    @property
    def counts(self) -> list[int]:
        """How many claims got each verdict, and how many there are."""
        found = Counter(line.verdict for line in self.lines)
        return [*(found[word] for word in WORDS), len(self.lines)]


@dataclass(frozen=True)
class Entry:
    """What became of one claim that a document's line makes.

    Attributes:
        name: The claim, with the model that the verdict is about.
        anchor: Where the page has its details; empty where it has none.
        verdict: The word.
        reason: What decided it, or what is missing.
    """

    name: str
    anchor: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Criterion:
    """A line of a source document, with what became of it.

    Attributes:
        section: Heading that it stands under.
        text: The line.
        entries: One a claim and study.
        note: Why it has none, or fewer.
    """

    section: str
    text: str
    entries: tuple[Entry, ...]
    note: str


def groups(studies: Sequence[Study], rows: Sequence[Row], questions: dict[str, str]) -> list[Group]:
    """Every study's claims, then those that no study judged, by experiment.

    Args:
        studies: In the report's order.
        rows: What the registry says of all claims; none: of the studies' claims alone.
        questions: What each experiment asks.
    """
    made = [
        Group(s.title, s.anchor, s.question, tuple(_line(s, result) for result in s.results))
        for s in studies
    ]
    left = [row for row in rows if not row.study]
    for exp in dict.fromkeys(row.exp for row in left):
        lines = tuple(_left_out(row) for row in left if row.exp == exp)
        made.append(
            Group(f"{exp}: claims that no run here is about", "", questions.get(exp, ""), lines)
        )
    return made


def criteria(answers: Sequence[Answer]) -> dict[str, list[Criterion]]:
    """The source documents line by line, by the document's title."""
    made: dict[str, list[Criterion]] = {}
    for answer in answers:
        lines = made.setdefault(registry.DOCUMENTS[answer.criterion.document], [])
        entries = tuple(_entry(row) for row in answer.rows)
        asked = answer.criterion
        lines.append(Criterion(asked.section, asked.text, entries, _note(answer)))
    return made


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


def _left_out(row: Row) -> Line:
    claim = row.claim
    parts = f"see {', '.join(claim.all_of)}" if claim.all_of else "nothing"
    return Line(
        claim.id, "", claim.source, claim.status, claim.text, parts, row.word, row.reason
    )  # fmt: skip


def _entry(row: Row) -> Entry:
    place = f"{anchor(title(row.exp, row.subject))}-{row.claim.id}" if row.study else ""
    name = title(row.claim.id, row.subject.partition(" (")[0])
    return Entry(name, place, row.word, row.reason)


def _note(answer: Answer) -> str:
    if answer.criterion.degenerate:
        return f"degenerate: {answer.criterion.degenerate}"
    told = [f"{name}: undecided: not run (no such claim yet)" for name in answer.unclaimed]
    return "; ".join(told)


def _doubts(study: Study, result: Result) -> str:
    left = doubts(result, study.results, study.arms)
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
