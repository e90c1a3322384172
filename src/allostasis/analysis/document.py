"""The audit report: REPORT.md, report.html, verdicts.json and figures."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from allostasis.analysis import canvas, outcomes
from allostasis.analysis.aggregate import Arm, arms, one_a_condition
from allostasis.analysis.canvas import Figure
from allostasis.analysis.claims import Claim
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.families import seed_warnings
from allostasis.analysis.provenance import provenance
from allostasis.analysis.tables import Table, exploratory
from allostasis.analysis.text import cell
from allostasis.analysis.verdicts import Result, judge
from allostasis.analysis.wording import Block, blocks
from allostasis.core.records import RunRecord, write_atomically, write_json

WORDS = ("supported", "refuted", "equivalent", "undecided")


@dataclass(frozen=True)
class Extension:
    """What an experiment adds to its report.

    Attributes:
        folder: The experiment's package, which holds its claims.
        claims: Its claims.
        figures: Makes figures of the arms shown.
        tables: Makes tables of them.
        artefacts: Writes files of its own from the runs into a folder; its last argument is whether
            runs may differ that are compared.
    """

    folder: Path
    claims: list[Claim]
    figures: Callable[[Sequence[Arm]], list[Figure]] | None = None
    tables: Callable[[Sequence[Arm]], list[Table]] | None = None
    artefacts: Callable[[Sequence[RunRecord], Path, bool], list[Path]] | None = None


@dataclass(frozen=True)
class Drawn:
    """A figure as the templates take it.

    Attributes:
        name: Stem of its file.
        title: Heading.
        caption: What it shows.
        image: PNG; empty where it could not be drawn.
        missing: Why it could not.
        fragment: Its interactive twin as HTML; empty where it has none.
    """

    name: str
    title: str
    caption: str
    image: bytes
    missing: str = ""
    fragment: Markup = Markup()

    @property
    def base64(self) -> str:
        """The image for report.html, which needs no other file."""
        return base64.b64encode(self.image).decode()


@dataclass(frozen=True)
class Study:
    """One experiment of a report, judged and drawn.

    Attributes:
        exp: Experiment.
        arms: All of its arms.
        subject: The pretrained model that it is about; empty where each run trains its own.
        results: One a claim.
        blocks: The results in words.
        figures: Drawn.
        tables: The experiment's, then the exploratory one.
        warnings: Claims that its seeds cannot decide.
        provenance: Labels and texts.
        metrics: What each recorded metric is, by name.
    """

    exp: str
    arms: list[Arm]
    results: list[Result]
    blocks: list[Block]
    figures: list[Drawn]
    tables: list[Table]
    warnings: list[str]
    provenance: list[tuple[str, str]]
    metrics: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    subject: str = ""

    @property
    def title(self) -> str:
        """Its heading."""
        return f"{self.exp}: {self.subject}" if self.subject else self.exp

    @property
    def anchor(self) -> str:
        """Its name in addresses and folders."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def counts(self) -> str:
        """How many claims got each verdict."""
        found = Counter(result.verdict.word for result in self.results)
        return ", ".join(f"{found[word]} {word}" for word in WORDS) + f" of {len(self.results)}"

    @property
    def arm_rows(self) -> list[tuple[str, ...]]:
        """One row an arm: what it is, its seeds, whether the figures show it."""
        shown = one_a_condition(self.arms)
        return [
            (
                arm.condition,
                arm.device,
                arm.hash,
                ", ".join(map(str, arm.seeds)) or "none",
                ", ".join(sorted({str(run.last_step) for run in arm.runs})) or "none",
                "yes" if arm in shown else "no",
            )
            for arm in self.arms
        ]

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """Runs that do not count, with why."""
        return [pair for arm in self.arms for pair in arm.left_out.items()]


def study(exp: str, runs: Sequence[RunView], extension: Extension, *, subject: str = "") -> Study:
    """Judge an experiment's claims on its runs and draw its figures.

    Args:
        exp: The experiment.
        runs: Its runs; of one model, where the model is not trained.
        extension: What the experiment adds.
        subject: That model.
    """
    every = arms(runs)
    results = judge(extension.claims, every)
    there = one_a_condition(every)
    drawn: list[Drawn] = []
    tables: list[Table] = []
    if there:
        wanted = extension.figures(there) if extension.figures is not None else []
        drawn = [_drawn(figure) for figure in wanted]
        tables = extension.tables(there) if extension.tables is not None else []
        tables = [*tables, exploratory(there)]
    if extension.claims:
        forest = Figure(
            "forest", "Claims with an estimate",
            "Grey: what is claimed. Dashed: the bound. Dotted: where a claim is refuted, if not at "
            "its bound. Bar: the interval. Each row has its own scale; verdicts are drawn alike.",
            lambda: outcomes.forest(results),
        )  # fmt: skip
        drawn.insert(0, _drawn(forest))
    few = seed_warnings(extension.claims, min((len(arm.runs) for arm in there), default=0))
    return Study(
        exp=exp,
        arms=every,
        results=results,
        blocks=blocks(results, every),
        figures=drawn,
        tables=tables,
        warnings=[*sorted({r.gate for r in runs if r.gate}), *few],
        provenance=provenance(runs, extension.claims, extension.folder),
        metrics=_metrics(runs),
        subject=subject,
    )


def _drawn(figure: Figure) -> Drawn:
    try:
        image = canvas.png(figure)
        fragment = Markup() if figure.page is None else figure.page()
        return Drawn(figure.name, figure.title, figure.caption, image, fragment=fragment)
    except UndefinedError as error:
        return Drawn(figure.name, figure.title, figure.caption, b"", missing=str(error))


def _metrics(runs: Sequence[RunView]) -> list[tuple[str, dict[str, Any]]]:
    known: dict[str, dict[str, Any]] = {}
    for run in runs:
        known |= run.run.get("metrics") or {}
    return sorted(known.items())


def write(title: str, studies: Sequence[Study], folder: Path) -> list[Path]:
    """Write a report.

    Args:
        title: Heading.
        studies: One an experiment.
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
    written: list[Path] = []
    for name in ("report.md", "report.html"):
        template = environment.get_template(f"{name}.jinja")
        text = template.render(title=title, studies=studies, homes=homes)
        path = folder / (name if name.endswith(".html") else "REPORT.md")
        write_atomically(path, lambda file, text=text: file.write_text(text, encoding="utf-8"))
        written.append(path)
    verdicts = {s.title: [_as_json(result) for result in s.results] for s in studies}
    write_json(folder / "verdicts.json", verdicts)
    written.append(folder / "verdicts.json")
    page = environment.get_template("page.html.jinja")
    for study in studies:
        home = folder / homes[study.anchor]
        for figure in study.figures:
            files = {".png": figure.image} if figure.image else {}
            if figure.fragment:
                files[".html"] = page.render(title=study.title, figure=figure).encode()
            for ending, content in files.items():
                path = home / f"{figure.name}{ending}"
                write_atomically(path, lambda file, content=content: file.write_bytes(content))
                written.append(path)
    return written


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
    for role, sample in (("units", result.treatment), ("control_units", result.control)):
        if sample is not None and sample.unit == "cluster":
            content["clusters_of"] = list(sample.run_ids)
        elif sample is not None:
            content[role] = [
                {"seed": seed, "run_id": run, "value": float(value), "censored": bool(late)}
                for seed, run, value, late in zip(
                    sample.units, sample.run_ids, sample.values, sample.censored, strict=True
                )
            ]
    return content
