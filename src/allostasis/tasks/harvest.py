"""Windows of a document, and a language model's activations in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

UNEMBED_INPUT = "unembed_input"
RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


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


@torch.no_grad()
def harvest(
    model: Any, windows: Sequence[Window], hooks: Sequence[str]
) -> dict[str, Float[Tensor, "row d"]]:
    """A forward pass over windows: the rows that count, on the CPU, by hook.

    The unembedding is not computed: its input is what the rest of the model gives.

    Raises:
        ValueError: A hook is not one that can be harvested, or names a layer that is not there.
    """
    size = max(len(window.tokens) for window in windows)
    device = model.decoder.device
    pad = model.tokenizer.pad_token_id or 0
    tokens = torch.tensor([[*w.tokens, *[pad] * (size - len(w.tokens))] for w in windows])
    real = torch.tensor([
        [True] * len(w.tokens) + [False] * (size - len(w.tokens)) for w in windows
    ])
    counts = torch.tensor([[*w.counts, *[False] * (size - len(w.counts))] for w in windows])
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for hook in hooks:
            if hook != UNEMBED_INPUT:
                stack.enter_context(_watch(model.decoder, hook, found))
        output = model.hf.base_model(
            input_ids=tokens.to(device), attention_mask=real.long().to(device), use_cache=False
        )
    if UNEMBED_INPUT in hooks:
        found[UNEMBED_INPUT] = output.last_hidden_state
    return {hook: _chosen(found[hook], counts.to(device)) for hook in hooks}


def _chosen(
    acts: Float[Tensor, "window position d"], counts: Bool[Tensor, "window position"]
) -> Float[Tensor, "row d"]:
    return acts[counts].cpu()


def _watch(decoder: Any, hook: str, found: dict[str, Tensor]) -> Any:
    match = RESIDUAL.fullmatch(hook)
    if match is None or int(match[1]) >= decoder.n_layers:
        raise ValueError(
            f"hook='{hook}' cannot be harvested; it is {UNEMBED_INPUT}, blocks.L.hook_resid_pre or "
            f"blocks.L.hook_resid_post, L from 0 to {decoder.n_layers - 1}"
        )
    block = decoder.blocks[int(match[1])]
    if match[2] == "pre":

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[hook] = args[0] if args else kwargs["hidden_states"]

        return block.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: Any, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        found[hook] = output[0] if isinstance(output, tuple) else output

    return block.register_forward_hook(after)
