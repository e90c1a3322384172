"""A folder of runs as studies: one experiment, and one pretrained model, each, judged and drawn."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations, starmap
from pathlib import Path
from typing import Any, get_args

from markupsafe import Markup

from allostasis.analysis import canvas, checks, claim_files, outcomes
from allostasis.analysis.aggregate import Arm, arms, equal_weights, one_a_condition
from allostasis.analysis.canvas import Figure
from allostasis.analysis.claims import Claim
from allostasis.analysis.claims import across_models as models_in_general
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.provenance import Commands, commands, provenance
from allostasis.analysis.tables import Table, exploratory
from allostasis.analysis.verdicts import Result, Word, judge
from allostasis.analysis.wording import Block, blocks
from allostasis.core import help as front_pages
from allostasis.core.records import RunRecord

EXPERIMENTS = "allostasis.experiments."
WORDS: tuple[Word, ...] = get_args(Word)
Looks = Mapping[str, Mapping[str, Sequence[int]]]
ALWAYS_COUNTED = 4  # of WORDS; a verdict that counts as nothing is told where there is one


@dataclass(frozen=True)
class Extension:
    """What an experiment adds to its report.

    Attributes:
        folder: The experiment's package, which holds its claims.
        claims: Its claims.
        figures: Makes figures of the arms shown.
        tables: Makes tables of them.
        cells: Makes figures of all arms, several of one condition included.
        artefacts: Writes files of its own from the runs into a folder; its last argument is whether
            runs may differ that are compared.
        question: What it asks, in a line.
        design: How, and what would refute it: paragraphs.
    """

    folder: Path
    claims: list[Claim]
    figures: Callable[[Sequence[Arm]], list[Figure]] | None = None
    tables: Callable[[Sequence[Arm]], list[Table]] | None = None
    cells: Callable[[Sequence[Arm]], list[Figure]] | None = None
    artefacts: Callable[[Sequence[RunRecord], Path, bool], list[Path]] | None = None
    question: str = ""
    design: tuple[str, ...] = ()


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
        results: One a claim.
        blocks: The results in words.
        figures: Drawn.
        tables: The experiment's, then the exploratory one.
        checks: Controls and nulls, power, instrument gates.
        warnings: What is missing before anything can be decided; arms that came out as one.
        provenance: Labels and texts.
        commands: What reproduces it.
        metrics: What each recorded metric is, by name.
        subject: The pretrained model that it is about; empty where each run trains its own.
        question: What it asks.
        design: How, in paragraphs.
    """

    exp: str
    arms: list[Arm]
    results: list[Result]
    blocks: list[Block]
    figures: list[Drawn]
    tables: list[Table]
    checks: list[Table]
    warnings: list[str]
    provenance: list[tuple[str, str]]
    commands: list[Commands]
    metrics: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    subject: str = ""
    question: str = ""
    design: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its heading."""
        return title(self.exp, self.subject)

    @property
    def anchor(self) -> str:
        """Its name in addresses and folders."""
        return anchor(self.title)

    @property
    def verdicts(self) -> dict[str, int]:
        """How many claims got each verdict."""
        found = Counter(result.verdict.word for result in self.results)
        return {word: found[word] for word in WORDS}

    @property
    def counts(self) -> str:
        """The same in words."""
        told = list(self.verdicts.items())
        told = told[:ALWAYS_COUNTED] + [pair for pair in told[ALWAYS_COUNTED:] if pair[1]]
        return ", ".join(f"{n} {word}" for word, n in told) + f" of {len(self.results)}"

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


def title(exp: str, subject: str) -> str:
    """What a study is called: its experiment and, where it is about one, the pretrained model."""
    return f"{exp}: {subject}" if subject else exp


def anchor(title: str) -> str:
    """A study's name in addresses and folders.

    Example:
        >>> anchor("ioi: SmolLM2-135M (Q4_1)")
        'ioi-smollm2-135m-q4-1'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def study(
    exp: str,
    runs: Sequence[RunView],
    extension: Extension,
    *,
    subject: str = "",
    looks: Looks | None = None,
) -> Study:
    """Judge an experiment's claims on its runs and draw its figures.

    Args:
        exp: The experiment.
        runs: Its runs; of one model, where the model is not trained.
        extension: What the experiment adds.
        subject: That model.
        looks: Numbers of units at which earlier reports judged each claim, by study's title.
    """
    every = arms(runs)
    results = judge(extension.claims, every, (looks or {}).get(title(exp, subject)))
    there = one_a_condition(every)
    tables: list[Table] = []
    if there:
        tables = extension.tables(there) if extension.tables is not None else []
        tables = [*tables, exploratory(there)]
    drawn = [_drawn(figure) for figure in figures(every, extension)]
    if extension.claims:
        forest = Figure(
            "forest", "Claims with an estimate",
            "Grey: what is claimed. Dashed: the bound. Dotted: where a claim is refuted, if not at "
            "its bound. Bar: the interval. Each row has its own scale; verdicts are drawn alike.",
            lambda: outcomes.forest(results),
        )  # fmt: skip
        drawn.insert(0, _drawn(forest))
    return Study(
        exp=exp,
        arms=every,
        results=results,
        blocks=blocks(results, every),
        figures=drawn,
        tables=tables,
        checks=checks.tables(results, every, runs),
        warnings=[
            *sorted({r.gate for r in runs if r.gate}),
            *filter(None, starmap(equal_weights, combinations(there, 2))),
            *checks.few_units(results),
        ],
        provenance=provenance(runs, extension.claims, extension.folder),
        commands=commands(runs),
        metrics=_metrics(runs),
        subject=subject,
        question=extension.question,
        design=extension.design,
    )


