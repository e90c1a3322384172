"""Sets of heads of one layer: exact null, interactions, what restoring one of them brings back.

v(S) is the change of the logit difference with the heads of S taken away; v of none is 0. Values
may be arrays, one entry a prompt: all that is done here is linear.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

Head = tuple[int, int]
Set = tuple[Head, ...]
T = TypeVar("T", float, np.ndarray)

SIZES = (1, 2, 3)


def lattice(heads: Sequence[Head], sizes: Sequence[int] = SIZES) -> list[Set]:
    """All sets of these sizes, each sorted, in the order of sizes.

    Example:
        >>> len(lattice([(0, head) for head in range(9)]))
        129
    """
    return [some for size in sizes for some in itertools.combinations(sorted(heads), size)]


def null_of(chosen: Set, sets: Sequence[Set]) -> list[Set]:
    """The sets that a set is ranked among: all of its size that lie in its layers, head for head.

    Never other sizes, never other layers, never sums of smaller sets. The set itself is one.

    Raises:
        ValueError: Not all of them were measured, so that the rank would not be exact.
    """
    layers = sorted(layer for layer, _ in chosen)
    found = [some for some in sets if sorted(layer for layer, _ in some) == layers]
    if chosen not in found:
        raise ValueError(f"the set {name_of(chosen)} was not measured")
    return found


def name_of(heads: Set) -> str:
    """A set as keys have it: `0.2+0.4`."""
    return "+".join(f"{layer}.{head}" for layer, head in sorted(heads))


def rank(value: float, null: Sequence[float]) -> float:
    """Exact one-sided p: the share of a null that is at least as large, ties counted half.

    The null holds the value itself, which counts as one of its own: p = 1 / n for the largest.

    Example:
        >>> rank(3.0, [1.0, 2.0, 3.0, 3.0])
        0.375
    """
    others = np.asarray(null, dtype=float)
    above, ties = int((others > value).sum()), int((others == value).sum())
    if not ties:
        raise ValueError("a null holds the value that is ranked in it")
    return (above + (ties - 1) / 2 + 1) / len(others)


def interaction(v: Mapping[Set, T], heads: Set) -> T:
    """What a set does beyond its parts: the Moebius inverse of v at it.

    I(S) = sum over T in S of (-1)^(|S| - |T|) v(T); for a pair v(ab) - v(a) - v(b), above 0: its
    heads do more together than one by one.

    Args:
        v: Effects of the set and of all sets in it.
        heads: The set.

    Example:
        >>> a, b = (0, 1), (0, 2)
        >>> interaction({(a,): 1.0, (b,): 2.0, (a, b): 4.0}, (a, b))
        1.0
    """
    terms = (v[part] if (len(heads) - len(part)) % 2 == 0 else -v[part] for part in parts_of(heads))
    first = next(terms)
    for term in terms:
        first = first + term
    return first


def parts_of(heads: Set) -> Iterator[Set]:
    """All sets of one head or more in a set, itself the last."""
    ordered = tuple(sorted(heads))
    for size in range(1, len(ordered) + 1):
        yield from itertools.combinations(ordered, size)


def without(heads: Set, head: Head) -> Set:
    """A set less one head."""
    return tuple(other for other in heads if other != head)


def recovery(v: Mapping[Set, T], heads: Set, restored: Head) -> tuple[T, T]:
    """What restoring one head brings back, as numerator and denominator.

    recovery = (v(S - a) - v(S)) / (0 - v(S)): 1 where that head alone undoes the effect of the set.
    Within a layer, S taken away and a put back is S - a taken away, by algebra: a difference of two
    sets and no mediation through another layer.

    Args:
        v: Effects of the set and of the set less the head, which is 0 where nothing is left.
        heads: The set that is taken away.
        restored: Which of its heads is put back.
    """
    whole, rest = v[heads], without(heads, restored)
    left = v[rest] if rest else whole * 0
    return left - whole, whole * 0 - whole
