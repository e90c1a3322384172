"""Finished pieces of a sweep on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from allostasis.core.records import write_atomically, write_json
from allostasis.engines.budget import Budget
from allostasis.interventions.ablate import Unit
from allostasis.models.blocks import Decoder

BUDGET = "budget.json"


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

    def read(
        self, group: int | str, layer: str, units: Sequence[Unit], names: Sequence[str]
    ) -> dict[str, np.ndarray] | None:
        """Readouts of a finished piece; None where there is none of this identity.

        Args:
            group: The group's number.
            layer: The first changed layer, or `clean`.
            units: What was done; none in `clean`.
            names: Readouts that are wanted.
        """
        path = self._path(group, layer)
        if not path.is_file():
            return None
        with safe_open(path, framework="np") as file:
            if (file.metadata() or {}).get("key") != self._key(units):
                return None
            if not {*names} <= {*file.keys()}:
                return None
            return {name: file.get_tensor(name) for name in names}

    def write(
        self, group: int | str, layer: str, units: Sequence[Unit], found: dict[str, np.ndarray]
    ) -> None:
        """Keep a finished piece."""
        tensors = {name: torch.from_numpy(column).contiguous() for name, column in found.items()}
        write_atomically(
            self._path(group, layer),
            lambda path: save_file(tensors, path, metadata={"key": self._key(units)}),
            is_durable=False,
        )

    def budget(self, decoder: Decoder) -> Budget:
        """The budget of the session before, so that its tables are those of one session.

        How sums are cut into pieces moves their last digits. Where there was none, it is measured.
        """
        path = self.folder / BUDGET
        if path.is_file():
            return Budget(json.loads(path.read_text(encoding="utf-8"))["max_tokens"])
        budget = Budget.measured(decoder)
        self.keep(budget)
        return budget

    def keep(self, budget: Budget) -> None:
        """Note the budget that the next piece is to be run with."""
        write_json(self.folder / BUDGET, {"max_tokens": budget.max_tokens})

    def _path(self, group: int | str, layer: str) -> Path:
        return self.folder / f"sweep-{group}-{layer}.safetensors"

    def _key(self, units: Sequence[Unit]) -> str:
        text = "\n".join([self.identity, *(unit.key for unit in units)])
        return hashlib.sha256(text.encode()).hexdigest()
