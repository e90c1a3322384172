"""Prompts that begin alike, run as one sequence in which each common beginning stands once.

Tokens of a pack are the nodes of the prompts' prefix tree. A token attends to the tokens on its own
path alone and has its position on it, so that every prompt's last token comes out as if the prompt
had been run by itself. An intervention that does the same to every prompt at all positions does the
same to a beginning that several share; nothing else may be run this way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from allostasis.engines.prompts import Group, Prompt, Rows
from allostasis.interventions.ablate import Unit
from allostasis.models.blocks import Decoder

LIMIT = 128
"""Tokens of a pack, if no prompt is longer: attention's cost grows with their square."""

WORTH = 1.1
"""How many times fewer tokens packs must have to be used; chosen, not measured."""


def can_share(units: Sequence[Unit]) -> bool:
    """Whether units do the same to every prompt at all positions."""
    return all(unit.source is None and unit.positions == "all" for unit in units)


def pack_rows(rows: Rows, decoder: Decoder) -> list[Group] | None:
    """A sweep's rows as packs; None where prompts share too little, or a window would cut one."""
    longest = max(map(len, rows.prompts))
    window = getattr(decoder.config, "sliding_window", None)
    if window is not None and longest > window:
        return None
    packs: list[_Pack] = []
    for prompt in sorted(set(rows.prompts)):
        if not packs or packs[-1].size_with(prompt) > max(LIMIT, longest):
            packs.append(_Pack())
        packs[-1].add(prompt)
    n_apart = sum(map(len, set(rows.prompts)))
    if n_apart < WORTH * sum(len(pack.tokens) for pack in packs):
        return None
    return [pack.group(rows, decoder) for pack in packs]


class _Pack:
    """A prefix tree that grows by prompts in sorted order.

    Attributes:
        tokens: Of each node, its token.
        parent: Of each node, the node before it; -1 at a first token.
        ends: Of each prompt, the node of its last token.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parent: list[int] = []
        self.ends: dict[Prompt, int] = {}
        self._newest: Prompt = ()
        self._path: list[int] = []  # its nodes

    def _shared(self, prompt: Prompt) -> int:
        """Of sorted prompts, none shares more with this one than the one just before it."""
        pairs = zip(prompt, self._newest, strict=False)
        return next((at for at, (a, b) in enumerate(pairs) if a != b), len(self._newest))

    def size_with(self, prompt: Prompt) -> int:
        """How many nodes there would be."""
        return len(self.tokens) + len(prompt) - self._shared(prompt)

    def add(self, prompt: Prompt) -> None:
        """Take a prompt in."""
        path = self._path[: self._shared(prompt)]
        for token in prompt[len(path) :]:
            self.parent.append(path[-1] if path else -1)
            path.append(len(self.tokens))
            self.tokens.append(token)
        self.ends[prompt], self._newest, self._path = path[-1], prompt, path

    def group(self, rows: Rows, decoder: Decoder) -> Group:
        """What a sweep runs."""
        n, device = len(self.tokens), decoder.device
        sees, depth = torch.eye(n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.long)
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                sees[node] |= sees[parent]
                depth[0, node] = depth[0, parent] + 1
        hidden = torch.finfo(decoder.dtype).min
        mask = torch.zeros(n, n, dtype=decoder.dtype).masked_fill(~sees, hidden)
        chosen = [row for row, prompt in enumerate(rows.prompts) if prompt in self.ends]
        kinds = {prompt: kind for kind, prompt in enumerate(self.ends)}
        return Group(
            ids=torch.tensor([self.tokens], device=device),
            mask=mask[None, None].to(device),
            positions=depth.to(device),
            last=torch.tensor([[*self.ends.values()]], device=device),
            rows=np.array(chosen),
            kind=torch.tensor([kinds[rows.prompts[row]] for row in chosen]),
            target=torch.tensor([rows.target[row] for row in chosen], device=device),
            foil=torch.tensor([rows.foil[row] for row in chosen], device=device),
        )