def across_models(
    exp: str, runs: Sequence[RunView], extension: Extension, *, looks: Looks | None = None
) -> tuple[Extension, Study | None]:
    """Judge an experiment's claims about models in general, on the runs of all models.

    Args:
        exp: The experiment.
        runs: Its runs, of whatever models.
        extension: What the experiment adds.
        looks: As for `study`.

    Returns:
        The extension without these claims, for the studies of single models, and theirs, which has
        no figures; None where there is no such claim.
    """
    general = models_in_general(extension.claims)
    if not general:
        return extension, None
    own = [claim for claim in extension.claims if claim.id in general]
    others = [claim for claim in extension.claims if claim.id not in general]
    bare = Extension(extension.folder, own, question=extension.question)
    return replace(extension, claims=others), study(
        exp, runs, bare, subject="all models", looks=looks
    )


def figures(every: Sequence[Arm], extension: Extension) -> list[Figure]:
    """An experiment's figures of its runs, in the report's order; none where no run is finished."""
    there = one_a_condition(every)
    if not there:
        return []
    made = extension.figures(there) if extension.figures is not None else []
    return made + (extension.cells(every) if extension.cells is not None else [])


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


def by_subject(views: Sequence[RunView]) -> Iterator[tuple[str, str, list[RunView]]]:
    """Runs by experiment and, where it takes a pretrained model, by that model.

    Yields:
        Experiment, model in words, and runs.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[RunView]] = {}
    for view in views:
        groups.setdefault((view.exp, view.subject), []).append(view)
    for exp, subject in list(groups):
        named = [other for other in groups if other[0] == exp and other[1]]
        if not subject and len(named) == 1:  # runs that failed before they had a model
            groups[named[0]] += groups.pop((exp, subject))
    titles = [(exp, group[0].title) for (exp, _), group in groups.items()]
    for (exp, subject), group in groups.items():
        title = group[0].title if subject else ""
        is_shared = titles.count((exp, title)) > 1
        yield exp, ", ".join([title, *subject[1:]]) if is_shared else title, group


def extension(exp: str, views: Sequence[RunView]) -> Extension:
    """An experiment's claims, figures and tables: beside the module that its config names.

    Args:
        exp: The experiment.
        views: Runs, some of them of this experiment.

    Raises:
        ClaimError: Its claims cannot be read.
    """
    record = next(view.record for view in views if view.exp == exp)
    target = str(record.config["module"]["_target_"])
    package = target.rpartition(".")[0].rpartition(".")[0]
    found = package.startswith(EXPERIMENTS) and importlib.util.find_spec(package)
    if not found or not found.submodule_search_locations:
        return Extension(Path(), [])
    folder = Path(found.submodule_search_locations[0])
    registered = claim_files.load(folder, exp)
    first, *design = (inspect.getdoc(importlib.import_module(package)) or "").split("\n\n")
    told = {
        "question": questions().get(exp, " ".join(first.split())),
        "design": tuple(" ".join(paragraph.split()) for paragraph in design),
    }
    if importlib.util.find_spec(f"{package}.report") is None:
        return Extension(folder, registered, **told)
    module = importlib.import_module(f"{package}.report")
    more = {name: getattr(module, name, None) for name in ("cells", "artefacts")}
    return Extension(folder, registered, module.figures, module.tables, **more, **told)


@cache
def questions() -> dict[str, str]:
    """What each experiment on disk asks, from its front page."""
    return {experiment.name: experiment.question for experiment in front_pages.experiments()}
