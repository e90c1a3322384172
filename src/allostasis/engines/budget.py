"""How many tokens a sweep runs side by side: what memory allows, and what is fastest here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from allostasis.models.blocks import Decoder

log = logging.getLogger(__name__)

SAFETY = 0.6
TRIALS = (256, 512, 1024, 2048, 4096, 8192)
_measured: dict[tuple[int, torch.device, torch.dtype, int], int] = {}


@dataclass
class Budget:
    """Tokens that are run side by side.

    Attributes:
        max_tokens: Their number; at least one prompt is always run.
    """

    max_tokens: int

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: at least one token must be run")

    def pieces(self, n_items: int, n_positions: int) -> Iterator[slice]:
        """Cut a batch of sequences into slices that keep to the budget; it may shrink meanwhile."""
        begin = 0
        while begin < n_items:
            step = max(1, self.max_tokens // n_positions)
            yield slice(begin, min(begin + step, n_items))
            begin += step

    def run(self, n_items: int, n_positions: int, do: Callable[[slice], None]) -> None:
        """Do a batch of sequences in slices; where one does not fit, the budget is halved.

        Args:
            n_items: Sequences.
            n_positions: Their length.
            do: Called with each slice, and again with the first half of one that did not fit.

        Raises:
            MemoryError: A single token is too much.
        """
        begin = 0
        while begin < n_items:
            piece = next(self.pieces(n_items - begin, n_positions))
            try:
                do(slice(begin, begin + piece.stop))
            except torch.OutOfMemoryError:
                self.halve()
                log.warning("out of memory: %s tokens side by side from here on", self.max_tokens)
                continue
            begin += piece.stop

    def halve(self) -> None:
        """Keep to half of it from now on.

        Raises:
            MemoryError: A single token is too much.
        """
        if self.max_tokens == 1:
            raise MemoryError("one token does not fit into the device's memory beside the model")
        self.max_tokens //= 2

    @classmethod
    def measured(cls, decoder: Decoder, *, n_positions: int = 16) -> Budget:
        """The fastest of a few sizes that fit, timed on one block; on a GPU, the largest that fits.

        Stacking saves nothing where a core is busy with few rows already, so it is measured. The
        choice does not change results beyond rounding, and is noted in the sweep's profile.
        """
        limit = cls._limit(decoder)
        if decoder.device.type != "cpu":
            return cls(limit)
        key = (id(decoder.model), decoder.device, decoder.dtype, torch.get_num_threads())
        if key not in _measured:
            trials = [trial for trial in TRIALS if trial <= limit] or [limit]
            pace = {trial: _seconds_a_token(decoder, trial, n_positions) for trial in trials}
            _measured[key] = min(pace, key=lambda trial: pace[trial])
        return cls(_measured[key])

    @staticmethod
    def _limit(decoder: Decoder) -> int:
        """Tokens whose activations fill the free memory, with room to spare."""
        width = 8 * decoder.d_model + 3 * _d_mlp(decoder) + 4 * decoder.n_heads * decoder.d_head
        per_token = 4 * width
        if decoder.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(decoder.device)
        else:
            free = 2 * 2**30  # of main memory, which cannot be asked for portably
        return max(1, int(SAFETY * free / per_token))


def _d_mlp(decoder: Decoder) -> int:
    config = decoder.config
    wide = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(wide or 4 * decoder.d_model)


def _seconds_a_token(decoder: Decoder, n_tokens: int, n_positions: int) -> float:
    layer = decoder.n_layers // 2
    ids = torch.zeros(1, n_positions, dtype=torch.long, device=decoder.device)
    clean = decoder.capture(ids)
    row: Int[Tensor, " row"] = torch.zeros(max(1, n_tokens // n_positions), dtype=torch.long)
    resid, call = clean.resid_pre[layer][row], clean.calls[layer].rows(row)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        decoder.after_attention(layer, resid, decoder.attention(layer, resid, call))
        best = min(best, time.perf_counter() - start)
    return best / resid[..., 0].numel()
