"""WordNet 3.0's nouns as one table: what each synset is called, means, and is a kind of."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FILE = "wordnet30.parquet"
SHA256 = "49deb062cc68fef68eae471816575f662d06cb1ccbda6a7e55a5def739cb19b2"
SCHEMA = pa.schema([
    ("offset", pa.int32()),
    ("lemmas", pa.list_(pa.string())),
    ("gloss", pa.string()),
    ("examples", pa.list_(pa.string())),
    ("hypernyms", pa.list_(pa.int32())),
    ("lexfile", pa.int8()),
])
"""offset: the synset's number. lemmas: words joined by `_`. gloss: its definition. examples:
sentences. hypernyms: the synsets that it is a kind or an instance of. lexfile: lexicographer file.
"""
IS_A = {"@", "@i"}  # pointers to hypernyms, and of instances


class DataError(RuntimeError):
    """The shipped table is not the one that this version of the package was made with."""


@lru_cache(maxsize=1)
def load() -> pa.Table:
    """The table that ships with the package, its hash checked.

    Returns:
        82,115 rows of `SCHEMA`, in order of offset.

    Raises:
        DataError: The file is not the one that this version was made with.

    Source:
        Princeton University (2006), WordNet 3.0; licence in data/wordnet30.LICENSE.txt.

    Example:
        >>> load().num_rows
        82115
    """
    content = (files("allostasis") / "data" / FILE).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise DataError(
            f"{FILE} has SHA-256 {found}, expected {SHA256}: the file was changed or cut short. "
            "Install the package again, or make the table with python -m allostasis.core.wordnet"
        )
    return pq.read_table(pa.BufferReader(content), schema=SCHEMA)


class Nouns:
    """Noun synsets as a graph of what is a kind, or an instance, of what.

    Args:
        table: Rows of `SCHEMA`.

    Attributes:
        lemmas: What each synset is called, by offset.
        hypernyms: What each is a kind of, by offset.
    """

    def __init__(self, table: pa.Table) -> None:
        offsets = table.column("offset").to_pylist()
        self.lemmas: dict[int, list[str]] = dict(
            zip(offsets, table.column("lemmas").to_pylist(), strict=True)
        )
        self.hypernyms: dict[int, list[int]] = dict(
            zip(offsets, table.column("hypernyms").to_pylist(), strict=True)
        )
        self._above: dict[int, dict[int, int]] = {}

    def ancestors(self, offset: int) -> dict[int, int]:
        """Everything that a synset is a kind of, with the least number of steps to it.

        Example:
            >>> table = pa.table({"offset": [1, 2, 3], "lemmas": [["a"], ["b"], ["c"]],
            ...                   "hypernyms": [[], [1], [2, 1]]})
            >>> Nouns(table).ancestors(3)
            {2: 1, 1: 1}
        """
        if offset not in self._above:
            found: dict[int, int] = {}
            for hypernym in self.hypernyms[offset]:
                found[hypernym] = 1
                for above, steps in self.ancestors(hypernym).items():
                    found[above] = min(found.get(above, steps + 1), steps + 1)
            self._above[offset] = found
        return self._above[offset]


@lru_cache(maxsize=1)
def nouns() -> Nouns:
    """The shipped table as a graph."""
    return Nouns(load())


def build(lines: Sequence[str]) -> pa.Table:
    """The table from the lines of WordNet's own `data.noun`.

    Args:
        lines: Of the file, its licence at the top included.

    Example:
        >>> line = '00000001 03 n 01 cat 0 001 @ 00000002 n 0000 | a feline; "the cat sat"'
        >>> build([line]).to_pylist()[0]["examples"]
        ['the cat sat']
    """
    rows = [_row(line) for line in lines if not line.startswith("  ")]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _row(line: str) -> dict[str, object]:
    """One synset: offset, lexfile, type, words in hexadecimal count, pointers, gloss."""
    data, _, text = line.partition(" | ")
    fields = data.split()
    n_words = int(fields[3], 16)
    lemmas = fields[4 : 4 + 2 * n_words : 2]
    begin = 5 + 2 * n_words
    n_pointers = int(fields[begin - 1])
    pointers = [fields[begin + 4 * i : begin + 4 * i + 2] for i in range(n_pointers)]
    definition, _, _ = text.partition('"')
    return {
        "offset": int(fields[0]),
        "lemmas": lemmas,
        "gloss": definition.strip(" ;\n"),
        "examples": [said.strip() for said in re.findall(r'"([^"]*)"', text)],
        "hypernyms": [int(offset) for symbol, offset in pointers if symbol in IS_A],
        "lexfile": int(fields[1]),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Make the table from `data.noun` of WordNet 3.0."""
    parser = argparse.ArgumentParser(prog="python -m allostasis.core.wordnet", description=__doc__)
    parser.add_argument("source", type=Path, help="data.noun of WordNet 3.0")
    parser.add_argument("target", type=Path, help=f"where {FILE} shall be")
    given = parser.parse_args(words)
    table = build(given.source.read_text(encoding="utf-8").splitlines())
    pq.write_table(table, given.target, compression="zstd", compression_level=19)
    digest = hashlib.sha256(given.target.read_bytes()).hexdigest()
    parser.exit(0, f"{table.num_rows} synsets, SHA-256 {digest}\n")


if __name__ == "__main__":
    raise SystemExit(main())
