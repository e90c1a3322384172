"""What a family of questions offers: rows without a number, in blocks that are balanced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Length = Callable[[str], int]


@dataclass(frozen=True)
class Draft:
    """A row that may become a `Probe`; see there for the fields."""

    family: str
    template: str
    cell: str
    group: str
    clean: str
    corrupt: str
    target: str
    foil: str

    @property
    def form(self) -> tuple[str, str, str]:
        """What prompts have to share, beside their length, for their mean to stand for one."""
        return self.family, self.template, self.cell


Block = tuple[Draft, ...]
"""Rows of one group in which every word is as often target as foil."""

Family = Callable[[int, Length], Iterator[Block]]
"""From a seed and the number of tokens of a word, blocks in the order in which to take them."""


def pair_name(first: str, second: str) -> str:
    """A group's name: the pair, whatever its order.

    Example:
        >>> pair_name("Tom", "Anna")
        'Anna|Tom'
    """
    return "|".join(sorted((first, second)))
