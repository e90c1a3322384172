"""A language model's activations as a dataset: harvested once, then served to an autoencoder."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import lightning as L
import numpy as np
import torch
from annotated_types import Ge, Gt
from filelock import FileLock
from jaxtyping import Float, Int32
from torch import Tensor

from allostasis.core.seeding import derive
from allostasis.tasks.activation_cache import (
    COLUMNS,
    ActivationCache,
    Plan,
    StoredDtype,
    as_floats,
    build,
)
from allostasis.tasks.concepts import Chosen, ConceptTable
from allostasis.tasks.corpora import GLOSSES, SPLITS, Split, corpus_sha256, documents, split_of
from allostasis.tasks.harvest import UNEMBED_INPUT, Window, windows_of
from allostasis.tasks.interleaved_patterns import Steps
from allostasis.tasks.labels import Labels, concept_labels
from allostasis.tasks.shuffled import ShuffleBuffer

MEAN_ROWS = 65_536  # of `train`, whose mean an autoencoder's bias may start from

EXAMPLES = """
  python -m allostasis.tasks.activations build --model smollm2 --tokens 65536
  python -m allostasis.tasks.activations build --model gpt2 --hook blocks.6.hook_resid_post \\
    --corpus texts/ --tokens 1000000 --out activations/gpt2
