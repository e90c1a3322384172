"""Write the lab record's index, experiments/README.md, from what the studies' folders hold.

    python experiments/index.py

The replication checklist: every study with its question, the command that goes on with it, how many
of its runs are finished, and its verdicts. A test fails where the file is not what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from study import settings

from allostasis.analysis import registry
from allostasis.analysis.studies import WORDS
from allostasis.analysis.text import cell, number
from allostasis.core.records import write_atomically

RECORD = Path(__file__).parent
HEAD = """\
# The lab record

Every study that was run or registered, oldest first: the replication checklist. Each folder's
README holds the question, the predictions written before the first run, and what was found;
`design.yaml` is the registered design, `verdicts.json` the verdicts as the report gave them,
`REPORT.md` all of it. Written by `make index`; a test keeps it current.
"""


def index(record: Path = RECORD) -> str:
    """The index as Markdown."""
    folders = [path.parent for path in sorted(record.glob("*/README.md"))]
    parts = [HEAD, _overview(folders), *map(_study, folders), _documents(record)]
    return "\n".join(parts)


def _overview(folders: list[Path]) -> str:
    heads = ["study", "finished runs", *WORDS]
    rows = []
    for folder in folders:
        counts = dict.fromkeys(WORDS, 0)
        for _, claims in _verdicts(folder):
            for claim in claims:
                counts[claim["verdict"]] += 1
        told = list(counts.values()) if any(counts.values()) else [""] * len(counts)
        rows.append([f"[{folder.name}](#{folder.name})", _runs(folder), *map(str, told)])
    return _table(heads, rows)


def _study(folder: Path) -> str:
    text = (folder / "README.md").read_text(encoding="utf-8")
    title = text.partition("\n")[0].removeprefix("# ")
    lines = [f"## {folder.name}", "", f"[{title}]({folder.name}/README.md). {_question(text)}", ""]
    if (folder / "run.sh").is_file():
        lines += [f"    make study NAME={folder.name}", ""]
    lines += [
        f"Finished: {_runs(folder)}." if _runs(folder) else "Timings; it judges no claim.",
        "",
    ]
    for where, claims in _verdicts(folder):
        decided = [claim for claim in claims if claim["verdict"] != "undecided"]
        rows = [
            [claim["id"], cell(claim["text"]), f"**{claim['verdict']}**", _estimate(claim)]
            for claim in decided
        ]
        heads = ["claim", "what was claimed", "verdict", "estimate and interval"]
        lines += [f"{where}: {len(decided)} decided, {len(claims) - len(decided)} undecided."]
        lines += ["", _table(heads, rows)] if rows else [""]
    return "\n".join(lines)


def _documents(record: Path) -> str:
    """The source documents' lines, with what all studies together say of each."""
    lines = ["## The source documents, line by line", ""]
    for document, title in registry.DOCUMENTS.items():
        answers = [a for a in registry.answers(registry.rows(record))
                   if a.criterion.document == document]  # fmt: skip
        rows = [[cell(a.criterion.text), cell(a.words)] for a in answers]
        lines += [f"### {title}", "", _table(["line", "what became of it"], rows)]
    return "\n".join(lines)


def _question(text: str) -> str:
    """The README's question, up to the end of its first sentence."""
    found = re.search(r"\*{0,2}Question[.:]\*{0,2}\s+(.*?[.?])(?=\s|$)", text, flags=re.DOTALL)
    words = " ".join(found[1].split()) if found else ""
    return words[:1].upper() + words[1:]


def _runs(folder: Path) -> str:
    """How many runs of the design are finished; empty where there is no design."""
    path = folder / "design.yaml"
    if not path.is_file():
        return ""
    parts = _parts(yaml.safe_load(path.read_text(encoding="utf-8")))
    planned = sum(
        len(part["seeds"]) * sum(len(settings(words)) for words in part["conditions"].values())
        for part in parts
    )
    asked = {(part["exp"], condition) for part in parts for condition in part["conditions"]}
    runs = [json.loads(run.read_text(encoding="utf-8")) for run in folder.rglob("runs/**/run.json")]
    # runs that others read, such as those of a teacher, lie beside them
    done = sum(run["status"] == "done" and (run["exp"], run["condition"]) in asked for run in runs)
    return f"{done} of {planned} runs"


def _parts(design: dict[str, Any]) -> list[dict[str, Any]]:
    """The design of each variant."""
    variants = design.get("variants", {"": []})
    return [design | (v if isinstance(v, dict) else {}) for v in variants.values()]


def _verdicts(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for path in sorted(folder.rglob("verdicts.json")):
        yield from json.loads(path.read_text(encoding="utf-8")).items()


def _estimate(claim: dict[str, Any]) -> str:
    if claim.get("estimate") is None:
        return f"all of {', '.join(claim['all_of'])}" if claim.get("all_of") else ""
    interval = claim.get("interval") or {}
    ends = f" [{number(interval['low'])}, {number(interval['high'])}]" if interval else ""
    return number(claim["estimate"]) + ends


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    write_atomically(RECORD / "README.md", lambda file: file.write_text(index(), encoding="utf-8"))
