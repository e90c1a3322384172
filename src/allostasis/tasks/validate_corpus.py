"""Counts what is wrong with corpora of probes, and writes corpus_audit.json beside the first."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allostasis.tasks.probes.audit import audit, faults
from allostasis.tasks.probes.encoded import Asker
from allostasis.tasks.probes.rows import read
from allostasis.tasks.probes.splits import read_splits, split_path
from allostasis.tasks.probes.tokenizers import named

EXAMPLES = """
  python -m allostasis.tasks.validate_corpus data/*.jsonl
  python -m allostasis.tasks.validate_corpus data/*.jsonl --model smollm2 --strict
"""


def main(argv: list[str] | None = None) -> int:
    """Audit every file; 1 if a file cannot be read, or is faulty and `--strict` was said."""
    parser = argparse.ArgumentParser(
        prog="python -m allostasis.tasks.validate_corpus",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines")
    parser.add_argument("--model", help="count by its tokenizer too: model=, owner/name or folder")
    parser.add_argument("--strict", action="store_true", help="exit 1 on any fault")
    words = parser.parse_args(argv)
    try:
        asker = named(words.model).asker if words.model is not None else None
        audits = {path.stem: validate(path, asker) for path in words.files}
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    text = json.dumps({"model": words.model, "corpora": audits}, indent=1) + "\n"
    place = words.files[0].with_name("corpus_audit.json")
    place.write_text(text, encoding="utf-8", newline="\n")
    found = {name: faults(one) for name, one in audits.items()}
    for name, one in audits.items():
        print(_told(name, one, found[name]))
    print(f"written to {place}")
    return int(words.strict and any(found.values()))


def validate(path: Path, asker: Asker | None) -> dict[str, Any]:
    """The audit of one file, with the splits that lie beside it.

    Raises:
        ValueError: The file holds no rows, or no rows of a corpus.
    """
    rows = read(path)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    if not split_path(path).is_file():
        return audit(rows, None, asker, hash_ok=None)
    try:
        splits = read_splits(path, rows)
    except ValueError as error:
        print(error, file=sys.stderr)
        return audit(rows, None, asker, hash_ok=False)
    return audit(rows, splits, asker, hash_ok=True)


def _told(name: str, found: Mapping[str, Any], wrong: list[str]) -> str:
    """One file's counts, as a column of lines."""
    lines = [f"{name}"]
    for key, value in found.items():
        if key == "shortcut_accuracy":
            value = ", ".join(f"{shortcut} {share:.2f}" for shortcut, share in value.items())
        if key != "families":
            lines.append(f"  {key:22} {'not measured' if value is None else value}")
    lines += [f"  FAULT: {fault}" for fault in wrong] or ["  no fault"]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
