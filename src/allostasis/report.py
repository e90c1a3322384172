"""The report: figures and verdicts from records, without training anything.

Try:
  python -m allostasis.report outputs/grokking              one experiment
  python -m allostasis.report outputs                       all of them
  python -m allostasis.report RUN --export audit --to DIR   audit.json under the documents' name
  python -m allostasis.report RUN --export lab --to DIR     the head lab's tables in their shapes
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from allostasis.analysis.studies import Study
    from allostasis.analysis.verdicts import Result
    from allostasis.core.records import RunRecord

HEADS = ("claim", "verdict", "estimate and interval", "why undecided")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of each folder; exit status 2 where a folder holds no run."""
    words = _parser().parse_args(argv)
    try:
        for folder in words.folders:
            runs = _runs(folder)
            if words.export == "audit":
                _export(runs, words.to)
            elif words.export == "lab":
                _export_lab(runs, words.to)
            else:
                _report(folder, runs, allow_mixed=words.allow_mixed)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


class UsageError(ValueError):
    """What the user asked for is not there; the message says what is."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allostasis.report",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER",
        help="outputs, one experiment's folder in it, or one run's folder",
    )  # fmt: skip
    parser.add_argument(
        "--export", choices=["audit", "lab"],
        help="write each run's audit.json, or its tables as the lab documents have them, instead",
    )  # fmt: skip
    parser.add_argument(
        "--allow-mixed", action="store_true",
        help="compare conditions whose runs differ in weights, BOS, dtype, settings or commit",
    )  # fmt: skip
    parser.add_argument(
        "--to", type=Path, default=Path(), metavar="DIR", help="where to copy it (default: here)"
    )
    return parser


def _runs(folder: Path) -> list[RunRecord]:
    from allostasis.core.records import read_runs

    if not folder.is_dir():
        there = sorted(p.name for p in folder.parent.iterdir()) if folder.parent.is_dir() else []
        listed = f"{folder.parent} holds: {', '.join(there) or 'nothing'}"
        if not folder.parent.is_dir():
            listed = f"{folder.parent} is not there either"
        raise UsageError(f"{folder} is not a folder. {listed}.")
    runs = read_runs(folder)
    if not runs:
        there = sorted(p.name for p in folder.iterdir())
        raise UsageError(
            f"{folder} holds no run: no run.json lies in or below it. "
            f"It holds: {', '.join(there) or 'nothing'}. "
            "A run is made by: python -m allostasis +exp=grokking preset=quick"
        )
    return runs


def _report(folder: Path, records: Sequence[RunRecord], *, allow_mixed: bool) -> None:
    from allostasis.analysis import document, studies
    from allostasis.analysis.aggregate import IdenticalArmsError
    from allostasis.analysis.claims import ClaimError
    from allostasis.analysis.cross_condition import MixedRunsError
    from allostasis.analysis.curves import RunView

    views = [RunView(record) for record in records]
    artefacts: list[Path] = []
    made: list[Study] = []
    extensions: dict[str, studies.Extension] = {}
    refused = ""
    # a study's own folder, beside its runs, keeps the last report
    looks = document.earlier_looks([folder.parent, folder / "report"])
    try:
        for exp, subject, group in studies.by_subject(views):
            if exp not in extensions:
                of_all = [view for view in views if view.exp == exp]
                whole = studies.extension(exp, views)
                extensions[exp], general = studies.across_models(exp, of_all, whole, looks=looks)
                made += [general] if general is not None else []
            extension = extensions[exp]
            study = studies.study(exp, group, extension, subject=subject, looks=looks)
            made.append(study)
            if extension.artefacts is not None:
                own = [view.record for view in group]
                home = folder / "report" / "cross_condition" / study.anchor
                try:
                    artefacts += extension.artefacts(own, home, allow_mixed)
                except MixedRunsError as error:
                    refused = f"{study.title}: no matrices over conditions. {error}"
    except (ClaimError, IdenticalArmsError) as error:
        raise UsageError(str(error)) from error
    about = ", ".join(dict.fromkeys(study.subject for study in made if study.subject))
    title = f"Report on {_name(folder)}{f': {about}' if about else ''}"
    written = document.write(title, made, folder / "report")
    _print(made, [*written, *artefacts])
    if refused:
        raise UsageError(refused)


def _name(folder: Path) -> str:
    """What a folder of runs is called: a recorded study's by the study and its variant."""
    path = folder.resolve()
    path = path.parent if path.name == "runs" else path
    study = next((p for p in (path, *path.parents) if (p / "design.yaml").is_file()), path)
    return path.relative_to(study.parent).as_posix()


def _print(studies: Sequence[Study], written: Sequence[Path]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for study in studies:
        title = escape(f"{study.title}: {study.counts}")
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        rows = [_row(result) for result in study.results]
        widths = [max(map(len, cells)) for cells in zip(HEADS, *rows, strict=True)][:3]
        room = max(12, console.width - sum(widths) - 3 * len(HEADS))
        for head, width in zip(HEADS, [*widths, room], strict=True):
            table.add_column(head, no_wrap=True, width=width)
        for *cells, why in rows:
            table.add_row(*map(escape, cells), escape(textwrap.shorten(why, room, placeholder="…")))
        console.print(table)
    for path in written:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)


def _row(result: Result) -> tuple[str, str, str, str]:
    from allostasis.analysis.text import bracket, number

    word = result.verdict.word
    found = "" if result.inference is None else number(result.inference.estimate)
    found += "" if result.interval is None else f" {bracket(result.interval)}"
    return result.claim.id, word, found, result.verdict.reason if word == "undecided" else ""


def _export_lab(runs: Sequence[RunRecord], folder: Path) -> None:
    """Write each run of the head lab in the shapes of the lab documents."""
    from allostasis.analysis import lab_export

    for record in runs:
        if not str(record.run["exp"]).startswith("heads_"):
            raise UsageError(
                f"{record.folder}: '{record.run['exp']}' is no experiment of the head lab; those "
                "are heads_zero, heads_pairs, heads_patch and heads_ov"
            )
        try:
            written = lab_export.export(record, folder)
        except ValueError as error:
            raise UsageError(str(error)) from error
        for path in written:
            print(path)


def _export(runs: Sequence[RunRecord], folder: Path) -> None:
    """Copy audit.json of each run under the name that the source documents give it."""
    from allostasis.core.audit import LETTERS, file_name

    copies: dict[Path, Path] = {}
    for record in runs:
        if record.run["exp"] not in LETTERS:
            raise UsageError(
                f"{record.folder}: the documents have no log of '{record.run['exp']}'; "
                f"they have {', '.join(LETTERS)}"
            )
        source, target = record.folder / "audit.json", folder / file_name(record.run)
        if not source.is_file():
            raise UsageError(f"{source} is not there: the run is {record.run['status']}")
        if target in copies:
            raise UsageError(
                f"{copies[target].parent} and {record.folder} would both become {target.name}; "
                "export one of them at a time, or into different folders"
            )
        copies[target] = source
    folder.mkdir(parents=True, exist_ok=True)
    for target, source in copies.items():
        shutil.copyfile(source, target)
        print(target)


if __name__ == "__main__":
    raise SystemExit(main())
