"""Sequences split by their own content, so that what one split shows no other has seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from allostasis.tasks.sequences import Sequences

Split = Literal["calibrate", "select", "measure"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES: Mapping[Split, float] = {"calibrate": 0.25, "select": 0.375, "measure": 0.375}
"""calibrate: values that are put in a head's place. select: which heads are suppressors. measure:
what is reported of them."""


def split_of(tokens: Int64[Tensor, " token"]) -> Split:
    """The split of a sequence: a function of its tokens alone.

    Example:
        >>> split_of(torch.arange(4))
        'measure'
    """
    digest = hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).digest()
    at, reached = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for split, share in SHARES.items():
        reached += share
        if at < reached:
            return split
    return SPLITS[-1]


def quotas(n_sequences: int) -> dict[Split, int]:
    """How many of some sequences each split gets; at least two.

    Raises:
        ValueError: There are too few for all.

    Example:
        >>> quotas(512)
        {'calibrate': 128, 'select': 192, 'measure': 192}
    """
    found: dict[Split, int] = {split: int(share * n_sequences) for split, share in SHARES.items()}
    if min(found.values()) < 2:
        raise ValueError(
            f"n_sequences={n_sequences} leaves a split with fewer than two; take at least 8"
        )
    return found


def divide(items: Iterable[Int64[Tensor, " token"]], n_sequences: int) -> dict[Split, list[int]]:
    """Take sequences in order until every split has its quota.

    Args:
        items: Sequences of one length; one that repeats is taken once.
        n_sequences: How many in all.

    Returns:
        Which of the items each split has.

    Raises:
        ValueError: The items end before every split is full.
    """
    wanted = quotas(n_sequences)
    seen: set[tuple[int, ...]] = set()
    found: dict[Split, list[int]] = {split: [] for split in SPLITS}
    for index, tokens in enumerate(items):
        split, key = split_of(tokens), tuple(tokens.tolist())
        if key in seen or len(found[split]) == wanted[split]:
            continue
        seen.add(key)
        found[split].append(index)
        if all(len(found[name]) == wanted[name] for name in SPLITS):
            return found
    counts = ", ".join(f"{name} {len(found[name])} of {wanted[name]}" for name in SPLITS)
    raise ValueError(f"there are too few sequences for n_sequences={n_sequences}: {counts}")


def next_tokens(tokens: Int64[Tensor, "sequence token"]) -> Sequences:
    """Sequences in which every position but the last is asked for the next token."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return Sequences(inputs, targets, torch.ones_like(inputs, dtype=torch.bool))
