"""Half of a corpus to choose on, a tenth to see what a model can do, the rest to measure on."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allostasis.tasks.probes.encoded import SPLITS, Split
from allostasis.tasks.probes.order import rank
from allostasis.tasks.probes.rows import HASH_RULE, Probe, data_hash, records, row_hash

SHARES: Mapping[Split, float] = {"train": 0.5, "val": 0.1, "test": 0.4}
SEED = 0
"""Of the splits: a run's seed draws from a split and moves no row to another."""


def assign(rows: Sequence[Probe], *, seed: int = SEED) -> dict[str, Split]:
    """A split for every row by its id: whole groups, each cell in the same shares.

    Groups come in hashed order, the largest first, and each goes where the rows of its cells are
    furthest below their shares.

    Args:
        rows: The corpus.
        seed: Of the order of the groups.
    """
    groups: dict[str, list[Probe]] = defaultdict(list)
    for row in rows:
        groups[row.cluster].append(row)
    sizes = Counter(row.cell for row in rows)
    held: Counter[tuple[Split, str | None]] = Counter()
    total: Counter[Split] = Counter()
    found: dict[str, Split] = {}

    def gain(split: Split, cells: Counter[str | None]) -> float:
        """How much nearer the shares come, over cells and in all, if these go there."""
        share, count = SHARES[split], sum(cells.values())
        near = sum(
            _closer(held[split, cell], n, share * sizes[cell]) / sizes[cell]
            for cell, n in cells.items()
        )
        return near / share + _closer(total[split], count, share * len(rows)) / (share * len(rows))

    for group in sorted(groups, key=lambda name: (-len(groups[name]), rank(seed, name))):
        cells = Counter(row.cell for row in groups[group])
        best = max(SPLITS, key=lambda split: gain(split, cells))
        for row in groups[group]:
            found[row.id] = best
        total[best] += len(groups[group])
        for cell, n in cells.items():
            held[best, cell] += n
    return found


def _closer(held: int, added: int, wanted: float) -> float:
    """By how much `added` brings `held` nearer to `wanted`, squared distances."""
    return (held - wanted) ** 2 - (held + added - wanted) ** 2


def split_path(corpus: Path) -> Path:
    """Where the splits of a corpus lie: beside it."""
    return corpus.with_suffix(".split.json")


def write_splits(
    corpus: Path, rows: Sequence[Probe], splits: Mapping[str, Split], *, seed: int = SEED
) -> None:
    """Write the splits of a corpus that lies on disk, with its hash and each row's."""
    held = records(corpus)
    content: dict[str, Any] = {
        "seed": seed,
        "data_hash": data_hash(held),
        "hash_rule": HASH_RULE,
        **{name: [row.id for row in rows if splits[row.id] == name] for name in SPLITS},
        "row_hashes": {row.id: row_hash(record) for row, record in zip(rows, held, strict=True)},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    split_path(corpus).write_text(text, encoding="utf-8", newline="\n")


def read_splits(corpus: Path, rows: Sequence[Probe]) -> dict[str, Split]:
    """The splits that lie beside a corpus.

    Raises:
        ValueError: The corpus is not the one that was split; says which row is the first to differ.
    """
    path = split_path(corpus)
    content = json.loads(path.read_text(encoding="utf-8"))
    got, expected = data_hash(records(corpus)), content["data_hash"]
    if content["hash_rule"] != HASH_RULE:
        raise ValueError(f"{path} is hashed by '{content['hash_rule']}', not by {HASH_RULE}")
    if got != expected:
        raise ValueError(
            f"{corpus} is not what {path.name} was made for: expected {expected}, got {got}; "
            f"{_first_difference(corpus, rows, content.get('row_hashes', {}))}. Restore the file, "
            f"or delete {path.name} to have it split anew"
        )
    found: dict[str, Split] = {id_: name for name in SPLITS for id_ in content[name]}
    if absent := [row.id for row in rows if row.id not in found]:
        raise ValueError(f"{path} does not say in which split row {absent[0]} is")
    return found


def _first_difference(corpus: Path, rows: Sequence[Probe], hashes: Mapping[str, str]) -> str:
    for row, record in zip(rows, records(corpus), strict=True):
        if hashes.get(row.id) != row_hash(record):
            return f"the first row that differs is {row.id}"
    if missing := [id_ for id_ in hashes if id_ not in {row.id for row in rows}]:
        return f"row {missing[0]} is missing"
    return "the rows are the same in another order"
