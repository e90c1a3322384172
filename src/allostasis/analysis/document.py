"""The audit report: REPORT.md, report.html, verdicts.json and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from allostasis.analysis import overview, registry
from allostasis.analysis.studies import WORDS, Study, questions
from allostasis.analysis.text import cell
from allostasis.analysis.verdicts import Result
from allostasis.core.records import write_atomically, write_json


def write(title: str, studies: Sequence[Study], folder: Path) -> list[Path]:
    """Write a report.

    Args:
        title: Heading.
        studies: One an experiment and pretrained model.
        folder: Where REPORT.md, report.html, verdicts.json and figures/ shall be.

    Returns:
        The files written, figures last.
    """
    # a figure's name is unique in its study only
    homes = {s.anchor: "figures" if len(studies) == 1 else f"figures/{s.anchor}" for s in studies}
    environment = Environment(
        loader=PackageLoader("allostasis.analysis"),
        autoescape=True,  # of Markdown too: what `cell` has made safe is marked so
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = cell
    verdicts = {s.title: [_as_json(result) for result in s.results] for s in studies}
    is_whole = len({study.exp for study in studies}) > 1  # else the report is of one experiment
    rows = registry.rows_of(verdicts, title) if is_whole else []
    content = {
        "title": title,
        "studies": studies,
        "homes": homes,
        "words": WORDS,
        "groups": overview.groups(studies, rows, questions()),
        "criteria": overview.criteria(registry.answers(rows)) if is_whole else {},
    }
    written: list[Path] = []
    for name in ("report.md", "report.html"):
        text = environment.get_template(f"{name}.jinja").render(content)
        path = folder / (name if name.endswith(".html") else "REPORT.md")
        write_atomically(path, lambda file, text=text: file.write_text(text, encoding="utf-8"))
        written.append(path)
    write_json(folder / "verdicts.json", verdicts)
    written.append(folder / "verdicts.json")
    page = environment.get_template("page.html.jinja")
    for study in studies:
        home = folder / homes[study.anchor]
        for figure in study.figures:
            files = {".png": figure.image} if figure.image else {}
            if figure.fragment:
                files[".html"] = page.render(title=study.title, figure=figure).encode()
            for ending, data in files.items():
                path = home / f"{figure.name}{ending}"
                write_atomically(path, lambda file, data=data: file.write_bytes(data))
                written.append(path)
    return written


def earlier_looks(folders: Sequence[Path]) -> dict[str, dict[str, list[int]]]:
    """Numbers of units at which earlier reports judged each claim, by study and claim.

    Args:
        folders: Where verdicts.json may lie.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for path in (folder / "verdicts.json" for folder in folders):
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for study, results in content.items():
            for result in results:
                looks = result.get("looks") or [n for n in [result.get("n")] if n]
                if looks:
                    found.setdefault(study, {}).setdefault(result["id"], []).extend(looks)
    return found


def _as_json(result: Result) -> dict[str, Any]:
    """A result with everything that its verdict came from."""
    claim, inference = result.claim, result.inference
    content: dict[str, Any] = {
        "id": claim.id,
        "verdict": result.verdict.word,
        "reason": result.verdict.reason,
        "text": claim.text,
        "status": claim.status,
        "claim_sha256": result.hash,
        "changed_after_run": list(result.changed),
        "family": claim.family,
        "family_size": result.family_size,
    }
    if claim.all_of:
        return content | {"all_of": list(claim.all_of)}
    content |= {"direction": claim.direction, "bound": claim.bound, "alpha": claim.alpha}
    content |= {"estimate": None, "n": 0, "min_seeds": claim.min_seeds}
    if inference is not None:
        content |= {
            "estimate": inference.estimate,
            "n": inference.n,
            "interval": None if result.interval is None else vars(result.interval),
            "p_support": result.p_support,
            "p_refute": result.p_refute,
            "level_support_adjusted": result.q_support,
            "level_refute_adjusted": result.q_refute,
        }
    if len(result.looks) > 1:
        content["looks"] = list(result.looks)
    for role, sample in (("units", result.treatment), ("control_units", result.control)):
        if sample is not None and sample.unit == "cluster":
            content["clusters_of"] = list(sample.run_ids)
        elif sample is not None and sample.unit == "model":
            pairs = zip(sample.units, sample.values, strict=True)
            content[role] = [{"model": model, "value": float(value)} for model, value in pairs]
            content["models_of"] = list(sample.run_ids)
        elif sample is not None:
            content[role] = [
                {"seed": seed, "run_id": run, "value": float(value), "censored": bool(late)}
                for seed, run, value, late in zip(
                    sample.units, sample.run_ids, sample.values, sample.censored, strict=True
                )
            ]
    return content
