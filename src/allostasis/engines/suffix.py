"""Many interventions on one model: one clean pass, then only the layers that can change.

A unit that first acts in layer l leaves everything before it as it was. So the clean pass is kept,
and a unit starts from it: a changed head adds (z' - z) W_O to the clean output of its attention,
after which the rest of block l and the blocks behind it are run, units and prompts side by side on
the batch axis. Only the last real token is ever read, so in the last block only that token's MLP is
computed. Nothing is approximated; the oracle is TransformerLens, one unit and one prompt at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.engines.budget import Budget
from allostasis.engines.parts import Parts
from allostasis.engines.prompts import Group, Pad, Places, Prompt, Rows, group_rows
from allostasis.engines.readouts import CLOSENESS, READOUTS, Reader
from allostasis.engines.start import Start
from allostasis.interventions.ablate import Unit
from allostasis.interventions.latent import Latents
from allostasis.models.blocks import Capture, Decoder

SHAM = 1e-5
"""How far a sham unit may move a logit difference, relative to 1 + the largest one."""


Precision = Literal["fp32", "bf16"]


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Let float32 products round their factors to bfloat16 inside the block, or not at all."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bf16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class ShamError(RuntimeError):
    """An intervention that changes nothing moved the output: the engine is wrong here."""


@dataclass
class Profile:
    """What a sweep cost.

    Attributes:
        forward_tokens: Tokens times layers run, over the model's layers: a token through all of
            them counts 1. Clean and reference passes are included.
        naive_forward_tokens: What a full pass for every unit and row would have cost.
        n_passes: Calls of the model or of a suffix.
        n_unique: Prompts that differ in themselves or in what is put into them.
        max_tokens: Tokens that were run side by side.
        sham: Largest |delta ld| of units that change nothing.
        wall_s: Seconds.
    """

    forward_tokens: float = 0.0
    naive_forward_tokens: float = 0.0
    n_passes: int = 0
    n_unique: int = 0
    max_tokens: int = 0
    sham: float = 0.0
    wall_s: float = 0.0


@dataclass(frozen=True)
class Swept:
    """Readouts of a sweep.

    Attributes:
        units: In the order given.
        values: By readout, one row a unit and one column a prompt.
        clean: The same of the untouched model, one number a prompt.
        source: The same of the run that values come from, where `closeness` names one.
        profile: What it cost.
    """

    units: tuple[Unit, ...]
    values: dict[str, np.ndarray]
    clean: dict[str, np.ndarray]
    source: dict[str, np.ndarray]
    profile: Profile


@torch.no_grad()
def sweep(
    decoder: Decoder,
    rows: Rows,
    units: Sequence[Unit],
    *,
    sources: Mapping[str, Sequence[Sequence[Prompt]]] | None = None,
    roles: Mapping[str, Sequence[Places]] | None = None,
    latents: Sequence[Latents] = (),
    closeness: str | None = None,
    full: bool = True,
    pad: Pad = "none",
    precision: Precision = "fp32",
    budget: Budget | None = None,
    parts: Parts | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Swept:
    """Run every unit on every row.

    Args:
        decoder: The model.
        rows: Prompts and their answers.
        units: What to do to it, one at a time.
        sources: For each `Unit.source`, for each row, the prompts (of that row's length) whose mean
            activations are put in; one prompt for `resample` and `patch`.
        roles: For each ROLE of units at `aligned:ROLE`, the positions of each row that have it,
            with where they are in the row's source.
        latents: Dictionaries for units at `sae_latent`, at most one a layer.
        closeness: A source, of one prompt a row: its output is read too, and `kl_source` says how
            far from it each unit's output still is.
        full: Whether to read all of `READOUTS`; otherwise `ld` alone, which needs two columns of
            the unembedding.
        pad: `none` runs prompts of one length together; `left` and `right` mix lengths.
        precision: `bf16` rounds the factors of the suffixes' products to bfloat16 and adds in
            float32; the clean pass and the readouts stay as they are. To be re-checked
            (`engines.verify`).
        budget: How many tokens run side by side; measured where None.
        parts: Where finished layers are kept; what lies there is read instead of run.
        progress: Called with (done, planned) units after each layer.

    Returns:
        The readouts, in float64.

    Raises:
        ValueError: A unit does not fit the model, or a source is missing or of another length.
        ShamError: A unit that changes nothing moved a logit difference.
    """
    begun = time.perf_counter()
    names = READOUTS if full else READOUTS[:1]
    names += (CLOSENESS,) if full and closeness is not None else ()
    sources, by_layer = sources or {}, {dictionary.layer: dictionary for dictionary in latents}
    check_units(decoder, units, sources, roles or {}, by_layer)
    budget = budget or Budget.measured(decoder)
    groups = group_rows(rows, sources, pad, decoder, roles)
    profile = Profile(max_tokens=budget.max_tokens)
    values = {name: np.zeros((len(units), len(rows))) for name in names}
    clean, source = ({name: np.zeros(len(rows)) for name in names} for _ in range(2))
    done = 0
    for number, group in enumerate(groups):
        run = GroupRun(decoder, group, budget, profile, names, by_layer, closeness)
        for name in names:
            clean[name][group.rows] = run.clean_columns[name]
            if closeness is not None:
                source[name][group.rows] = run.source_columns[name]
        for layer in range(decoder.n_layers):
            chosen = [index for index, unit in enumerate(units) if unit.layer == layer]
            if not chosen:
                continue
            these = [units[index] for index in chosen]
            found = parts.read(number, layer, these) if parts is not None else None
            if found is None:
                with products_in(precision):
                    found = run.layer(layer, these)
                if parts is not None:
                    parts.write(number, layer, these, found)
            for name in names:
                values[name][np.array(chosen)[:, None], group.rows] = found[name]
            done += len(chosen)
            if progress is not None:
                progress(done, len(units) * len(groups))
    profile.n_unique = sum(len(group.ids) for group in groups)
    profile.max_tokens = budget.max_tokens
    profile.naive_forward_tokens = float(sum(map(len, rows.prompts)) * (len(units) + 1))
    profile.wall_s = time.perf_counter() - begun
    return Swept(tuple(units), values, clean, source if closeness is not None else {}, profile)


def check_units(
    decoder: Decoder,
    units: Sequence[Unit],
    sources: Mapping[str, Sequence[Sequence[Prompt]]],
    roles: Mapping[str, Sequence[Places]],
    latents: Mapping[int, Latents],
) -> None:
    """Refuse units that the model has no place for, or whose values are not given.

    Raises:
        ValueError: With what was got and what there is.
    """
    for unit in units:
        for layer, index in unit.members:
            if not 0 <= layer < decoder.n_layers:
                raise ValueError(
                    f"{unit.key}: the model has layers 0 to {decoder.n_layers - 1}, not {layer}"
                )
            if unit.site == "sae_latent" and layer not in latents:
                raise ValueError(f"{unit.key}: no dictionary that reads layer {layer} is given")
            noun, n = "heads", decoder.n_heads
            if unit.site == "mlp_post":
                noun, n = "neurons", decoder.W_down(layer).shape[0]
            if unit.site == "sae_latent":
                noun, n = "latents", latents[layer].n_latents
            if index is not None and not 0 <= index < n:
                hint = "Heads are written LAYER.HEAD, for example 9.6." if noun == "heads" else ""
                raise ValueError(
                    f"{unit.key}: layer {layer} has {noun} 0 to {n - 1}, not {index}. {hint}".strip()
                )
        if unit.role is not None and unit.role not in roles:
            raise ValueError(
                f"{unit.key}: no positions are given for role '{unit.role}'; given are "
                f"{', '.join(roles) or 'none'}"
            )
        if unit.site == "resid_mid" and decoder.is_parallel:
            raise ValueError(
                f"{unit.key}: attention and MLP of this model read the same stream, so that there "
                "is no resid_mid; take resid_pre or resid_post"
            )
        if unit.source is not None and unit.source not in sources:
            raise ValueError(
                f"{unit.key}: no prompts are given for '{unit.source}'; given are "
                f"{', '.join(sources) or 'none'}"
            )


class GroupRun:
    """The clean pass of one group of prompts, and what is run from it."""

    def __init__(
        self,
        decoder: Decoder,
        group: Group,
        budget: Budget,
        profile: Profile,
        names: Sequence[str],
        latents: Mapping[int, Latents],
        closeness: str | None,
    ) -> None:
        self.decoder, self.group, self.latents = decoder, group, latents
        self.budget, self.profile = budget, profile
        self.clean = self._captured(group.ids, group.mask)
        self._sources: dict[str, Capture] = {}
        at_end = torch.arange(len(group.ids)), group.last
        end, there = self.clean.resid_pre[-1][at_end], None
        if closeness is not None:
            there = self.source(closeness).resid_pre[-1][at_end]
        self.reader = Reader(decoder, group, names, clean_end=end, source_end=there)
        self.clean_columns = self.reader.read(end)
        self.source_columns = {} if there is None else self.reader.read(there)
        self.ends = len(end), end.shape[1]

    def layer(self, layer: int, units: Sequence[Unit]) -> dict[str, np.ndarray]:
        """Readouts of units that first act in a layer: [unit, row of the group]."""
        sham = Unit(members=((layer, 0),), scale=1.0)
        self._check_sham(layer, self._end(layer, [sham], torch.zeros(1, 2, dtype=torch.long)))
        n_kinds, width = self.ends
        ends = torch.empty(
            len(units), n_kinds, width, dtype=self.decoder.dtype, device=self.decoder.device
        )
        together = [index for index, unit in enumerate(units) if len(unit.layers) == 1]
        alone = [index for index, unit in enumerate(units) if len(unit.layers) > 1]
        for chosen in [together, *([index] for index in alone)]:
            pairs = torch.cartesian_prod(torch.arange(len(chosen)), torch.arange(n_kinds))
            subset = [units[index] for index in chosen]
            for piece in self.budget.pieces(len(pairs), self.group.ids.shape[1]):
                at = pairs[piece]
                ends[torch.tensor(chosen)[at[:, 0]], at[:, 1]] = self._end(layer, subset, at)
        columns = [self.reader.read(end) for end in ends]
        return {name: np.stack([column[name] for column in columns]) for name in columns[0]}

    def _end(
        self, layer: int, units: Sequence[Unit], pairs: Int[Tensor, "pair 2"]
    ) -> Float[Tensor, "pair d_model"]:
        """The stream at the last real token behind the last block, of (unit, kind) pairs."""
        decoder, which, kind = self.decoder, pairs[:, 0], pairs[:, 1]
        start = Start(
            decoder, self.clean, self.group, layer, units, which, kind, self.source, self.latents
        )
        resid = start.after_block()
        with start.later_members():
            for later in range(layer + 1, decoder.n_layers):
                attn_out = decoder.attention(later, resid, self.clean.calls[later].rows(kind))
                if later == decoder.n_layers - 1:
                    resid, attn_out = start.at_last(resid), start.at_last(attn_out)
                resid = start.after_later_block(later, resid, attn_out)
        self.profile.n_passes += 1
        layers = decoder.n_layers - layer - 1  # the last one, and this one if last, at one token
        tokens = self.group.ids.shape[1] * layers + 1
        self.profile.forward_tokens += len(pairs) * tokens / decoder.n_layers
        return resid[:, 0]

    def _check_sham(self, layer: int, end: Float[Tensor, "1 d_model"]) -> None:
        rows = np.flatnonzero(self.group.kind.numpy() == 0)
        clean = self.clean_columns["ld"]
        found = self.reader.read(end.expand(self.ends[0], -1), only=("ld",))["ld"]
        moved = float(np.abs(found - clean)[rows].max())
        self.profile.sham = max(self.profile.sham, moved)
        allowed = self.decoder_tolerance * (1 + float(np.abs(clean).max()))
        if moved > allowed:
            raise ShamError(
                f"a unit that changes nothing in layer {layer} moved the logit difference by "
                f"{moved:.2g} (allowed {allowed:.2g}): this model's blocks do something that "
                "allostasis/models/blocks.py does not know of"
            )

    @property
    def decoder_tolerance(self) -> float:
        """Relative rounding that is forgiven, by the dtype of the weights."""
        return SHAM * torch.finfo(self.decoder.dtype).eps / torch.finfo(torch.float32).eps

    def source(self, name: str) -> Capture:
        """What is put in place, kind by kind: means over each kind's prompts."""
        if name not in self._sources:
            wanted = self.group.sources[name]
            prompts = list(dict.fromkeys(prompt for some in wanted for prompt in some))
            at = {prompt: index for index, prompt in enumerate(prompts)}
            weights = torch.zeros(len(wanted), len(prompts), device=self.decoder.device)
            for kind, some in enumerate(wanted):
                for prompt in some:
                    weights[kind, at[prompt]] += 1 / len(some)
            ids = torch.tensor(prompts, device=self.decoder.device)
            self._sources[name] = self._captured(ids, None).mixed(weights)
        return self._sources[name]

    def _captured(
        self, ids: Int[Tensor, "kind position"], mask: Int[Tensor, "kind position"] | None
    ) -> Capture:
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        found = []
        for piece in self.budget.pieces(len(ids), ids.shape[1]):
            at = {"attention_mask": mask, "position_ids": positions}
            given = {name: value[piece] for name, value in at.items() if value is not None}
            found.append(self.decoder.capture(ids[piece], **given))
            self.profile.n_passes += 1
        self.profile.forward_tokens += ids.numel()
        return Capture.joined(found)
