"""Texts as documents: where they come from, and which split each of them is in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from allostasis.core import wordnet
from allostasis.tasks.text import Text

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES: Mapping[Split, float] = {"train": 0.9, "val": 0.05, "test": 0.05}

GLOSSES = "wordnet_glosses"
"""The corpus that ships with the package."""

PASSAGE = 128
"""Tokens that a passage of the glosses holds at least."""


def split_of(text: str) -> Split:
    """The split of a document: a function of its text alone.

    What trains an autoencoder is `train`; prompts of a teacher and of any evaluation are not.

    Example:
        >>> split_of("a feline; the cat sat")
        'train'
    """
    at, reached = int.from_bytes(_digest(text)[:8], "big") / 2**64, 0.0
    for split, share in SHARES.items():
        reached += share
        if at < reached:
            return split
    return SPLITS[-1]


def documents(corpus: str) -> Iterator[str]:
    """A corpus, document by document, in an order that is its own.

    Args:
        corpus: `wordnet_glosses`; a text file, whose documents are parted by empty lines; a Parquet
            file with a column `text`; a folder of such files, read in order of their names; or
            `hub:owner/name`, optionally `hub:owner/name:config`, streamed from its split `train`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no text.
    """
    if corpus == GLOSSES:
        yield from Text(seed=0, n_tokens=PASSAGE).passages()
        return
    if corpus.startswith("hub:"):
        yield from _hub(corpus.removeprefix("hub:"))
        return
    path = Path(corpus).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"corpus='{corpus}': there is no such file. A corpus is {GLOSSES}, a .txt or .parquet "
            "file, a folder of them, or hub:owner/name"
        )
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix == ".parquet":
            yield from _parquet(file)
        elif file.suffix == ".txt":
            yield from _plain(file)


def corpus_sha256(corpus: str) -> str | None:
    """What tells a corpus from another of its name; None for the hub's, which is streamed.

    Example:
        >>> corpus_sha256("wordnet_glosses") == wordnet.SHA256
        True
    """
    if corpus == GLOSSES:
        return wordnet.SHA256
    if corpus.startswith("hub:"):
        return None
    path = Path(corpus).expanduser()
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _plain(file: Path) -> Iterator[str]:
    lines: list[str] = []
    with file.open(encoding="utf-8") as opened:
        for line in opened:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).strip()
                lines = []
    if lines:
        yield "".join(lines).strip()


def _parquet(file: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file)
    if "text" not in table.schema_arrow.names:
        raise ValueError(
            f"{file} has no column 'text'; it has {', '.join(table.schema_arrow.names)}"
        )
    for batch in table.iter_batches(columns=["text"]):
        yield from (text for text in batch.column("text").to_pylist() if text)


def _hub(name: str) -> Iterator[str]:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    stream = load_dataset(repository, config or None, split="train", streaming=True)
    for row in cast(Iterator[dict[str, Any]], stream):
        if row["text"]:
            yield row["text"]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