"""


class ActivationBatch(NamedTuple):
    """Some rows.

    Attributes:
        x: Raw activations; whoever trains on them multiplies by the task's `scale`.
        ids: `activation_cache.COLUMNS` of each: document, position, token, next token, split.
    """

    x: Float[Tensor, "row d"]
    ids: Int32[Tensor, "row column"]


class ActivationDataModule(L.LightningDataModule):
    """Activations of a language model, in a random order that is a function of seed and epoch.

    `prepare` is to be called with the model before anything else; it finds the cache of this model,
    hook and corpus, or harvests it. Documents are split by a hash of their text, so that rows of
    one are all in `train`, `val` or `test`. `batch` is a function of the update's number: a resumed
    run reads what an uninterrupted one does, and no state of the data needs to be kept.

    Args:
        seed: The run's seed; it draws the order alone, so that all seeds share one cache.
        hook: `unembed_input`, or `blocks.L.hook_resid_pre` or `_post`; of one of these, the same
            tokens' `unembed_input` is kept too, since concepts are directions of it.
        corpus: See `corpora.documents`.
        n_tokens: Rows of all splits together.
        batch_size: Rows a batch.
        epochs: How often the rows of `train` are read; a batch past the last is refused.
        window: Tokens that the model reads at once.
        dtype: Of the stored numbers.
        repeat: How often the corpus itself may be read for as many rows.
        buffer_rows: Rows from which on the shuffle buffer is drawn from.
        block_rows: Rows read in one stretch.
        folder: Of the cache; by default below the platform's cache folder, or $ALLOSTASIS_CACHE.
    """

    def __init__(
        self,
        *,
        seed: int,
        hook: str = UNEMBED_INPUT,
        corpus: str = GLOSSES,
        n_tokens: Annotated[int, Gt(0)] = 65_536,
        batch_size: Annotated[int, Gt(0)] = 512,
        epochs: Annotated[int, Ge(1)] = 8,
        window: Annotated[int, Ge(4)] = 128,
        dtype: StoredDtype = "bfloat16",
        repeat: Annotated[int, Ge(1)] = 1,
        buffer_rows: Annotated[int, Gt(0)] = 524_288,
        block_rows: Annotated[int, Gt(0)] = 4096,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        self.seed, self.hook, self.corpus = seed, hook, corpus
        self.batch_size, self.epochs = batch_size, epochs
        self.buffer_rows, self.block_rows = buffer_rows, block_rows
        hooks = (hook,) if hook == UNEMBED_INPUT else (hook, UNEMBED_INPUT)
        self.plan = Plan(hooks=hooks, n_rows=n_tokens, window=window, dtype=dtype, repeat=repeat)
        self.folder = None if folder is None else Path(folder).expanduser()
        self._cache: ActivationCache | None = None
        self._stream: tuple[int, Iterator[tuple[np.ndarray, np.ndarray]]] | None = None

    # ------------------------------------------------------------------ the cache

    def prepare(self, model: Any) -> None:
        """Find or harvest the cache of this task for a model; a second call changes nothing."""
        if self._cache is not None:
            return
        self._cache = harvested(model, self.corpus, self.plan, self.folder)

    @property
    def cache(self) -> ActivationCache:
        """The finished cache.

        Raises:
            RuntimeError: The task was not prepared.
        """
        if self._cache is None:
            raise RuntimeError("no activations yet: call task.prepare(model) first")
        return self._cache

    @property
    def d_model(self) -> int:
        """Width of an activation."""
        return self.cache.d

    @property
    def scale(self) -> float:
        """sqrt(d) / E||x|| over `train`."""
        return self.cache.scale(self.hook)

    @cached_property
    def _ids(self) -> np.ndarray:
        return self.cache.ids()

    @cached_property
    def _rows(self) -> dict[Split, np.ndarray]:
        split = self._ids[:, COLUMNS.index("split")]
        return {name: np.flatnonzero(split == number) for number, name in enumerate(SPLITS)}

    @property
    def n_train(self) -> int:
        """Rows of `train`."""
        return len(self._rows["train"])

    @property
    def n_batches_per_epoch(self) -> int:
        """Batches of an epoch; the rows that fill no batch are left out."""
        return self.n_train // self.batch_size

    @property
    def n_batches(self) -> int:
        """Batches of all epochs."""
        return self.n_batches_per_epoch * self.epochs

    # ------------------------------------------------------------------ batches

    def batch(self, step: int, device: torch.device | str = "cpu") -> ActivationBatch:
        """The batch of an update: of epoch `step // n_batches_per_epoch`.

        Raises:
            ValueError: It is past the last epoch, or an epoch holds no batch.
        """
        per_epoch = self.n_batches_per_epoch
        if not per_epoch:
            raise ValueError(
                f"task.batch_size={self.batch_size} is more than the {self.n_train} rows of train"
            )
        if step >= self.n_batches:
            raise ValueError(
                f"update {step} is past the last: {self.n_train:,} rows of train give "
                f"{per_epoch} batches an epoch, and task.epochs={self.epochs}. Harvest more with "
                "task.n_tokens, or read them more often"
            )
        if self._stream is None or self._stream[0] != step or step % per_epoch == 0:
            epoch, number = divmod(step, per_epoch)
            self._stream = (step, self._shuffled(epoch).batches(number))
        rows, stored = next(self._stream[1])
        self._stream = (step + 1, self._stream[1])
        return self._as_batch(self._rows["train"][rows], stored, device)

    def _shuffled(self, epoch: int) -> ShuffleBuffer:
        train, read = self._rows["train"], self.cache.reader(self.hook)
        return ShuffleBuffer(
            n_rows=len(train),
            read=lambda rows: read(train[rows]),
            batch_size=self.batch_size,
            block_rows=self.block_rows,
            buffer_rows=self.buffer_rows,
            seed=(derive(self.seed, "order"), epoch),
        )

    def split(
        self, split: Split, n: int | None = None, device: torch.device | str = "cpu"
    ) -> ActivationBatch:
        """The first `n` rows of a split, or all, in the order of the corpus."""
        rows = self._rows[split][:n]
        return self._as_batch(rows, self.cache.reader(self.hook)(rows), device)

    def unembed_input(self, split: Split, n: int | None = None) -> Float[Tensor, "row d"]:
        """What the unembedding reads of the tokens that `split` gives."""
        return as_floats(self.cache.reader(UNEMBED_INPUT)(self._rows[split][:n]))

    def windows(self, model: Any, split: Split, n: int) -> list[Window]:
        """The first windows of a split's documents that hold `n` rows, or all that were harvested.

        Args:
            model: The model of the cache.
            split: The split.
            n: Rows.
        """
        found: list[Window] = []
        last, rows = int(self._ids[-1, COLUMNS.index("document")]), 0
        for number, text in enumerate(documents(self.corpus)):
            if number > last or rows >= n:
                break
            if split_of(text) != split:
                continue
            own = windows_of(
                model, text, self.plan.window, document=number, split=SPLITS.index(split)
            )
            found += own
            rows += sum(len(window.ids) for window in own)
        return found

    def _as_batch(
        self, rows: np.ndarray, stored: np.ndarray, device: torch.device | str
    ) -> ActivationBatch:
        x, ids = as_floats(stored), torch.from_numpy(self._ids[rows])
        if torch.device(device).type == "cuda":
            x = x.pin_memory()
        return ActivationBatch(x.to(device, non_blocking=True), ids.to(device))

    def mean(self) -> Float[Tensor, " d"]:
        """Mean of the first 65,536 rows of `train`."""
        return self.split("train", MEAN_ROWS).x.double().mean(dim=0).float()

    def labels(
        self, batch: ActivationBatch, split: Split, table: ConceptTable, chosen: Sequence[Chosen]
    ) -> Labels:
        """Which of a teacher's concepts each row is of.

        What is put into the unembedding speaks of the next token; elsewhere a row is of its own.
        """
        column = "next_token" if self.hook == UNEMBED_INPUT else "token"
        return concept_labels(batch.ids[:, COLUMNS.index(column)], split, table, chosen)

    # ------------------------------------------------------------------ Lightning and records

    def train_dataloader(self) -> Steps:
        """Steps without end: the module counts its updates and asks for their batches."""
        return Steps(None)

    def test_dataloader(self) -> Steps:
        """One step."""
        return Steps(1)

    def facts(self) -> dict[str, Any]:
        """What run.json says of the data."""
        manifest = self.cache.manifest
        names = ("corpus", "corpus_sha256", "model", "hooks", "n_rows", "n_train", "window",
                 "dtype", "repeat", "scale")  # fmt: skip
        shards = json.dumps([shard["files"] for shard in manifest["shards"]], sort_keys=True)
        return {
            "sha256": hashlib.sha256(shards.encode()).hexdigest(),
            **{name: manifest[name] for name in names},
            "epochs": self.epochs,
            "rows": {split: len(rows) for split, rows in self._rows.items()},
        }


def harvested(model: Any, corpus: str, plan: Plan, folder: Path | None) -> ActivationCache:
    """The cache of a model's activations on a corpus; harvested first where there is none.

    Two processes that want the same one wait for each other.

    Args:
        model: A `LanguageModel`.
        corpus: See `corpora.documents`.
        plan: What is to be harvested.
        folder: Where; by default a folder named after what tells one cache from another.
    """
    identity = {
        name: model.identity[name]
        for name in ("name", "weights_sha256", "tokenizer_sha256", "dtype", "prepend_bos")
    }
    facts = {"model": identity, "corpus": corpus, "corpus_sha256": corpus_sha256(corpus)}
    key = hashlib.sha256(json.dumps([facts, vars(plan)], sort_keys=True).encode()).hexdigest()
    if folder is None:
        short = str(identity["name"]).rpartition("/")[2].replace(" ", "-")
        folder = _root() / f"{short}-{plan.hooks[0]}-{key[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        cache = build(model, lambda: documents(corpus), folder, plan, facts={"key": key, **facts})
    if cache.manifest["key"] != key:
        raise ValueError(
            f"{folder} holds the activations of another model, corpus or plan; name another folder"
        )
    return cache


def _root() -> Path:
    from platformdirs import user_cache_path

    root = os.environ.get("ALLOSTASIS_CACHE")
    return (Path(root).expanduser() if root else user_cache_path("allostasis")) / "activations"


# ---------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Harvest a cache from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m allostasis.tasks.activations",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "build", help="harvest a cache, or go on with one"
    )
    command.add_argument("--model", default="smollm2", help="owner/name or folder, or smollm2")
    command.add_argument("--hook", nargs="+", default=[UNEMBED_INPUT], help="what to harvest")
    command.add_argument("--corpus", default=GLOSSES, help=f"default: {GLOSSES}")
    command.add_argument("--tokens", type=int, required=True, help="rows, of all splits together")
    command.add_argument("--window", type=int, default=128, help="tokens read at once")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    command.add_argument("--repeat", type=int, default=1, help="times the corpus may be read")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    command.add_argument("--out", type=Path, help="folder; default: in the cache folder")
    words = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("allostasis").setLevel(logging.INFO)
    from allostasis.models.lens import pretrained

    name = "HuggingFaceTB/SmolLM2-135M-Instruct" if words.model == "smollm2" else words.model
    is_folder = Path(name).expanduser().is_dir()
    plan = Plan(
        hooks=tuple(words.hook),
        n_rows=words.tokens,
        window=words.window,
        dtype=words.dtype,
        repeat=words.repeat,
    )
    try:
        model = pretrained(
            name=None if is_folder else name,
            source=name if is_folder else None,
            device=words.device,
        )
        cache = harvested(model, words.corpus, plan, words.out)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{cache.folder}: {cache.n_rows:,} rows of {cache.d} numbers\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
