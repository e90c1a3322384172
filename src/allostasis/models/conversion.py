"""GGUF files made into folders of safetensors, once, in a cache that processes share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from allostasis.core.records import write_json

log = logging.getLogger(__name__)

CONVERTER = 1
"""Raised whenever the same file would be converted into other weights."""

RECORD = "SOURCE.json"


@dataclass(frozen=True)
class Gguf:
    """A GGUF file, whole or in parts.

    Attributes:
        key: What the cache calls it.
        parts: The files that, one after the other, are the file.
        sha256: Of the whole.
    """

    key: str
    parts: tuple[Path, ...]
    sha256: str


def cache_folder() -> Path:
    """Where converted models lie: $ALLOSTASIS_CACHE, or the platform's cache folder, /models."""
    from platformdirs import user_cache_path

    root = os.environ.get("ALLOSTASIS_CACHE")
    return (Path(root).expanduser() if root else user_cache_path("allostasis")) / "models"


def converted_folder(key: str, sha256: str, dtype: str) -> Path:
    """Where the conversion of a file lies, or would."""
    return cache_folder() / f"{key}-{sha256[:12]}-{dtype}-{CONVERTER}"


def sha256(path: Path) -> str:
    """SHA-256 of a file, read once a process as long as size and time of change stay."""
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns)


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    del size, changed  # in the key of the cache
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over a model's tensors in the order of their names: name, shape, dtype, bytes.

    A tensor with two names, such as an unembedding tied to the embedding, counts under the first.
    """
    digest, seen = hashlib.sha256(), set()
    for name, tensor in sorted(model.state_dict().items()):
        where = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if where in seen:
            continue
        seen.add(where)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """SOURCE.json of a converted model, whose files are what the conversion wrote.

    Raises:
        ValueError: A file is missing or has changed.
    """
    remedy = f"Delete {folder}; the next run converts the model anew."
    record = folder / RECORD
    if not record.is_file():
        raise ValueError(f"{folder} has no {RECORD}, so it is no finished conversion. {remedy}")
    content = json.loads(record.read_text(encoding="utf-8"))
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is gone. {remedy}")
        if (found := sha256(path)) != expected:
            raise ValueError(
                f"{path} has changed since it was written: its SHA-256 is {found}, and {RECORD} "
                f"says {expected}. {remedy}"
            )
    return content


def convert(source: Gguf, dtype: str) -> Path:
    """Dequantise a GGUF file into a folder of the cache, unless that has been done.

    Args:
        source: The file; what it holds has been checked.
        dtype: `float32`, `bfloat16` or `float16`, of the weights written.

    Returns:
        The folder, with config, safetensors, tokenizer and SOURCE.json. It appears whole or not at
        all: of two processes that convert at once, the second to finish drops its copy.
    """
    folder = converted_folder(source.key, source.sha256, dtype)
    if folder.is_dir():
        return folder
    log.info("converting %s to %s; this is done once", source.parts[0].name, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary, "made")
        _write(source, dtype, made)
        _open_to_others(made)
        try:
            made.rename(folder)
        except OSError:  # what a rename onto a folder that is not empty raises differs by platform
            if not folder.is_dir():
                raise
    return folder


def _write(source: Gguf, dtype: str, made: Path) -> None:
    """Load a GGUF file with transformers and save what it became."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = source.parts[0]
    whole = made.with_suffix(".gguf")
    if len(source.parts) > 1:
        with whole.open("wb") as joined:
            for part in source.parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, joined, length=2**24)
        file = whole
    if (found := sha256(file)) != source.sha256:
        raise ValueError(f"{source.key}: the file has SHA-256 {found}, not {source.sha256}")
    with quiet():
        model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),  # dense also where packed kernels are
            output_loading_info=True,
        )
        check_complete(info, file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        _unmark(model)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    names = sorted(path.name for path in made.iterdir())
    write_json(made / RECORD, {
        "file": [part.name for part in source.parts],
        "sha256": source.sha256,
        **_facts(file),
        "dtype": dtype,
        "converter": CONVERTER,
        "versions": {name: version(name) for name in ("torch", "transformers", "gguf")},
        "weights_sha256": weights_sha256(model),
        "files": {name: sha256(made / name) for name in names},
    })  # fmt: skip
    whole.unlink(missing_ok=True)


def check_complete(info: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that transformers filled up with random ones.

    Args:
        info: What `from_pretrained` says of its loading.
        path: What was loaded.

    Raises:
        ValueError: A tensor of the model is missing, or has another shape.
    """
    lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    if lacking:
        raise ValueError(
            f"{path} is not whole: {len(lacking)} of the model's tensors are missing or have "
            f"another shape: {', '.join(lacking[:5])}{', …' if len(lacking) > 5 else ''}"
        )


def _unmark(model: nn.Module) -> None:
    """Drop the marks of quantisation: the weights are dense, and a marked model cannot be saved."""
    marked = cast(Any, model)
    marked.hf_quantizer = None
    marked.is_quantized = False
    if hasattr(marked.config, "quantization_config"):
        del marked.config.quantization_config
    marked.config.architectures = [type(model).__name__]


def _facts(file: Path) -> dict[str, str | None]:
    """What a GGUF file says of itself: quantisation and licence."""
    from gguf import GGUFReader, LlamaFileType

    fields = GGUFReader(file).fields
    kind, licence = fields.get("general.file_type"), fields.get("general.license")
    name = None if kind is None else LlamaFileType(int(kind.contents())).name
    return {
        "quantisation": name and re.sub(r"^(MOSTLY|ALL)_", "", name),
        "licence": None if licence is None else str(licence.contents()),
    }


def _open_to_others(folder: Path) -> None:
    """Give a folder that was made as temporary, and its files, the rights of any other."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its progress bars."""
    from transformers.utils import logging as theirs

    was_enabled = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            theirs.enable_progress_bar()
