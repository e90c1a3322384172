"""Every claim of every experiment beside the source's own lines, with the verdicts that exist."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import allostasis
from allostasis.analysis import claim_files
from allostasis.analysis.claims import Claim, by_construction

CRITERIA = "criteria.yaml"
DOCUMENTS = {
    "CS": "The Conservation of Separability (v2.1)",
    "RS": "Random Sequence Bug - FIXED",
    "TAL": "Tiny Ablation Lab - Build Summary",
    "SV": "Tiny Ablation Lab - Suppressor Validation Handover",
    "PH": "Polytope Discovery & Hierarchical SAE Integration",
}


@dataclass(frozen=True)
class Criterion:
    """One success criterion or expected result of a source document.

    Attributes:
        document: Its short name, a key of `DOCUMENTS`.
        section: Heading that it stands under.
        text: The line as the document has it.
        claims: Ids or aliases of the claims that ask it.
        degenerate: Why nothing can be estimated for it; empty where claims ask it.
    """

    document: str
    section: str
    text: str
    claims: tuple[str, ...] = ()
    degenerate: str = ""


@dataclass(frozen=True)
class Row:
    """One claim as one study judged it, or as no study did.

    Attributes:
        exp: Experiment that it is registered for.
        claim: The claim as it stands now.
        study: Folder of the verdicts, relative to the one that was searched; empty where none.
        subject: Pretrained model that the verdict is about; empty where runs train their own.
        word: supported, refuted, equivalent, undecided, or supported (vacuous), which counts as
            nothing.
        reason: What decided it, or what is missing.
        estimate: None where nothing was measured, and for a compound.
        low: Lower limit of the printed interval.
        high: Upper limit.
        level: Nominal coverage of that interval.
        n: Units; None where nothing was measured, and for a compound.
        p_support: One-sided p of "on the wrong side of the bound", raw.
        p_refute: One-sided p of "as claimed", raw.
    """

    exp: str
    claim: Claim
    study: str
    subject: str
    word: str
    reason: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    level: float | None = None
    n: int | None = None
    p_support: float | None = None
    p_refute: float | None = None


@dataclass(frozen=True)
class Answer:
    """A source criterion with what became of the claims that ask it.

    Attributes:
        criterion: The line.
        rows: All rows of its claims.
        unclaimed: Names that no registered claim has.
    """

    criterion: Criterion
    rows: tuple[Row, ...]
    unclaimed: tuple[str, ...]

    @property
    def words(self) -> str:
        """The verdict of each claim with why it is undecided, or why there is none.

        A claim that several studies judged has each of their verdicts, with how many gave it.
        """
        if self.criterion.degenerate:
            return f"degenerate: {self.criterion.degenerate}"
        names = dict.fromkeys(row.claim.id for row in self.rows)
        told = [f"{name} {_said([r for r in self.rows if r.claim.id == name])}" for name in names]
        told += [f"{name} undecided: not run (no such claim yet)" for name in self.unclaimed]
        return "; ".join(told)


def _said(rows: Sequence[Row]) -> str:
    """The verdicts of several studies on one claim; why, where none of them decided it."""
    counts = Counter(row.word for row in rows if row.word != "undecided")
    if counts:
        several = len(rows) > 1
        return ", ".join(
            f"{word} in {count} of {len(rows)} studies" if several else word
            for word, count in counts.items()
        )
    return f"undecided: {'; '.join(dict.fromkeys(row.reason for row in rows))}"


@cache
def criteria() -> tuple[Criterion, ...]:
    """Every success criterion and expected result of the source documents, in their order."""
    text = resources.files("allostasis.analysis").joinpath(CRITERIA).read_text(encoding="utf-8")
    return tuple(
        Criterion(
            section["document"], section["section"], line["text"],
            tuple(line.get("claims", ())), line.get("degenerate", ""),
        )
        for section in yaml.safe_load(text)
        for line in section["criteria"]
    )  # fmt: skip


@cache
def registered(package: Path | None = None) -> dict[str, list[Claim]]:
    """Every claim of every experiment, by experiment, in file order.

    Args:
        package: Folder of the experiments' packages; this package's own by default.

    Raises:
        ClaimError: A claims file is not valid.
    """
    folder = package or Path(allostasis.__path__[0]) / "experiments"
    found: dict[str, list[Claim]] = {}
    for path in sorted(folder.glob("*/claims.yaml")):
        text = path.read_text(encoding="utf-8")
        for claim in claim_files.read(text, origin=str(path)):
            found.setdefault(claim.exp or path.parent.name, []).append(claim)
    return found


def named(name: str) -> Claim | None:
    """The registered claim of an id, or of an alias that no id and no earlier claim has.

    Example:
        >>> named("A.control").id, named("A1").id, named("no such claim")
        ('A1', 'A1', None)
    """
    every = [claim for claims in registered().values() for claim in claims]
    by_id = [claim for claim in every if claim.id == name]
    return next(iter(by_id or [claim for claim in every if claim.alias == name]), None)


def rows(*folders: Path) -> list[Row]:
    """Every registered claim with every verdict on it in or below folders.

    Args:
        folders: Where verdicts.json files lie: `experiments`, `outputs`, one study.

    Returns:
        By experiment and in file order; of a claim, by study. A claim that no study judged has one
        row: undecided, with what is missing, or what holds of it by construction.
    """
    judged: list[Row] = []
    records: dict[str, Counter[str]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("verdicts.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            where = path.parent.relative_to(folder).as_posix()
            judged += _judged(content, folder.name if where == "." else where)
        for path in sorted(folder.rglob("run.json")):
            run = json.loads(path.read_text(encoding="utf-8"))
            if run.get("status") == "done":
                records.setdefault(run["exp"], Counter())[run["condition"]] += 1
    return _with_missing(judged, records)


def rows_of(studies: Mapping[str, Sequence[Mapping[str, Any]]], study: str) -> list[Row]:
    """As `rows`, of the content of one verdicts.json.

    Args:
        studies: Title of each study, and its claims as `document.write` stores them.
        study: What to call them.
    """
    return _with_missing(_judged(studies, study))


@cache
def _by_id() -> dict[str, tuple[str, Claim, str]]:
    """Experiment, claim and hash of every registered claim."""
    return {
        claim.id: (exp, claim, digest)
        for exp, claims in registered().items()
        for claim, digest in zip(claims, claim_files.freeze(claims)["hashes"].values(), strict=True)
    }


def _judged(studies: Mapping[str, Sequence[Mapping[str, Any]]], study: str) -> list[Row]:
    """The rows of one verdicts.json; claims that are no longer registered are left out."""
    known = _by_id()
    found = []
    for title, results in studies.items():
        subject = title.partition(": ")[2]
        for result in results:
            if result["id"] not in known:
                continue
            exp, claim, digest = known[result["id"]]
            interval = result.get("interval") or {}
            row = Row(
                exp, claim, study, subject, result["verdict"], result["reason"],
                result.get("estimate"), interval.get("low"), interval.get("high"),
                interval.get("level"), result.get("n"), result.get("p_support"),
                result.get("p_refute"),
            )  # fmt: skip
            if result["claim_sha256"] != digest and row.word != "undecided":
                reason = f"CHANGED AFTER RUN: the study judged another text of it ({row.word})"
                row = replace(row, word="undecided", reason=reason)
            found.append(row)
    return found


def _with_missing(
    judged: Sequence[Row], records: Mapping[str, Mapping[str, int]] | None = None
) -> list[Row]:
    """All claims in order: those that were judged as they were, the others as not run.

    A compound of which no atom was run is not run either, and says what its atoms lack.
    """
    ordered: list[Row] = []
    for exp, claims in registered().items():
        for claim in claims:
            own = [row for row in judged if row.claim.id == claim.id]
            ordered += own or [_not_run(exp, claim, claims, (records or {}).get(exp, {}))]
    return [_with_reasons(row, ordered) for row in ordered]


def _not_run(exp: str, claim: Claim, claims: Sequence[Claim], records: Mapping[str, int]) -> Row:
    known = by_construction(claim)
    if known is not None:
        return Row(exp, claim, "", "", *known)
    lacking = missing(exp, claim, claims, records)
    return Row(exp, claim, "", "", "undecided", f"not run ({lacking})")


def _with_reasons(row: Row, rows: Sequence[Row]) -> Row:
    """A compound that was not decided, with why its atoms were not, each reason once."""
    if row.word != "undecided" or not row.reason.startswith("not decided: "):
        return row
    by_id = {other.claim.id: other for other in rows if _is_beside(other, row)}

    def reasons(one: Row) -> list[str]:
        below = [by_id[name] for name in one.claim.all_of if name in by_id]
        if not below:
            return [one.reason]
        return [why for each in below if each.word == "undecided" for why in reasons(each)]

    why = "; ".join(dict.fromkeys(reasons(row)))
    return replace(row, reason=why) if why.startswith("not run") else row


def _is_beside(other: Row, row: Row) -> bool:
    return (other.exp, other.study, other.subject) == (row.exp, row.study, row.subject)


def missing(
    exp: str, claim: Claim, claims: Sequence[Claim], records: Mapping[str, int] | None = None
) -> str:
    """Which runs a claim lacks where no study judged it.

    Args:
        exp: Its experiment.
        claim: The claim.
        claims: All claims of the experiment; a compound lacks what its atoms lack.
        records: Finished runs of the experiment by condition, of studies without a report.
    """
    by_id = {other.id: other for other in claims}

    def atoms(one: Claim) -> list[Claim]:
        return [a for name in one.all_of for a in atoms(by_id[name])] if one.all_of else [one]

    below = atoms(claim)
    both = ((a.arms.treatment, a.arms.control) for a in below if a.arms is not None)
    arms = list(dict.fromkeys(arm for pair in both for arm in pair if arm is not None))
    settings = {key: value for atom in below for key, value in atom.settings.items()}
    at = ", ".join(f"{key}={value}" for key, value in settings.items())
    at = f", at {at}" if at else ""
    there = {arm: records[arm] for arm in arms if arm in records} if records else {}
    if there:
        runs = ", ".join(f"{arm} {count}" for arm, count in there.items())
        return f"no report: finished runs of {exp} lie there ({runs}), without verdicts yet{at}"
    word = "condition" if len(arms) == 1 else "conditions"
    return f"no finished run of {exp}, {word} {', '.join(arms)}{at}"


def table(found: Iterable[Row]) -> pd.DataFrame:
    """Rows as a frame: one column a field, the claim by its id, source, text and status."""
    plain = [field.name for field in fields(Row) if field.name != "claim"]
    return pd.DataFrame([
        {"id": row.claim.id, "source": row.claim.source, "text": row.claim.text}
        | {"status": row.claim.status}
        | {name: getattr(row, name) for name in plain}
        for row in found
    ])


def answers(found: Sequence[Row]) -> list[Answer]:
    """Every source criterion, in the documents' order, with the rows of the claims that ask it."""
    made = []
    for criterion in criteria():
        claims = {name: named(name) for name in criterion.claims}
        ids = {claim.id for claim in claims.values() if claim is not None}
        made.append(
            Answer(
                criterion,
                tuple(row for row in found if row.claim.id in ids),
                tuple(name for name, claim in claims.items() if claim is None),
            )
        )
    return made
