"""Every line of the source documents has its claim, and every claim a line in the table."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from allostasis.analysis import registry
from allostasis.analysis.claim_files import freeze
from allostasis.analysis.registry import Row

LINES = Path(__file__).with_name("source_criteria.txt")


def source_lines() -> list[tuple[str, str, str]]:
    """Document, section and line, without Markdown's marks."""
    found, document, section = [], "", ""
    for line in LINES.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            document, _, section = line[3:].partition(" | ")
        elif document:
            cell = line.strip("| ").split("|")[-1] if line.startswith("|") else line
            text = re.sub(r"^\s*(- ✓ |- |\d\. |# )?", "", cell).replace("**", "")
            found.append((document, section, text.rstrip(",").strip()))
    return found


def test_every_criterion_of_the_sources_stands_in_the_registry_once() -> None:
    ours = Counter((c.document, c.section, c.text) for c in registry.criteria())
    assert ours == Counter(source_lines())
    assert max(ours.values()) == 1
    assert {document for document, *_ in ours} == set(registry.DOCUMENTS)


def test_a_criterion_has_claims_or_the_reason_why_nothing_can_be_estimated() -> None:
    for criterion in registry.criteria():
        assert bool(criterion.claims) != bool(criterion.degenerate), criterion


def test_every_claim_that_a_criterion_names_is_registered() -> None:
    unknown = {
        (name, criterion.document)
        for criterion in registry.criteria()
        for name in criterion.claims
        if registry.named(name) is None
    }
    if registry.named("H.angle") is None:  # the geometry of concepts has no claims yet
        unknown = {(name, document) for name, document in unknown if document != "PH"}
    assert not unknown


def test_every_published_claim_is_asked_by_a_criterion() -> None:
    """Directly, or as a part of a compound that is, or as a twin whose id begins with one's."""
    asked = [registry.named(name) for c in registry.criteria() for name in c.claims]
    ids = {claim.id for claim in asked if claim is not None}
    by_id = {c.id: c for claims in registry.registered().values() for c in claims}
    while more := {part for name in ids for part in by_id[name].all_of} - ids:
        ids |= more
    published = {name for name, claim in by_id.items() if claim.status == "published"}
    assert not {name for name in published - ids if not any(name.startswith(i) for i in ids)}


def test_without_records_every_claim_says_what_is_missing(tmp_path: Path) -> None:
    rows = registry.rows(tmp_path)
    every = [claim.id for claims in registry.registered().values() for claim in claims]
    assert [row.claim.id for row in rows] == every
    for row in rows:
        if row.claim.proved is None:
            assert row.word == "undecided"
            assert row.reason.startswith("not run (no finished run of "), row
    (impossible,) = (row for row in rows if row.claim.id == "A1.all")
    assert (impossible.word, impossible.n) == ("refuted", None)
    assert impossible.reason.startswith("by construction: it can be at most 0.9375 (")
    (lm,) = (row for row in rows if row.claim.id == "ioi.delta")
    assert lm.reason == (
        "not run (no finished run of ioi, condition critical, at model.name=openai-community/gpt2)"
    )


def judged(name: str, word: str, *, sha256: str = "") -> dict[str, object]:
    claim = registry.named(name)
    assert claim is not None
    digest = freeze([claim])["hashes"][name]
    return {
        "id": name, "verdict": word, "reason": "why", "claim_sha256": sha256 or digest,
        "estimate": 1.5, "n": 8, "interval": {"low": 1.0, "high": 2.0, "level": 0.95},
    }  # fmt: skip


def write(folder: Path, title: str, *results: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    (folder / "verdicts.json").write_text(json.dumps({title: results}))


def of(rows: list[Row], name: str) -> list[Row]:
    return [row for row in rows if row.claim.id == name]


def test_verdicts_of_several_studies_stand_beside_each_other(tmp_path: Path) -> None:
    write(tmp_path / "one", "ioi: SmolLM2", judged("ioi.compensation", "refuted"))
    write(tmp_path / "two", "ioi: Gemma 3", judged("ioi.compensation", "supported"))
    found = of(registry.rows(tmp_path), "ioi.compensation")
    assert [(row.study, row.subject, row.word) for row in found] == [
        ("one", "SmolLM2", "refuted"), ("two", "Gemma 3", "supported"),
    ]  # fmt: skip
    assert (found[0].estimate, found[0].low, found[0].high, found[0].n) == (1.5, 1.0, 2.0, 8)
    (answer,) = (
        answer
        for answer in registry.answers(registry.rows(tmp_path))
        if answer.criterion.text == "Critical ablation: Compensation > 1.3× in layers 10-12"
    )
    assert "refuted in 1 of 2 studies, supported in 1 of 2 studies" in answer.words


def test_a_verdict_on_another_text_of_a_claim_does_not_count(tmp_path: Path) -> None:
    write(tmp_path / "one", "grokking", judged("C1.width", "supported", sha256="0" * 64))
    (row,) = of(registry.rows(tmp_path), "C1.width")
    assert row.word == "undecided"
    assert row.reason.startswith("CHANGED AFTER RUN")


def test_runs_without_a_report_are_said_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = {"status": "done", "exp": "constraint", "condition": "control"}
    (tmp_path / "run/run.json").write_text(json.dumps(run))
    (row,) = of(registry.rows(tmp_path), "A1")
    assert row.reason == (
        "not run (no report: finished runs of constraint lie there (control 1), "
        "without verdicts yet)"
    )


def test_a_compound_of_atoms_that_were_not_run_is_not_run(tmp_path: Path) -> None:
    lacking = "not run at the registered settings: model.name=x, here y"
    atoms = [judged(f"heads_zero.mistral.{c}", "undecided") for c in ("negation", "logical")]
    whole = judged("heads_zero.mistral", "undecided")
    for atom in atoms:
        atom["reason"] = lacking
    whole["reason"] = "not decided: heads_zero.mistral.negation, heads_zero.mistral.logical"
    write(tmp_path / "one", "heads_zero: M", *atoms, whole)
    (row,) = of(registry.rows(tmp_path), "heads_zero.mistral")
    assert row.reason == lacking


def test_the_table_has_one_line_a_row(tmp_path: Path) -> None:
    rows = registry.rows(tmp_path)
    table = registry.table(rows)
    assert len(table) == len(rows)
    assert {"id", "source", "text", "word", "reason", "exp", "study"} <= set(table.columns)


def test_content_in_memory_reads_as_from_disk(tmp_path: Path) -> None:
    content = {"grokking": [judged("C1.width", "refuted")]}
    write(tmp_path / "x", "grokking", *content["grokking"])
    assert registry.rows_of(content, "x") == registry.rows(tmp_path)


@pytest.mark.parametrize("name", ["A.control", "F.conserve", "L.none"])
def test_a_claim_is_found_by_its_alias(name: str) -> None:
    claim = registry.named(name)
    assert (claim.alias if claim else None) == (None if name == "L.none" else name)
