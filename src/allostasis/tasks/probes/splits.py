"""Half of a corpus to choose on, a tenth to see what a model can do, the rest to measure on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from allostasis.tasks.probes.encoded import SPLITS, Split
from allostasis.tasks.probes.order import rank
from allostasis.tasks.probes.rows import Probe

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
        groups[row.group or row.id].append(row)
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
