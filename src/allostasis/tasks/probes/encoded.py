"""Rows under one tokenizer: their tokens, which rows it cannot ask, and the splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from allostasis.core.seeding import derive
from allostasis.tasks.one_batch import Encode
from allostasis.tasks.probes.drafts import Draft
from allostasis.tasks.probes.order import hashed, rank
from allostasis.tasks.probes.rows import Probe

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Reason = Literal[
    "multi_token_target", "multi_token_foil", "shared_first_token", "length_mismatch",
    "unknown_token",
]  # fmt: skip
REASONS: tuple[Reason, ...] = get_args(Reason)
"""Why a row cannot be asked, in the order in which one is counted."""
LEAST_REFERENCES = 8


Asked = Draft | Probe
"""What can be asked: a row of a corpus, or one that may become so."""


@dataclass(frozen=True)
class Tokens:
    """A row's tokens, with BOS where the model wants one.

    Attributes:
        clean: The clean prompt.
        corrupt: The corrupt prompt, as many tokens.
        target: What the right answer adds to the clean prompt; one token unless answers of several
            were asked for.
        foil: What the wrong one adds.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    target: tuple[int, ...]
    foil: tuple[int, ...]


class Asker:
    """Reads rows with a tokenizer, and says why one cannot be asked.

    Args:
        encode: Text to token ids, with BOS where the model wants one, never with an end token.
        unknown: The id that stands for what the vocabulary lacks, or None.
        spans: Whether answers may have several tokens.
    """

    def __init__(self, encode: Encode, *, unknown: int | None, spans: bool = False) -> None:
        self._encode, self.unknown, self.spans = encode, unknown, spans
        self._prompts: dict[str, tuple[int, ...]] = {}

    def prompt(self, text: str) -> tuple[int, ...]:
        """Tokens of a text."""
        if text not in self._prompts:
            self._prompts[text] = tuple(self._encode(text))
        return self._prompts[text]

    def length(self, word: str) -> int:
        """Tokens of a word after a space; 0 if the vocabulary lacks one of them."""
        added = self.prompt(f"a {word}")[len(self.prompt("a")) :]
        return 0 if self.unknown in added else len(added)

    def ask(self, row: Asked) -> Tokens | Reason:
        """A row's tokens, or the first reason for which it cannot be asked."""
        tokens = self._tokens(row)
        return next(self._reasons(tokens), tokens)

    def reasons(self, row: Asked) -> list[Reason]:
        """Every reason for which a row cannot be asked."""
        return [*self._reasons(self._tokens(row))]

    def _tokens(self, row: Asked) -> Tokens:
        return Tokens(
            self.prompt(row.clean), self.prompt(row.corrupt),
            self._answer(row.clean, row.target), self._answer(row.clean, row.foil),
        )  # fmt: skip

    def _answer(self, prompt: str, answer: str) -> tuple[int, ...]:
        """What an answer adds to a prompt's tokens; nothing if it changes those before it."""
        before, whole = self.prompt(prompt), self.prompt(prompt + answer)
        return whole[len(before) :] if whole[: len(before)] == before else ()

    def _reasons(self, tokens: Tokens) -> Iterator[Reason]:
        target, foil = tokens.target, tokens.foil
        if not self._is_answer(target):
            yield "multi_token_target"
        if not self._is_answer(foil):
            yield "multi_token_foil"
        if target[:1] == foil[:1] != ():
            yield "shared_first_token"
        if len(tokens.clean) != len(tokens.corrupt):
            yield "length_mismatch"
        if self.unknown in {*tokens.clean, *tokens.corrupt, *target, *foil}:
            yield "unknown_token"

    def _is_answer(self, tokens: tuple[int, ...]) -> bool:
        return len(tokens) == 1 or (self.spans and len(tokens) > 1)


