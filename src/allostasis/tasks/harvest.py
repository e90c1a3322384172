"""Windows of a document, and a language model's activations in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

UNEMBED_INPUT = "unembed_input"
RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
Change = Callable[[Tensor], Tensor | None]
"""What is done with the stream at a hook; None leaves it as it is."""


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document, as a model reads them.

    Attributes:
        tokens: With the BOS that the model wants.
        counts: Which of them become rows: not the window's first, where a model keeps its attention
            sink, and no special token.
        ids: One row for each that counts: document, position, token, next token, split.
    """

    tokens: list[int]
    counts: list[bool]
    ids: Int32[np.ndarray, "row 5"]


def windows_of(model: Any, text: str, size: int, *, document: int, split: int) -> list[Window]:
    """A document cut into windows; one whose tokens would all be left out is none.

    Args:
        model: A `LanguageModel`.
        text: The document.
        size: Tokens of a window, BOS included.
        document: Its number.
        split: Its split's number.
    """
    special = {*model.tokenizer.all_special_ids}
    own = model.tokenizer.encode(text, add_special_tokens=False)
    first = [model.tokenizer.bos_token_id] if model.identity["prepend_bos"] else []
    step = size - len(first)
    found = []
    for start in range(0, len(own), step):
        piece = own[start : start + step]
        tokens = [*first, *piece]
        counts = [at > 0 and token not in special for at, token in enumerate(tokens)]
        rows = [
            (document, at, own[at], own[at + 1] if at + 1 < len(own) else -1, split)
            for at in range(start, start + len(piece))
            if counts[at - start + len(first)]
        ]
        if rows:
            found.append(Window(tokens, counts, np.array(rows, dtype=np.int32)))
    return found


class _Read(NamedTuple):
    """Windows as a model reads them, padded on the right, on its device."""

    tokens: Int[Tensor, "window position"]
    real: Bool[Tensor, "window position"]
    counts: Bool[Tensor, "window position"]


def _padded(model: Any, windows: Sequence[Window]) -> _Read:
    size = max(len(window.tokens) for window in windows)
    pad, device = model.tokenizer.pad_token_id or 0, model.decoder.device
    tokens = [[*w.tokens, *[pad] * (size - len(w.tokens))] for w in windows]
    real = [[True] * len(w.tokens) + [False] * (size - len(w.tokens)) for w in windows]
    counts = [[*w.counts, *[False] * (size - len(w.counts))] for w in windows]
    return _Read(*(torch.tensor(rows, device=device) for rows in (tokens, real, counts)))


def _last_states(model: Any, read: _Read) -> Float[Tensor, "window position d"]:
    """What the unembedding reads; the unembedding is not computed."""
    output = model.hf.base_model(
        input_ids=read.tokens, attention_mask=read.real.long(), use_cache=False
    )
    return output.last_hidden_state


@torch.no_grad()
def harvest(
    model: Any, windows: Sequence[Window], hooks: Sequence[str]
) -> dict[str, Float[Tensor, "row d"]]:
    """A forward pass over windows: the rows that count, on the CPU, by hook.

    Raises:
        ValueError: A hook is not one that can be harvested, or names a layer that is not there.
    """
    read = _padded(model, windows)
    found: dict[str, Tensor] = {}

    def look(hook: str) -> Change:
        def keep(acts: Tensor) -> None:
            found[hook] = acts

        return keep

    with ExitStack() as stack:
        for hook in hooks:
            if hook != UNEMBED_INPUT:
                stack.enter_context(_at(model.decoder, hook, look(hook)))
        last = _last_states(model, read)
    if UNEMBED_INPUT in hooks:
        found[UNEMBED_INPUT] = last
    return {hook: found[hook][read.counts].cpu() for hook in hooks}


@torch.no_grad()
def unembed_input_with(
    model: Any,
    windows: Sequence[Window],
    hook: str,
    stand_in: Callable[[Float[Tensor, "row d"]], Float[Tensor, "row d"]],
) -> Float[Tensor, "row d"]:
    """What the unembedding reads of the rows that count, when others stand in for them at a hook.

    Rows that do not count (a window's first token, special ones) stay as they are.

    Args:
        model: A `LanguageModel`.
        windows: What it reads, all at once.
        hook: `blocks.L.hook_resid_pre` or `_post`.
        stand_in: Gives, of the rows at the hook, those in their place.

    Raises:
        ValueError: The hook is not one that can be harvested.
    """
    read = _padded(model, windows)

    def put(acts: Tensor) -> Tensor:
        changed = acts.clone()
        changed[read.counts] = stand_in(acts[read.counts]).to(acts)
        return changed

    with _at(model.decoder, hook, put):
        return _last_states(model, read)[read.counts].cpu()


def _at(decoder: Any, hook: str, change: Change) -> Any:
    """Show the stream at a hook to a function, and go on with what it gives, if anything."""
    match = RESIDUAL.fullmatch(hook)
    if match is None or int(match[1]) >= decoder.n_layers:
        raise ValueError(
            f"hook='{hook}' cannot be harvested; it is {UNEMBED_INPUT}, blocks.L.hook_resid_pre or "
            f"blocks.L.hook_resid_post, L from 0 to {decoder.n_layers - 1}"
        )
    block = decoder.blocks[int(match[1])]
    if match[2] == "pre":

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = change(args[0] if args else kwargs["hidden_states"])
            if changed is None:
                return None
            if args:
                return (changed, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": changed}

        return block.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: Any, args: tuple[Any, ...], output: Any) -> Any:  # noqa: ARG001
        changed = change(output[0] if isinstance(output, tuple) else output)
        if changed is None or not isinstance(output, tuple):
            return changed
        return (changed, *output[1:])

    return block.register_forward_hook(after)
