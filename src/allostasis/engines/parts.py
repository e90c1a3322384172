"""Finished pieces of a sweep on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from allostasis.core.records import write_atomically
from allostasis.interventions.ablate import Unit


@dataclass(frozen=True)
class Parts:
    """One file for each group of prompts and layer, with what it belongs to written into it.

    Attributes:
        folder: Where they lie.
        identity: All that decides the readouts beside group, layer and units: weights, prompts,
            values that are put in, precision.
    """

    folder: Path
    identity: str

    def read(self, group: int, layer: int, units: Sequence[Unit]) -> dict[str, np.ndarray] | None:
        """Readouts of a finished piece; None where there is none of this identity."""
        path = self._path(group, layer)
        if not path.is_file():
            return None
        with safe_open(path, framework="np") as file:
            if (file.metadata() or {}).get("key") != self._key(units):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def write(
        self, group: int, layer: int, units: Sequence[Unit], found: dict[str, np.ndarray]
    ) -> None:
        """Keep a finished piece."""
        tensors = {name: torch.from_numpy(column).contiguous() for name, column in found.items()}
        write_atomically(
            self._path(group, layer),
            lambda path: save_file(tensors, path, metadata={"key": self._key(units)}),
            is_durable=False,
        )

    def _path(self, group: int, layer: int) -> Path:
        return self.folder / f"sweep-{group}-{layer}.safetensors"

    def _key(self, units: Sequence[Unit]) -> str:
        text = "\n".join([self.identity, *(unit.key for unit in units)])
        return hashlib.sha256(text.encode()).hexdigest()
