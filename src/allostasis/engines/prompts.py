"""Prompts of a sweep: each kind once, grouped so that no padded position is ever read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.models.blocks import Decoder

Prompt = tuple[int, ...]
Pad = Literal["none", "left", "right"]
Places = Sequence[tuple[int, int]]
"""Positions that have a role in a prompt, each with where it is in its source."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is asked of the model, one row a prompt with its own pair of answers.

    Attributes:
        prompts: Token ids; lengths may differ.
        target: Token id of the right answer.
        foil: Token id of the wrong one.

    Raises:
        ValueError: A prompt is empty or has no pair of its own.
    """

    prompts: Sequence[Prompt]
    target: Sequence[int]
    foil: Sequence[int]

    def __post_init__(self) -> None:
        counts = {len(self.prompts), len(self.target), len(self.foil)}
        if len(counts) > 1 or not self.prompts:
            raise ValueError(
                f"{len(self.prompts)} prompts with {len(self.target)} targets and "
                f"{len(self.foil)} foils: each prompt needs its own pair"
            )
        if not all(self.prompts):
            raise ValueError("a prompt without tokens has no last token to read")

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass
class Group:
    """Prompts that run together.

    Attributes:
        ids: Token ids, one row a kind: prompts that are equal and get equal values put in are one.
            In a pack (`engines.packs`) one row holds several kinds.
        mask: 1 at real tokens; in a pack, what is added to attention scores; None where no row is
            padded.
        positions: Each token's place in its prompt; None where it follows from the mask.
        last: Index of each kind's last real token, by row.
        rows: Which of the sweep's rows are here.
        kind: For each of them, which entry of `last` is its own, counted row by row.
        target: For each of them, the right answer.
        foil: For each of them, the wrong answer.
        sources: By name, the prompts of each kind whose mean activations are put in.
        aligned: By role, for each position of each kind, where it is in the run that values come
            from; -1 at positions without the role.
    """

    ids: Int[Tensor, "kind position"]
    mask: Int[Tensor, "kind position"] | Float[Tensor, "1 1 position position"] | None
    last: Int[Tensor, "kind end"]
    rows: np.ndarray
    kind: Int[Tensor, " row"]
    target: Int[Tensor, " row"]
    foil: Int[Tensor, " row"]
    positions: Int[Tensor, "kind position"] | None = None
    sources: dict[str, list[Sequence[Prompt]]] = field(default_factory=dict)
    aligned: dict[str, Int[Tensor, "kind position"]] = field(default_factory=dict)


def group_rows(
    rows: Rows,
    sources: Mapping[str, Sequence[Sequence[Prompt]]],
    pad: Pad,
    decoder: Decoder,
    roles: Mapping[str, Sequence[Places]] | None = None,
) -> list[Group]:
    """Group a sweep's rows by length, or all of them with padding.

    Raises:
        ValueError: A source does not have prompts of the right length for every row, or a role not
            places within every prompt.
    """
    roles = roles or {}
    _check_roles(rows, roles, pad)
    for name, wanted in sources.items():
        if len(wanted) != len(rows) or not all(wanted):
            raise ValueError(
                f"source '{name}' has prompts for {sum(map(bool, wanted))} of {len(rows)} rows"
            )
        for row, (prompt, some) in enumerate(zip(rows.prompts, wanted, strict=True)):
            lengths = sorted({len(other) for other in some})
            if lengths != [len(prompt)]:
                raise ValueError(
                    f"source '{name}', row {row}: a prompt of {len(prompt)} tokens can take values "
                    f"of prompts of the same length only, got {lengths}"
                )
    if pad != "none" and sources:
        raise ValueError("values of other prompts are put in at equal lengths; take pad=none")
    together: dict[int, list[int]] = defaultdict(list)
    for row, prompt in enumerate(rows.prompts):
        together[len(prompt) if pad == "none" else 0].append(row)
    return [
        _group(rows, chosen, sources, pad, decoder, roles) for _, chosen in sorted(together.items())
    ]


def _check_roles(rows: Rows, roles: Mapping[str, Sequence[Places]], pad: Pad) -> None:
    if pad != "none" and roles:
        raise ValueError("roles are places in prompts without padding; take pad=none")
    for name, wanted in roles.items():
        if len(wanted) != len(rows):
            raise ValueError(f"role '{name}' has places for {len(wanted)} of {len(rows)} rows")
        for row, (prompt, places) in enumerate(zip(rows.prompts, wanted, strict=True)):
            if not all(0 <= at < len(prompt) for pair in places for at in pair):
                raise ValueError(
                    f"role '{name}', row {row}: places {list(places)} do not all lie within its "
                    f"{len(prompt)} tokens"
                )


def _group(
    rows: Rows,
    chosen: Sequence[int],
    sources: Mapping[str, Sequence[Sequence[Prompt]]],
    pad: Pad,
    decoder: Decoder,
    roles: Mapping[str, Sequence[Places]],
) -> Group:
    kinds: dict[tuple[object, ...], int] = {}
    first: list[int] = []
    kind = []
    for row in chosen:
        key = (
            rows.prompts[row],
            *(p for name in sources for p in sources[name][row]),
            *(tuple(roles[name][row]) for name in roles),
        )
        if key not in kinds:
            kinds[key] = len(kinds)
            first.append(row)
        kind.append(kinds[key])
    prompts = [rows.prompts[row] for row in first]
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if pad == "left" else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    aligned = {name: torch.full_like(ids, -1) for name in roles}
    for name, place in aligned.items():
        for kind_row, row in enumerate(first):
            for here, there in roles[name][row]:
                place[kind_row, here] = there
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    last = torch.full_like(lengths, width - 1) if pad == "left" else lengths - 1
    device, is_padded = decoder.device, not bool(mask.all())
    return Group(
        ids=ids.to(device),
        mask=mask.to(device) if is_padded else None,
        positions=(mask.cumsum(1) - 1).clamp(min=0).to(device) if is_padded else None,
        last=last[:, None].to(device),
        rows=np.array(chosen),
        kind=torch.tensor(kind),
        target=torch.tensor([rows.target[row] for row in chosen], device=device),
        foil=torch.tensor([rows.foil[row] for row in chosen], device=device),
        sources={name: [wanted[row] for row in first] for name, wanted in sources.items()},
        aligned={name: place.to(device) for name, place in aligned.items()},
    )
