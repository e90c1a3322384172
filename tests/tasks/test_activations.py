"""A cache of activations holds what the model computes, whole or not at all; batches resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

WORDS = (
    "the",
    "man",
    "gave",
    "a",
    "book",
    "to",
    "dog",
    "and",
    "cat",
    "went",
    "park",
    "with",
    "Mary",
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of words that the tiny tokenizers know."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    lengths = rng.integers(5, 40, 60)
    path.write_text("\n\n".join(" ".join(rng.choice(WORDS, n)) for n in lengths), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model() -> Any:
    from allostasis.models.lens import pretrained

    return pretrained(arch="gpt2")


@pytest.fixture
def make(model: Any, texts: Path) -> Callable[..., Any]:
    from allostasis.tasks.activation_cache import Plan, build
    from allostasis.tasks.corpora import documents

    def run(folder: Path, *, only: int | None = None, **changes: Any) -> Any:
        settings = {
            "hooks": ("unembed_input", "blocks.1.hook_resid_post"), "n_rows": 700, "window": 16,
            "rows_per_shard": 128, "batch_windows": 4, **changes,
        }  # fmt: skip

        def corpus() -> Any:
            for number, text in enumerate(documents(str(texts))):
                if only is not None and number >= only:
                    raise KeyboardInterrupt
                yield text

        return build(model, corpus, folder, Plan(**settings), facts={})

    return run


def _bytes(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "llama", "gemma3_text"])
def test_the_unembedding_of_a_row_is_the_logits_and_its_ids_name_the_token(arch: Any) -> None:
    from allostasis.models.lens import pretrained
    from allostasis.tasks.harvest import harvest, windows_of

    model = pretrained(arch=arch)
    text = " ".join(WORDS)
    windows = windows_of(model, text, 10, document=7, split=2)
    rows = harvest(model, windows, ("unembed_input", "blocks.0.hook_resid_pre"))
    at = 0
    own = model.tokenizer.encode(text, add_special_tokens=False)
    for window in windows:
        tokens = torch.tensor([window.tokens])
        logits = model.hf(tokens).logits[0].detach()
        embedded = model.decoder.embed(tokens)[0].detach()
        for position, counts in enumerate(window.counts):
            if not counts:
                continue
            found = model.decoder.unembed(rows["unembed_input"][at]).detach()
            if arch != "gemma3_text":  # whose logits may be capped
                assert_close(found, logits[position], rtol=0, atol=1e-4)
            if arch == "llama":
                assert_close(rows["blocks.0.hook_resid_pre"][at], embedded[position])
            at += 1
        for document, place, token, following, split in window.ids.tolist():
            assert (document, split, token) == (7, 2, own[place])
            assert following == (own[place + 1] if place + 1 < len(own) else -1)
    assert at == len(rows["unembed_input"])
    assert all(not window.counts[0] for window in windows)


@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"])
def test_what_stands_in_at_a_hook_reaches_the_unembedding_as_in_transformer_lens(hook: str) -> None:
    from allostasis.models import lens
    from allostasis.tasks.harvest import harvest, unembed_input_with, windows_of

    model = lens.pretrained(arch="llama")
    windows = windows_of(model, " ".join(WORDS), 10, document=0, split=2)
    clean = harvest(model, windows, ("unembed_input", hook))
    assert_close(
        unembed_input_with(model, windows, hook, lambda x: x), clean["unembed_input"],
        rtol=0, atol=0,
    )  # fmt: skip
    seen: list[torch.Tensor] = []

    def half(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return 0.5 * x

    changed = model.decoder.unembed(unembed_input_with(model, windows, hook, half)).detach()
    assert_close(torch.cat(seen).cpu(), clean[hook])
    bridge: Any = lens.bridge(model)
    at = 0
    for window in windows:
        counts = torch.tensor(window.counts)

        def put(acts: torch.Tensor, counts: torch.Tensor = counts, **_: Any) -> torch.Tensor:
            return torch.where(counts[None, :, None], 0.5 * acts, acts)

        tokens = torch.tensor([window.tokens])
        logits = bridge.run_with_hooks(tokens, fwd_hooks=[(hook, put)])[0][counts].detach()
        assert_close(changed[at : at + len(logits)], logits, rtol=0, atol=1e-4)
        assert (logits - bridge(tokens)[0][counts]).abs().max() > 1e-3
        at += len(logits)
    assert at == len(changed)


def test_a_cache_reads_back_what_the_model_computes(
    make: Callable[..., Any], model: Any, texts: Path, tmp_path: Path
) -> None:
    from allostasis.tasks.activation_cache import as_floats
    from allostasis.tasks.corpora import SPLITS, documents, split_of
    from allostasis.tasks.harvest import harvest, windows_of

    cache = make(tmp_path / "cache", dtype="float32")
    assert cache.n_rows == 700
    assert [len(shard) for shard in cache.shards("unembed_input")] == [128] * 5 + [60]
    chosen = np.array([3, 127, 128, 500, 699])
    found = as_floats(cache.reader("blocks.1.hook_resid_post")(chosen))
    texts_by_number = list(documents(str(texts)))
    for row, (document, position, _, _, split) in zip(found, cache.ids()[chosen], strict=True):
        text = texts_by_number[document]
        assert SPLITS[split] == split_of(text)
        windows = windows_of(model, text, 16, document=0, split=0)
        alone = harvest(model, windows, ("blocks.1.hook_resid_post",))
        ids = np.concatenate([window.ids for window in windows])
        at = int(np.flatnonzero(ids[:, 1] == position)[0])
        assert_close(row, alone["blocks.1.hook_resid_post"][at], rtol=1e-5, atol=1e-5)
    train = cache.ids()[:, 4] == 0
    rows = as_floats(cache.reader("unembed_input")(np.flatnonzero(train))).double()
    expected = cache.d**0.5 / float(rows.norm(dim=1).mean())
    assert cache.scale("unembed_input") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("documents_read", [9, 17, 23])
def test_cache_resume_writes_the_same_bytes(
    make: Callable[..., Any], tmp_path: Path, documents_read: int
) -> None:
    make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", only=documents_read)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    make(tmp_path / "cut")
    assert _bytes(tmp_path / "cut") == _bytes(tmp_path / "whole")


def test_cache_truncation_and_a_flipped_bit_are_found(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    from allostasis.tasks.activation_cache import ActivationCache, CacheError, CorpusExhausted

    folder = make(tmp_path / "cache").folder
    shard = folder / "hook=unembed_input" / "shard-00002.bin"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match="was changed"):
        ActivationCache(folder)
    ActivationCache(folder, verify="sizes")
    shard.write_bytes(content[:-2])
    with pytest.raises(CacheError, match="expected 8,192"):
        ActivationCache(folder, verify="sizes")
    with pytest.raises(FileNotFoundError, match="no finished cache"):
        ActivationCache(tmp_path / "nowhere")
    with pytest.raises(CorpusExhausted) as error:
        make(tmp_path / "short", n_rows=100_000)
    assert error.value.requested == 100_000
    assert 1000 < error.value.got < 2000
    n_rows = error.value.got + 100
    again = make(tmp_path / "twice", n_rows=n_rows, repeat=2)
    assert again.n_rows == n_rows
    assert again.manifest["repeat"] == 2


def test_a_damaged_shard_is_found_before_a_build_goes_on(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    from allostasis.tasks.activation_cache import CacheError

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        make(folder, only=23)
    last = max((folder / "done").iterdir())
    shard = folder / f"ids-{last.stem}.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(CacheError, match="was changed"):
        make(folder)
    assert json.loads(last.read_text(encoding="utf-8"))["rows"] == 128


def test_a_row_that_is_not_finite_names_its_document(
    make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allostasis.tasks import activation_cache

    def broken(*words: Any) -> Any:
        found = harvest(*words)
        found["unembed_input"][3, 0] = float("inf")
        return found

    harvest = activation_cache.harvest
    monkeypatch.setattr(activation_cache, "harvest", broken)
    with pytest.raises(ValueError, match="unembed_input is not finite in document 0"):
        make(tmp_path / "cache")


@pytest.mark.parametrize(("buffer", "block"), [(64, 8), (10_000, 32), (1, 1)])
def test_a_shuffled_epoch_gives_every_row_once_and_resumes_anywhere(
    buffer: int, block: int
) -> None:
    from allostasis.tasks.shuffled import ShuffleBuffer

    store = np.arange(301)[:, None] * 10

    def order(seed: int) -> ShuffleBuffer:
        return ShuffleBuffer(
            n_rows=301, read=lambda rows: store[rows], batch_size=12, block_rows=block,
            buffer_rows=buffer, seed=(seed, 0),
        )  # fmt: skip

    whole = list(order(0).batches())
    assert len(whole) == 301 // 12
    rows = np.concatenate([rows for rows, _ in whole])
    assert len(np.unique(rows)) == len(rows)
    assert all((data[:, 0] == 10 * rows).all() for rows, data in whole)
    for start in (0, 1, 7, 24):
        for (a, b), (c, d) in zip(whole[start:], order(0).batches(start), strict=True):
            assert (a == c).all()
            assert (b == d).all()
    assert not np.array_equal(rows, np.concatenate([r for r, _ in order(1).batches()]))


def test_batches_are_a_function_of_the_update_alone(
    model: Any, texts: Path, tmp_path: Path
) -> None:
    from allostasis.tasks.activations import ActivationDataModule

    def task(seed: int = 0) -> ActivationDataModule:
        made = ActivationDataModule(
            seed=seed, corpus=str(texts), n_tokens=700, batch_size=64, epochs=2, window=16,
            buffer_rows=200, block_rows=16, folder=str(tmp_path / "cache"),
        )  # fmt: skip
        made.prepare(model)
        return made

    first, other = task(), task()
    assert first.n_batches_per_epoch == first.n_train // 64
    n = 2 * first.n_batches_per_epoch
    whole = [first.batch(step) for step in range(n)]
    for step in (n - 1, 3, 4, 0):
        assert torch.equal(other.batch(step).x, whole[step].x)
        assert torch.equal(other.batch(step).ids, whole[step].ids)
    assert not torch.equal(whole[0].ids, whole[first.n_batches_per_epoch].ids)
    assert not torch.equal(task(1).batch(0).ids, whole[0].ids)
    with pytest.raises(ValueError, match="past the last"):
        first.batch(n)
    documents = {
        name: set(first.split(name).ids[:, 0].tolist()) for name in ("train", "val", "test")
    }
    assert not documents["train"] & (documents["val"] | documents["test"])
    assert_close(first.mean(), first.split("train").x.mean(dim=0))
    assert first.facts()["rows"]["train"] == first.n_train


def test_documents_come_from_text_parquet_and_folders_in_their_order(tmp_path: Path) -> None:
    import pandas as pd

    from allostasis.tasks.corpora import corpus_sha256, documents

    (tmp_path / "a.txt").write_text("first\nline two\n\n\nsecond\n", encoding="utf-8")
    pd.DataFrame({"text": ["third", "", None, "fourth"]}).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    assert list(documents(str(tmp_path))) == ["first\nline two", "second", "third", "fourth"]
    before = corpus_sha256(str(tmp_path))
    (tmp_path / "a.txt").write_text("first\n", encoding="utf-8")
    assert corpus_sha256(str(tmp_path)) != before
    pd.DataFrame({"content": ["x"]}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="no column 'text'; it has content"):
        list(documents(str(tmp_path / "c.parquet")))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        list(documents(str(tmp_path / "missing.txt")))


def test_the_command_harvests_and_says_where_or_why_not(
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from allostasis.models.tiny import tiny_checkpoint
    from allostasis.tasks.activations import main

    folder = tiny_checkpoint(tmp_path / "model", "gpt2")
    out = tmp_path / "cache"
    words = ["build", "--model", str(folder), "--corpus", str(texts), "--window", "16",
             "--device", "cpu", "--out", str(out), "--tokens"]  # fmt: skip
    assert main([*words, "300"]) == 0
    assert "300 rows of 32 numbers" in capsys.readouterr().out
    assert "activations | 300 of 300 rows | done" in caplog.messages
    assert main([*words, "500"]) == 1
    assert "holds the activations of another model, corpus or plan" in capsys.readouterr().err
    words[words.index(str(out))] = str(tmp_path / "other")
    assert main([*words, "100000"]) == 1
    assert "repeat=<k>" in capsys.readouterr().err
