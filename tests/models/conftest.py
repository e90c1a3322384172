"""What tests of language models share: no hub, and places of their own for what is converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that is not asked, and a store of earlier downloads that is empty."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A conversion cache that is empty."""
    monkeypatch.setenv("ALLOSTASIS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """A function that writes one tiny checkpoint of an architecture a session."""
    from allostasis.models.tiny import tiny_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")

    def write(arch: Any) -> Path:
        folder = root / arch
        return folder if folder.is_dir() else tiny_checkpoint(folder, arch)

    return write


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The file that the weights package of SmolLM2 installs."""
    from allostasis.models import packages

    packaged = packages.PACKAGED[SMOLLM2]
    paths = packages.installed(packaged)
    if not paths:
        pytest.skip(f"SmolLM2 is not installed: {packaged.command}")
    return paths[0]


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> Any:
    """SmolLM2, converted into the user's own cache unless it is there."""
    from allostasis.models.lens import pretrained

    assert smollm2_gguf.is_file()
    return pretrained(name=SMOLLM2)
