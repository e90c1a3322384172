"""Orders and draws that look random and are the same everywhere: SHA-256 of what is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def rank(*parts: object) -> str:
    """The place of something in the hashed order, from what it is called."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def hashed(items: Iterable[T], *salt: object) -> list[T]:
    """The items in an order that depends on them and the salt alone.

    Example:
        >>> hashed(["a", "b", "c"], 0) == hashed(["c", "b", "a"], 0)
        True
    """
    return sorted(items, key=lambda item: rank(*salt, item))


def draw(items: Sequence[T], k: int, *salt: object) -> list[T]:
    """`k` of the items, without replacement, that the salt alone chooses.

    Example:
        >>> sorted(draw("abc", 3, "salt")), draw("abc", 2, "salt") == draw("abc", 3, "salt")[:2]
        (['a', 'b', 'c'], True)
    """
    left, number = list(items), int(rank(*salt), 16)
    found: list[T] = []
    for _ in range(k):
        number, place = divmod(number, len(left))
        found.append(left.pop(place))
    return found
