"""Glosses as sequences, and how sequences are split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allostasis.tasks.splits import SPLITS, divide, quotas, split_of
from allostasis.tasks.text import Text


def _encode(text: str) -> list[int]:
    """One token a word, so that nothing but the task is tested."""
    return [sum(map(ord, word)) for word in text.split()]


def test_sequences_have_one_length_and_splits_share_none() -> None:
    found = Text(seed=0, n_sequences=64, n_tokens=16).build(_encode)
    assert {split: len(batch) for split, batch in found.items()} == quotas(64)
    rows = [tuple(row) for split in SPLITS for row in found[split].tokens.tolist()]
    assert len(set(rows)) == len(rows)
    for batch in found.values():
        assert batch.tokens.shape[1] == 16
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert bool(batch.scored.all())


def test_a_sequence_is_in_one_split_whatever_the_seed() -> None:
    where: dict[tuple[int, ...], str] = {}
    drawn = []
    for seed in range(3):
        found = Text(seed=seed, n_sequences=512, n_tokens=16).build(_encode)
        rows = {(*row,): split for split in SPLITS for row in found[split].tokens.tolist()}
        assert all(where.get(row, split) == split for row, split in rows.items())
        where |= rows
        drawn.append(set(rows))
    assert drawn[0] != drawn[1]


def test_the_same_seed_gives_the_same_text() -> None:
    first, again = (Text(seed=4, n_sequences=16, n_tokens=8).build(_encode) for _ in range(2))
    assert all(first[split].sha256 == again[split].sha256 for split in SPLITS)


def test_too_little_text_is_told_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"too few sequences.*calibrate 0 of 4"):
        Text(seed=0, n_sequences=16, n_tokens=64).build(lambda _: [1, 2, 3])
    with pytest.raises(ValueError, match="at least 8"):
        quotas(5)


@given(st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), max_size=200))
@settings(max_examples=30, deadline=None)
def test_what_is_divided_is_disjoint_and_keeps_to_its_split(items: list[list[int]]) -> None:
    tokens = [torch.tensor(item) for item in items]
    try:
        found = divide(tokens, 8)
    except ValueError:
        return
    for split, chosen in found.items():
        assert all(split_of(tokens[index]) == split for index in chosen)
    used = [tuple(items[index]) for chosen in found.values() for index in chosen]
    assert len(set(used)) == len(used)
