"""An order that looks random and is the same everywhere: by SHA-256, whatever process sorts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
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


def pick(items: Iterable[T], *salt: object) -> T:
    """The first item in the hashed order."""
    return min(items, key=lambda item: rank(*salt, item))
