"""Rows of a probe corpus, as they lie on disk, and the hash that tells one corpus from another."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

Corpus = Literal["facts", "negation", "counterfactual", "logical"]
CORPORA: tuple[Corpus, ...] = ("facts", "negation", "counterfactual", "logical")
NEEDED = ("clean", "corrupt", "target", "foil")
HASH_RULE = "sha256-canonical-v1"


@dataclass(frozen=True)
class Probe:
    """One row.

    Attributes:
        id: Unlike any other row's of the corpus.
        corpus: Name of the corpus.
        family: What kind of question it is; None in files that do not say.
        template: Which paraphrase of it, and how it is corrupted where there are two ways.
        cell: Levels of the crossed factors, such as `either:fact=denied,query=with`.
        group: What rows share that are not independent: the pair of entities. Never in two splits.
        clean: The prompt after which the target is right.
        corrupt: The prompt after which the foil is right.
        target: The right answer, with its leading space.
        foil: The wrong one, likewise.
    """

    id: str
    corpus: str | None
    family: str | None
    template: str | None
    cell: str | None
    group: str | None
    clean: str
    corrupt: str
    target: str
    foil: str

    @property
    def cluster(self) -> str:
        """The group; in files that name none, the clean prompt: equal prompts stay together."""
        return self.clean if self.group is None else self.group

    @property
    def recent(self) -> Literal["target", "foil"] | None:
        """Which answer the clean prompt mentions last; None if it mentions neither."""
        target, foil = (last_mention(self.clean, word) for word in (self.target, self.foil))
        if target == foil:
            return None
        return "target" if target > foil else "foil"


COLUMNS = tuple(field.name for field in fields(Probe))


def mentions(text: str, answer: str) -> list[int]:
    """Where a text has an answer as a word of its own.

    Example:
        >>> mentions("Tom has a tom-tom. Tomorrow Tom", " Tom")
        [0, 28]
    """
    return [
        found.start() for found in re.finditer(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", text)
    ]


def last_mention(text: str, answer: str) -> int:
    """Where a text has an answer for the last time; -1 if it does not have it."""
    return max(mentions(text, answer), default=-1)


def write(path: Path, rows: Iterable[Probe]) -> None:
    """Write rows as JSON lines: UTF-8, LF, keys in the order of `Probe`."""
    lines = (json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def read(path: Path) -> list[Probe]:
    """Rows of a JSON-lines file; one that has only `clean, corrupt, target, foil` is a corpus too.

    Raises:
        ValueError: A line is no object, lacks a field, has an unknown one, or repeats an id.
    """
    rows = [
        _row(record, corpus=path.stem.partition("__")[0], number=number, path=path)
        for number, record in enumerate(records(path))
    ]
    if repeated := [id_ for id_, count in Counter(row.id for row in rows).items() if count > 1]:
        raise ValueError(f"{path}: the id '{repeated[0]}' stands in more than one row")
    return rows


def records(path: Path) -> list[Any]:
    """What each line of a JSON-lines file holds, whatever its line ends and byte order mark."""
    text = path.read_text(encoding="utf-8-sig")
    return [json.loads(line) for line in re.split(r"\r\n|\n|\r", text) if line.strip()]


def _row(record: Any, *, corpus: str, number: int, path: Path) -> Probe:
    where = f"{path}, row {number + 1}"
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no JSON object")
    if unknown := [key for key in record if key not in COLUMNS]:
        raise ValueError(f"{where} has a field '{unknown[0]}'; known are {', '.join(COLUMNS)}")
    if absent := [key for key in NEEDED if not isinstance(record.get(key), str)]:
        raise ValueError(f"{where} has no text in '{absent[0]}'")
    given = dict.fromkeys(COLUMNS) | {"id": f"{corpus}-{number:04d}", "corpus": corpus} | record
    return Probe(**{key: _nfc(value) for key, value in given.items()})


def _nfc(value: Any) -> Any:
    return unicodedata.normalize("NFC", value) if isinstance(value, str) else value


def canonical(record: Mapping[str, Any]) -> str:
    """A record as text that neither key order nor Unicode form changes."""
    normal = {_nfc(key): _nfc(value) for key, value in record.items()}
    return json.dumps(normal, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def data_hash(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over canonical records, the same for LF and CRLF checkouts."""
    return hashlib.sha256("\n".join(map(canonical, rows)).encode()).hexdigest()


def row_hash(record: Mapping[str, Any]) -> str:
    """The first 16 hex digits of one record's SHA-256: what a split file knows each row by."""
    return hashlib.sha256(canonical(record).encode()).hexdigest()[:16]
