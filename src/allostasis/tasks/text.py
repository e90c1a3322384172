"""English that ships with the package: WordNet's glosses, cut into sequences of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge
from jaxtyping import Int64
from torch import Tensor

from allostasis.core import wordnet
from allostasis.core.seeding import derive
from allostasis.tasks.sequences import Sequences
from allostasis.tasks.splits import Split, divide, next_tokens

Encode = Callable[[str], list[int]]
MARGIN = 1.25
"""Words gathered for a sequence, over its tokens: a token is at most about a word."""


class OneText:
    """A loader whose only batch is the task: its text waits for a tokenizer."""

    def __init__(self, task: Text) -> None:
        self.task = task

    def __iter__(self) -> Iterator[Text]:
        return iter((self.task,))

    def __len__(self) -> int:
        return 1


class Text(L.LightningDataModule):
    """Glosses of WordNet's nouns with their example sentences, as sequences of one length.

    Synsets are shuffled once, by a hash of their number, so that neighbours have nothing to do with
    each other, and are gathered until they fill a sequence; no synset is in two. The text is
    the same for all seeds, and a sequence's split is a function of its tokens; the seed draws
    which sequences are used.

    Args:
        seed: The run's seed.
        n_sequences: Sequences of all splits together.
        n_tokens: Positions that a model reads.

    Source:
        Princeton University (2006), WordNet 3.0.
    """

    def __init__(
        self,
        *,
        seed: int,
        n_sequences: Annotated[int, Ge(8)] = 512,
        n_tokens: Annotated[int, Ge(2)] = 64,
    ) -> None:
        super().__init__()
        self.seed, self.n_sequences, self.n_tokens = seed, n_sequences, n_tokens

    def build(self, encode: Encode) -> dict[Split, Sequences]:
        """Sequences for one tokenizer, by split.

        Args:
            encode: Text to token ids, with BOS where the model wants one, never with an end token.

        Raises:
            ValueError: The text does not hold as many sequences.
        """
        items: list[Int64[Tensor, " token"]] = []

        def kept() -> Iterator[Int64[Tensor, " token"]]:
            for tokens in self._items(encode):
                items.append(tokens)
                yield tokens

        found = divide(kept(), self.n_sequences)
        return {
            split: next_tokens(torch.stack([items[index] for index in chosen]))
            for split, chosen in found.items()
        }

    def _items(self, encode: Encode) -> Iterator[Int64[Tensor, " token"]]:
        passages = self.passages()
        generator = torch.Generator().manual_seed(derive(self.seed, "data"))
        for index in torch.randperm(len(passages), generator=generator).tolist():
            ids = encode(passages[index])[: self.n_tokens + 1]
            if len(ids) == self.n_tokens + 1:
                yield torch.tensor(ids)

    def passages(self) -> list[str]:
        """Pieces of text that each hold at least one sequence, the same for every seed."""
        table = wordnet.load()
        columns = (table[name].to_pylist() for name in ("offset", "lemmas", "gloss", "examples"))
        entries = sorted(zip(*columns, strict=True), key=lambda entry: _shuffled(entry[0]))
        found: list[str] = []
        words: list[str] = []
        for _, lemmas, gloss, examples in entries:
            said = "; ".join([gloss, *examples])
            words += f"{lemmas[0].replace('_', ' ')}: {said}.".split()
            if len(words) >= MARGIN * (self.n_tokens + 1):
                found.append(" ".join(words))
                words = []
        return found

    def test_dataloader(self) -> OneText:
        """One batch, the task itself: whoever has the tokenizer builds the sequences from it."""
        return OneText(self)

    def transfer_batch_to_device(self, batch: Text, device: Any, dataloader_idx: int) -> Text:
        """The task as it is: it holds no tensor."""
        del device, dataloader_idx
        return batch


def _shuffled(offset: int) -> bytes:
    return hashlib.sha256(str(offset).encode()).digest()
