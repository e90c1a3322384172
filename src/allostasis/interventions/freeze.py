"""Heads frozen in their weights, or in what routes them, while the rest of the model trains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FreezeKind = Literal["none", "heads", "routing", "module"]

ROUTING = ("W_Q", "b_Q", "W_K", "b_K")
WRITING = ("W_V", "b_V", "W_O")
PARTS: Mapping[FreezeKind, tuple[str, ...]] = {
    "none": (),
    "heads": ROUTING + WRITING,
    "routing": ROUTING,
    "module": (*ROUTING, *WRITING, "b_O"),
}


@dataclass(frozen=True)
class Slice:
    """Some heads' part of a parameter, or the whole of it where `heads` is None."""

    name: str
    parameter: Tensor
    heads: tuple[int, ...] | None

    @property
    def index(self) -> slice | list[int]:
        """What to index the parameter's first axis with.

        Neighbouring heads are a slice: a list costs a GPU a sort at each assignment.
        """
        if self.heads is None:
            return slice(None)
        first, last = min(self.heads), max(self.heads)
        is_run = len(set(self.heads)) == len(self.heads) == last + 1 - first
        return slice(first, last + 1) if is_run else list(self.heads)

    @torch.no_grad()
    def read(self) -> Tensor:
        """A copy of its values."""
        return self.parameter[self.index].detach().clone()


class Freeze:
    """Keeps slices of attention weights bit by bit what they are.

    Gradients of the slices are zeroed before every update and the values are copied back after it:
    momentum and decoupled decay move a weight whose gradient is zero.

    Args:
        named: The model's parameters; attention's are named `blocks.<layer>.attn.<part>`, with
            heads on the first axis (but b_O, which heads share).
        kind: `heads`: W_Q, W_K, W_V, their biases and W_O of some heads, in every layer; `routing`:
            W_Q, W_K and their biases of those heads; `module`: all of attention, shared bias
            included; `none`.
        heads: Which heads; `module` takes all and ignores them.

    Raises:
        ValueError: A head does not exist, no head is named, or the model has no such weights.
    """

    def __init__(
        self, named: Mapping[str, Tensor], *, kind: FreezeKind, heads: Sequence[int]
    ) -> None:
        self.kind = kind
        self.slices: tuple[Slice, ...] = tuple(_slices(named, kind, tuple(heads)))
        self._kept = [part.read() for part in self.slices]
        self._free = {
            name: parameter
            for name, parameter in named.items()
            if ".attn." in name and name.rpartition(".")[2] != "b_O"
        }
        self._began = {name: value.detach().clone() for name, value in self._free.items()}

    @property
    def n_frozen(self) -> int:
        """Parameters that do not move."""
        return sum(kept.numel() for kept in self._kept)

    def zero_gradients(self) -> None:
        """Take the slices out of the gradient; call between backward and the optimiser's step."""
        for part in self.slices:
            if part.parameter.grad is not None:
                part.parameter.grad[part.index] = 0

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the slices back; call after every optimiser step."""
        for part, kept in zip(self.slices, self._kept, strict=True):
            part.parameter[part.index] = kept

    def largest_change(self) -> float:
        """Largest change of a frozen weight since the beginning, which must be exactly 0."""
        return max(
            (
                float((part.read() - kept.to(part.parameter.device)).abs().max())
                for part, kept in zip(self.slices, self._kept, strict=True)
            ),
            default=0.0,
        )

    def free_change(self) -> float:
        """Largest change of an attention weight that is not frozen; 0 where all of them are."""
        frozen = {part.name: part.index for part in self.slices}
        largest = 0.0
        for name, parameter in self._free.items():
            moved = (parameter.detach() - self._began[name].to(parameter.device)).abs()
            if name in frozen:
                moved[frozen[name]] = 0
            largest = max(largest, float(moved.max()))
        return largest

    def state_dict(self) -> dict[str, list[Tensor] | dict[str, Tensor]]:
        """What an interrupted run needs to know where it began."""
        return {"kept": self._kept, "began": self._began}

    def load_state_dict(self, state: Mapping[str, list[Tensor] | dict[str, Tensor]]) -> None:
        """Take up where `state_dict` left off."""
        kept, began = state["kept"], state["began"]
        assert isinstance(kept, list)
        assert isinstance(began, dict)
        # a checkpoint is read on the CPU
        self._kept = [
            value.to(part.parameter.device) for part, value in zip(self.slices, kept, strict=True)
        ]
        self._began = began


def _slices(
    named: Mapping[str, Tensor], kind: FreezeKind, heads: tuple[int, ...]
) -> Iterator[Slice]:
    if kind == "none":
        return
    if kind != "module" and not heads:
        raise ValueError(f"freeze={kind} with no frozen_heads freezes nothing; name heads")
    found = 0
    for name, parameter in named.items():
        match = re.fullmatch(r"blocks\.\d+\.attn\.(\w+)", name)
        if match is None or match[1] not in PARTS[kind]:
            continue
        n_heads = len(parameter)
        unknown = [head for head in heads if not 0 <= head < n_heads]
        if kind != "module" and unknown:
            raise ValueError(
                f"frozen_heads={list(heads)}: head {unknown[0]} does not exist; every layer has "
                f"heads 0 to {n_heads - 1}"
            )
        found += 1
        yield Slice(name, parameter, None if kind == "module" else heads)
    if not found:
        raise ValueError(
            f"freeze={kind}: the model has no weights blocks.<layer>.attn.{PARTS[kind][0]} with a "
            "head axis, so that no head could be frozen alone"
        )
