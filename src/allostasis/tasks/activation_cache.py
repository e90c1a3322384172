"""A language model's activations on disk: sharded, checksummed, and complete or not there."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.core.progress import Ticker
from allostasis.core.records import write_atomically, write_json
from allostasis.tasks.corpora import SPLITS, split_of
from allostasis.tasks.harvest import Window, harvest, windows_of

log = logging.getLogger(__name__)

StoredDtype = Literal["bfloat16", "float32"]
Verify = Literal["auto", "full", "sizes"]

COLUMNS = ("document", "position", "token", "next_token", "split")
"""Of `ids`: the document's number, the token's index in it, token, the token after it (-1 at the
document's end), and the split's index in `SPLITS`."""

ITEM: dict[StoredDtype, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"), "float32": np.dtype("<f4"),
}  # fmt: skip
FULLY_VERIFIED = 2**30  # bytes up to which `auto` reads every hash


class CorpusExhausted(RuntimeError):
    """A corpus ended before it had given what was asked for."""

    def __init__(self, requested: int, got: int) -> None:
        self.requested, self.got = requested, got
        super().__init__(
            f"the corpus ended after {got:,} of {requested:,} rows. Ask for fewer, give a larger "
            "corpus, or read it several times with repeat=<k>, which is then on record"
        )


class CacheError(RuntimeError):
    """A cache is not what its manifest says."""


@dataclass(frozen=True)
class Plan:
    """What a cache holds; with the model and the corpus, its identity.

    Attributes:
        hooks: `unembed_input`, or `blocks.{layer}.hook_resid_pre` or `_post`.
        n_rows: Rows; a row is a token that counts.
        window: Tokens that the model reads at once, BOS included.
        dtype: Of a stored number.
        rows_per_shard: Rows of every shard but the last.
        batch_windows: Windows that the model reads side by side.
        repeat: How often the corpus may be read.
    """

    hooks: tuple[str, ...]
    n_rows: int
    window: int = 128
    dtype: StoredDtype = "bfloat16"
    rows_per_shard: int = 262_144
    batch_windows: int = 16
    repeat: int = 1


class ActivationCache:
    """A finished cache, opened for reading.

    Layout: `manifest.json`, `ids-00000.bin` (int32 `COLUMNS`, row-major), `done/00000.json`, and
    for each hook `hook=<name>/shard-00000.bin` (row-major numbers; bfloat16 as its 16 bits).

    Args:
        folder: Where it lies.
        verify: `full` reads every hash, `sizes` none, `auto` those of up to a gigabyte.

    Raises:
        FileNotFoundError: There is none, or one that was not finished.
        CacheError: A file is missing, cut short, or changed.
    """

    def __init__(self, folder: Path, *, verify: Verify = "auto") -> None:
        path = folder / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no finished cache of activations")
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.d: int = self.manifest["d"]
        self.dtype: StoredDtype = self.manifest["dtype"]
        self.hooks: tuple[str, ...] = tuple(self.manifest["hooks"])
        self._verify(verify)
        self.starts = np.cumsum([0, *(shard["rows"] for shard in self.manifest["shards"])])
        self.n_rows = int(self.starts[-1])

    def _verify(self, verify: Verify) -> None:
        files = [file for shard in self.manifest["shards"] for file in shard["files"].items()]
        hashed = verify == "full"
        hashed |= verify == "auto" and sum(facts["bytes"] for _, facts in files) <= FULLY_VERIFIED
        for name, facts in files:
            check_file(self.folder / name, facts, hashed=hashed)

    def ids(self) -> np.ndarray:
        """`COLUMNS` of every row, int32."""
        shape = (-1, len(COLUMNS))
        return np.concatenate([
            np.fromfile(self.folder / f"ids-{number:05d}.bin", dtype="<i4").reshape(shape)
            for number in range(len(self.starts) - 1)
        ])

    def shards(self, hook: str) -> list[np.ndarray]:
        """The stored numbers of a hook, mapped, shard by shard.

        Raises:
            KeyError: The cache does not hold the hook.
        """
        if hook not in self.hooks:
            raise KeyError(f"{self.folder} holds {', '.join(self.hooks)}, not {hook}")
        folder = self.folder / f"hook={hook}"
        return [
            np.memmap(folder / f"shard-{number:05d}.bin", ITEM[self.dtype], "r").reshape(-1, self.d)
            for number in range(len(self.starts) - 1)
        ]

    def reader(self, hook: str) -> Callable[[np.ndarray], np.ndarray]:
        """A function from ascending row numbers to the stored numbers of a hook."""
        shards, starts = self.shards(hook), self.starts

        def read(rows: np.ndarray) -> np.ndarray:
            bounds = np.searchsorted(rows, starts)
            pieces = [
                shard[rows[low:high] - begin]
                for shard, begin, low, high in zip(
                    shards, starts, bounds[:-1], bounds[1:], strict=False
                )
                if high > low
            ]
            return np.concatenate(pieces) if pieces else np.empty((0, self.d), ITEM[self.dtype])

        return read

    def scale(self, hook: str) -> float:
        """sqrt(d) / E||x|| over the rows of `train`."""
        return float(self.manifest["scale"][hook])


def as_floats(stored: np.ndarray) -> Float[Tensor, "row d"]:
    """Stored numbers as float32.

    Example:
        >>> as_floats(np.array([[0x3F80]], dtype="<u2"))
        tensor([[1.]])
    """
    if stored.dtype == ITEM["float32"]:
        return torch.from_numpy(np.ascontiguousarray(stored))
    bits = np.ascontiguousarray(stored).view("<i2")
    return torch.from_numpy(bits).view(torch.bfloat16).float()


def check_file(path: Path, facts: dict[str, Any], *, hashed: bool) -> None:
    """Hold a file against its size and, if `hashed`, its SHA-256.

    Raises:
        CacheError: It is not what it was.
    """
    size = path.stat().st_size if path.is_file() else None
    if size != facts["bytes"]:
        raise CacheError(
            f"{path} has {'no file' if size is None else f'{size:,} bytes'}, expected "
            f"{facts['bytes']:,}: remove {path.parent} and build the cache again"
        )
    if hashed:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != facts["sha256"]:
            raise CacheError(
                f"{path} has SHA-256 {found}, expected {facts['sha256']}: it was changed; remove "
                f"{path.parent} and build the cache again"
            )


# ---------------------------------------------------------------------- building


def build(
    model: Any,
    documents: Callable[[], Iterable[str]],
    folder: Path,
    plan: Plan,
    *,
    facts: dict[str, Any],
) -> ActivationCache:
    """Harvest a cache, or go on where an interrupted build stopped; a finished one is opened.

    An interrupted build that is resumed writes the same bytes as one that was not: a shard notes
    the document at which the model's batch began that filled it, and that batch is done again.

    Args:
        model: A `LanguageModel`.
        documents: Gives the corpus from its start, each time the same.
        folder: Where.
        plan: What it holds.
        facts: What the manifest says beside it: which model, which corpus.

    Raises:
        CorpusExhausted: The corpus is too short.
        ValueError: The disk is too full, or a row is not finite.
        CacheError: What an interrupted build left was changed since.
    """
    if (folder / "manifest.json").is_file():
        return ActivationCache(folder)
    d = model.decoder.d_model
    _make_room(folder, plan, d)
    done = _finished_shards(folder)
    begin = done[-1]["next"] if done else {"document": 0, "skip": 0}
    got = sum(shard["rows"] for shard in done)
    log.info(
        "activations: %s rows of %s numbers; %s rows are there", f"{plan.n_rows:,}", d, f"{got:,}"
    )
    pending, tick, before = _Pending(plan), Ticker("activations", noun="rows"), got
    for group in _groups(model, documents, plan, begin["document"]):
        skip = begin["skip"] if group.document == begin["document"] else 0
        pending.add(group, skip, *_rows_of(model, group.windows, plan, skip))
        tick(min(got + pending.n_rows, plan.n_rows) - before, plan.n_rows - before)
        while pending.n_rows and (
            pending.n_rows >= plan.rows_per_shard or got + pending.n_rows >= plan.n_rows
        ):
            shard = pending.take(min(plan.rows_per_shard, plan.n_rows - got))
            done.append(_write_shard(folder, len(done), shard))
            got += done[-1]["rows"]
            if got == plan.n_rows:
                write_json(folder / "manifest.json", _manifest(plan, d, done, facts))
                return ActivationCache(folder)
    raise CorpusExhausted(plan.n_rows, got + pending.n_rows)


def _make_room(folder: Path, plan: Plan, d: int) -> None:
    size = plan.n_rows * (len(plan.hooks) * d * ITEM[plan.dtype].itemsize + 4 * len(COLUMNS))
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    log.info("activations: %.1f MB in %s, %.1f GB are free", size / 1e6, folder, free / 1e9)
    if size > free:
        raise ValueError(
            f"{plan.n_rows:,} rows take {size / 1e9:.1f} GB; {folder} has {free / 1e9:.1f} GB left"
        )


def _finished_shards(folder: Path) -> list[dict[str, Any]]:
    """What `done/` says, one after the other; the last one's files are read again."""
    found = []
    while (path := folder / "done" / f"{len(found):05d}.json").is_file():
        found.append(json.loads(path.read_text(encoding="utf-8")))
    if found:
        for name, facts in found[-1]["files"].items():
            check_file(folder / name, facts, hashed=True)
    return found


@dataclass(frozen=True)
class _Group:
    """Windows of the documents from `document` on, up to but without `end`."""

    document: int
    end: int
    windows: list[Window]


def _groups(
    model: Any, documents: Callable[[], Iterable[str]], plan: Plan, first: int
) -> Iterator[_Group]:
    """Windows of as many whole documents as fill the model's batch, from document `first` on.

    The number of a document goes on over repeats of the corpus.
    """
    gathered: list[Window] = []
    begin = first
    number = -1
    for _ in range(plan.repeat):
        for text in documents():
            number += 1
            if number < first:
                continue
            split = SPLITS.index(split_of(text))
            gathered += windows_of(model, text, plan.window, document=number, split=split)
            if len(gathered) >= plan.batch_windows:
                yield _Group(begin, number + 1, gathered)
                gathered, begin = [], number + 1
    if gathered:
        yield _Group(begin, number + 1, gathered)


def _rows_of(
    model: Any, windows: Sequence[Window], plan: Plan, skip: int
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Activations by hook and ids of the rows that count, without the first `skip`."""
    pieces: dict[str, list[Tensor]] = {hook: [] for hook in plan.hooks}
    ids = np.concatenate([window.ids for window in windows])
    for start in range(0, len(windows), plan.batch_windows):
        found = harvest(model, windows[start : start + plan.batch_windows], plan.hooks)
        for hook, rows in found.items():
            pieces[hook].append(rows)
    whole = {hook: torch.cat(rows) for hook, rows in pieces.items()}
    for hook, rows in whole.items():
        bad = ~rows.isfinite().all(dim=1)
        if bad.any():
            document = int(ids[int(bad.nonzero()[0, 0]), 0])
            raise ValueError(f"{hook} is not finite in document {document} of the corpus")
    return {hook: rows[skip:] for hook, rows in whole.items()}, ids[skip:]


@dataclass
class _Shard:
    acts: dict[str, np.ndarray]
    ids: np.ndarray
    next: dict[str, int]
    norms: dict[str, float]
    n_train: int


class _Pending:
    """Rows on their way into a shard, and the batches of the model that they are from."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.acts: dict[str, list[Tensor]] = {hook: [] for hook in plan.hooks}
        self.ids: list[np.ndarray] = []
        self.groups: list[tuple[_Group, int, int]] = []  # with the rows used of each, and left

    @property
    def n_rows(self) -> int:
        return sum(left for _, _, left in self.groups)

    def add(self, group: _Group, used: int, acts: dict[str, Tensor], ids: np.ndarray) -> None:
        for hook, rows in acts.items():
            self.acts[hook].append(rows)
        self.ids.append(ids)
        self.groups.append((group, used, len(ids)))

    def take(self, n: int) -> _Shard:
        """The first `n` rows, or all where there are fewer."""
        ids = np.concatenate(self.ids)
        whole = {hook: torch.cat(rows) for hook, rows in self.acts.items()}
        after = {"document": self.groups[-1][0].end, "skip": 0}
        rest = n
        while self.groups and self.groups[0][2] <= rest:
            rest -= self.groups.pop(0)[2]
        if self.groups:
            group, used, left = self.groups[0]
            self.groups[0] = (group, used + rest, left - rest)
            after = {"document": group.document, "skip": used + rest}
        self.ids = [ids[n:]]
        self.acts = {hook: [rows[n:]] for hook, rows in whole.items()}
        is_train = ids[:n, COLUMNS.index("split")] == SPLITS.index("train")
        norms = {
            hook: float(rows[:n].double().norm(dim=1)[torch.from_numpy(is_train)].sum())
            for hook, rows in whole.items()
        }
        stored = {hook: _stored(rows[:n], self.plan.dtype) for hook, rows in whole.items()}
        return _Shard(stored, ids[:n], after, norms, int(is_train.sum()))


def _stored(rows: Float[Tensor, "row d"], dtype: StoredDtype) -> np.ndarray:
    if dtype == "float32":
        return rows.float().numpy().astype(ITEM[dtype], copy=False)
    return rows.bfloat16().view(torch.int16).numpy().view(np.uint16).astype(ITEM[dtype], copy=False)


def _write_shard(folder: Path, number: int, shard: _Shard) -> dict[str, Any]:
    contents = {f"ids-{number:05d}.bin": shard.ids.astype("<i4")}
    for hook, rows in shard.acts.items():
        contents[f"hook={hook}/shard-{number:05d}.bin"] = rows
    files = {}
    for name, array in contents.items():
        content = array.tobytes()
        write_atomically(folder / name, lambda path, content=content: path.write_bytes(content))
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    facts = {
        "rows": len(shard.ids),
        "n_train": shard.n_train,
        "norms": shard.norms,
        "next": shard.next,
        "files": files,
    }
    write_json(folder / "done" / f"{number:05d}.json", facts)
    return facts


def _manifest(
    plan: Plan, d: int, shards: list[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    n_train = sum(shard["n_train"] for shard in shards)
    if not n_train:
        raise ValueError("no document is in the split `train`; ask for more rows")
    scale = {
        hook: d**0.5 * n_train / sum(shard["norms"][hook] for shard in shards)
        for hook in plan.hooks
    }
    return {
        **facts,
        "hooks": list(plan.hooks),
        "d": d,
        "dtype": plan.dtype,
        "window": plan.window,
        "repeat": plan.repeat,
        "n_rows": plan.n_rows,
        "n_train": n_train,
        "scale": scale,
        "columns": list(COLUMNS),
        "shards": shards,
    }
