"""What a family of questions offers: rows without a number, in blocks that are balanced."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from allostasis.tasks.probes.order import hashed

Length = Callable[[str], int]

MOST_PAIRS = 120
"""Pairs of words that a family offers; each is asked in several ways."""


@dataclass(frozen=True, kw_only=True)
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


Block = tuple[Draft, ...]
"""Rows of one group in which every word is as often target as foil, and as often comes first."""

Family = Callable[[Length], Iterator[Block]]
"""From the number of tokens of a word, blocks in the order in which to take them."""


def known(words: Iterable[str], length: Length) -> list[str]:
    """The words that a vocabulary has."""
    return [word for word in words if length(word) > 0]


def answers(words: Iterable[str], length: Length) -> list[str]:
    """The words that are one token, as an answer has to be."""
    return [word for word in words if length(word) == 1]


def answered(facts: Mapping[str, str], length: Length) -> dict[str, str]:
    """The facts about things that a vocabulary has, with answers of one token."""
    return {x: facts[x] for x in known(facts, length) if length(facts[x]) == 1}


def group(first: str, second: str) -> str:
    """A group's name: the pair, whatever its order.

    Example:
        >>> group("Tom", "Anna")
        'Anna|Tom'
    """
    return "|".join(sorted((first, second)))


def cell(family: str, **levels: str) -> str:
    """A cell's name: the levels of the crossed factors in a family.

    Example:
        >>> cell("either", fact="denied", query="with")
        'either:fact=denied,query=with'
    """
    return f"{family}:" + ",".join(f"{name}={level}" for name, level in levels.items())


def pairs(words: Sequence[str], *salt: object) -> list[tuple[str, str]]:
    """Pairs of words in alphabetical order; the first in the hashed order."""
    return hashed(itertools.combinations(sorted(words), 2), *salt)[:MOST_PAIRS]
