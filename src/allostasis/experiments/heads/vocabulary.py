"""A model's tokens as text: which are words, and how each reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

WORD = re.compile(r"[Ġ▁][A-Za-z]{2,}")
"""How vocabularies spell a word after a space."""


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens as text.

    Attributes:
        tokenizer: Its tokenizer.
        n_vocab: Columns of its unembedding; some may belong to no token.
    """

    tokenizer: Any
    n_vocab: int

    @cached_property
    def pieces(self) -> list[str]:
        """How the vocabulary spells each token."""
        n = min(self.n_vocab, len(self.tokenizer))
        return self.tokenizer.convert_ids_to_tokens([*range(n)])

    @cached_property
    def words(self) -> list[int]:
        """Tokens that are a word after a space, letters only."""
        return [index for index, piece in enumerate(self.pieces) if WORD.fullmatch(piece or "")]

    def inputs(self, n: int) -> list[int]:
        """`n` of the words, evenly spaced in the vocabulary's order; all where it has fewer."""
        words = self.words
        if not words:
            raise ValueError(
                "no token of this vocabulary is a word after a space, so that there is no input "
                "vocabulary for the circuit report; take module.reports=[write]"
            )
        chosen = np.linspace(0, len(words) - 1, min(n, len(words))).round().astype(int)
        return [words[index] for index in chosen]

    def lexicon(self, words: frozenset[str]) -> list[int]:
        """Tokens that are one of some words, after a space."""
        return [index for index in self.words if self.pieces[index][1:].lower() in words]

    def text(self, index: int) -> str:
        """A token as it reads behind another, so that a leading space is kept."""
        if index >= len(self.pieces):
            return f"<unused {index}>"
        before = self.words[:1] or [0]
        return self._decoded([*before, index])[len(self._decoded(before)) :]

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
