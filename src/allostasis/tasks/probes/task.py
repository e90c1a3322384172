"""The task of the head lab: one corpus of probes, encoded when a model's tokenizer is known."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from annotated_types import Ge, Gt, Le

from allostasis.tasks.one_batch import Encode, OneBatch, Tokenizer
from allostasis.tasks.probes.encoded import Asker, Encoded, Example, Tokens
from allostasis.tasks.probes.generate import Generated, generate
from allostasis.tasks.probes.rows import Corpus, data_hash, read, records
from allostasis.tasks.probes.splits import assign, read_splits, split_path


class Probes(L.LightningDataModule):
    """Pairs of prompts with their answers, in three splits that share no group.

    The corpus is the same for every seed; the seed draws which part of a split is measured.

    Args:
        seed: The run's seed.
        corpus: Which corpus.
        n_examples: Rows to make for the model's tokenizer, all splits together.
        n_val: Groups of `val` that every cell shall have at least; what `n_examples` leaves missing
            is made from groups that are in no split.
        frac: Part of the measured split that the seed draws, by group.
        n_reference: Prompts that a mean ablation averages over, at most.
        file: Rows of your own instead, as JSON lines, with the splits that lie beside them if there
            are any; `corpus` is then only a name.
        sha256: Canonical hash of the file's rows: other rows are another run, not a finished one.
        spans: Whether answers of several tokens are kept, for `full_span`.

    Raises:
        ValueError: `frac` is 1 with a seed other than 0.
    """

    def __init__(
        self,
        *,
        seed: int,
        corpus: Corpus,
        n_examples: Annotated[int, Ge(60), Le(2000)] = 240,
        n_val: Annotated[int, Ge(0), Le(200)] = 10,
        frac: Annotated[float, Gt(0), Le(1)] = 0.8,
        n_reference: Annotated[int, Ge(8), Le(1000)] = 16,
        file: str | None = None,
        sha256: str | None = None,
        spans: bool = False,
    ) -> None:
        super().__init__()
        if frac == 1 and seed != 0:
            raise ValueError(
                f"task.frac=1.0 takes every row, so that seed {seed} would measure what seed 0 "
                "measures; take seed=0 alone, or task.frac=0.8"
            )
        self.seed, self.n_examples = seed, n_examples
        self.corpus: Corpus = corpus
        self.n_val, self.frac, self.n_reference = n_val, frac, n_reference
        self.file, self.sha256, self.spans = file, sha256, spans

    def build(self, encode: Encode, tokenizer: Tokenizer) -> Encoded:
        """The corpus for one tokenizer.

        Args:
            encode: Text to token ids, with BOS where the model wants one, never with an end token.
            tokenizer: Says which id stands for unknown words.

        Returns:
            The same rows for the same tokenizer, whatever process makes them.

        Raises:
            ValueError: Too few rows can be asked under this tokenizer, or the file is not the one
                that `sha256` names or that was split.
        """
        asker = Asker(encode, unknown=tokenizer.unk_token_id, spans=self.spans)
        if self.file is not None:
            path = Path(self.file)
            rows = read(path)
            is_split = split_path(path).is_file()
            made = Generated(rows, read_splits(path, rows) if is_split else assign(rows))
            digest = data_hash(records(path))
            if digest != self.sha256:
                raise ValueError(
                    f"task.file={self.file} holds rows whose hash is {digest}, and task.sha256 is "
                    f"{self.sha256}; if these are the rows you mean, set task.sha256={digest}"
                )
        else:
            made = generate(
                self.corpus, asker, n=self.n_examples, n_val=self.n_val, n_pool=self.n_reference
            )
            digest = data_hash([asdict(row) for row in made.rows])
        examples: list[Example] = []
        for number, row in enumerate(made.rows):
            tokens = asker.ask(row)
            if isinstance(tokens, Tokens):
                examples.append(Example(number, row, made.splits[row.id], tokens))
            else:
                made.dropped[tokens] += 1
        return Encoded(
            corpus=self.corpus, examples=tuple(examples), sha256=digest,
            requested=len(made.rows) if self.file is not None else self.n_examples,
            n_extra=made.n_extra, dropped=made.dropped, seed=self.seed, frac=self.frac,
            n_reference=self.n_reference, pool=made.pool,
        )  # fmt: skip

    def test_dataloader(self) -> OneBatch[Probes]:
        """One batch, the task itself: whoever has the tokenizer builds the prompts from it."""
        return OneBatch(self)

    def transfer_batch_to_device(self, batch: Probes, device: Any, dataloader_idx: int) -> Probes:
        """The task as it is: it holds no tensor."""
        del device, dataloader_idx
        return batch