@dataclass(frozen=True)
class Example:
    """A row that a model can be asked.

    Attributes:
        example: Its number in the corpus, unlike any other's.
        row: What it says, as on disk.
        split: `train` chooses, `val` says which cells the model is competent in, `test` measures.
        tokens: What the model sees.
    """

    example: int
    row: Probe
    split: Split
    tokens: Tokens

    @property
    def clean_ids(self) -> tuple[int, ...]:
        """Tokens of the clean prompt."""
        return self.tokens.clean

    @property
    def corrupt_ids(self) -> tuple[int, ...]:
        """Tokens of the corrupt prompt, as many."""
        return self.tokens.corrupt

    @property
    def target_id(self) -> int:
        """First token of the right answer."""
        return self.tokens.target[0]

    @property
    def foil_id(self) -> int:
        """First token of the wrong answer."""
        return self.tokens.foil[0]

    @property
    def cell(self) -> str:
        """Levels of the crossed factors."""
        return self.row.cell or "all"

    @property
    def group(self) -> str:
        """Cluster: what rows share that are not independent; see `Probe.cluster`."""
        return self.row.cluster

    @property
    def recency(self) -> int:
        """1: the clean prompt mentions the target last; -1: the foil; 0: neither."""
        return {"target": 1, "foil": -1, None: 0}[self.row.recent]

    @cached_property
    def roles(self) -> Mapping[str, tuple[int, ...]]:
        """Token positions, the same in both prompts: `changed` where they differ, `END` the last.

        `first_changed`, `last_changed` and `after_changed` (the one behind the last changed) are
        single.
        """
        pairs = enumerate(zip(self.clean_ids, self.corrupt_ids, strict=True))
        changed = tuple(position for position, (clean, corrupt) in pairs if clean != corrupt)
        end = len(self.clean_ids) - 1
        return {
            "changed": changed,
            "first_changed": changed[:1],
            "last_changed": changed[-1:],
            "after_changed": tuple(min(position + 1, end) for position in changed[-1:]),
            "END": (end,),
        }


Form = tuple[str | None, str | None, str, int]


@dataclass(frozen=True)
class Encoded:
    """A corpus under one tokenizer.

    Attributes:
        corpus: Its name.
        examples: Every row that can be asked.
        sha256: Canonical hash of these rows.
        requested: How many rows were asked for.
        n_extra: Rows of `val` beyond these.
        dropped: Rows that cannot be asked, by the first reason.
        seed: The run's seed, which draws the subsample.
        frac: Part of a split's groups that the seed draws.
        n_reference: Prompts that a mean is over, at most.
        pool: Further prompts by form and length, which belong to no row.
    """

    corpus: str
    examples: tuple[Example, ...]
    sha256: str
    requested: int
    n_extra: int
    dropped: Mapping[str, int]
    seed: int
    frac: float
    n_reference: int
    pool: Mapping[Form, tuple[tuple[int, ...], ...]] = field(default_factory=dict, repr=False)

    def of(self, split: Split) -> tuple[Example, ...]:
        """All examples of a split."""
        return tuple(example for example in self.examples if example.split == split)

    def drawn(self, split: Split) -> tuple[Example, ...]:
        """The part of a split that the seed draws: whole groups, without replacement.

        Groups are taken in an order that the seed shuffles until `frac` of the rows is reached.
        """
        every = self.of(split)
        sizes = Counter(example.group for example in every)
        wanted, taken = self.frac * len(every), set()
        rows = 0
        for group in hashed(sizes, derive(self.seed, "data"), split):
            if rows >= wanted:
                break
            taken.add(group)
            rows += sizes[group]
        return tuple(example for example in every if example.group in taken)

    def references(self, example: Example) -> tuple[tuple[int, ...], ...]:
        """Other prompts of an example's template, cell and length, for a mean over them.

        The same for every run: they depend on no seed.

        Raises:
            ValueError: There are fewer than 8.
        """
        found = [ids for ids in self._prompts[_form(example)] if ids != example.clean_ids]
        if len(found) < LEAST_REFERENCES:
            raise ValueError(
                f"row {example.row.id}: only {len(found)} other prompts have its template, its "
                f"cell ({example.cell}) and its {len(example.clean_ids)} tokens, and a mean needs "
                f"{LEAST_REFERENCES}; take another ablation, or more rows of this form"
            )
        return tuple(found[: self.n_reference])

    @cached_property
    def _prompts(self) -> Mapping[Form, list[tuple[int, ...]]]:
        found: dict[Form, dict[tuple[int, ...], None]] = defaultdict(dict)
        for form, prompts in self.pool.items():
            found[form].update(dict.fromkeys(prompts))
        for example in self.examples:
            found[_form(example)][example.clean_ids] = None
        return {form: sorted(prompts, key=rank) for form, prompts in found.items()}

    def data(self) -> dict[str, Any]:
        """What run.json keeps of it."""
        return {
            "corpus": self.corpus,
            "sha256": self.sha256,
            "requested": self.requested,
            "got": len(self.examples) - self.n_extra,
            "extra_val": self.n_extra,
            "dropped": dict(self.dropped),
            **{split: {"n": len(self.of(split))} for split in SPLITS},
            "frac": self.frac,
            "n_reference": self.n_reference,
        }


def _form(example: Example) -> Form:
    row = example.row
    return row.family, row.template, example.cell, len(example.clean_ids)
