"""Many interventions on one model: one clean pass, then only the layers that can change.

A unit that first acts in layer l leaves everything before it as it was. So the clean pass is kept,
and a unit starts from it: a changed head adds (z' - z) W_O to the clean output of its attention,
after which the rest of block l and the blocks behind it are run, units and prompts side by side on
the batch axis. Only the last real token is ever read, so in the last block only that token's MLP is
computed, and of a unit that acts on that token alone no other token is run in any block: it attends
to the clean keys and values of the others. Where units do the same to every prompt at all
positions, what prompts begin with in common is run once (`engines.packs`). Nothing is approximated;
the oracle is TransformerLens, one unit and one prompt at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from allostasis.engines.budget import Budget
from allostasis.engines.group_run import GroupRun, Profile, Settings, ShamError, peak_memory
from allostasis.engines.packs import can_share, pack_rows
from allostasis.engines.parts import Parts
from allostasis.engines.prompts import Pad, Places, Prompt, Rows, group_rows
from allostasis.engines.readouts import CLOSENESS, READOUTS, TRAJECTORY
from allostasis.interventions.ablate import Unit
from allostasis.interventions.latent import Latents
from allostasis.models.blocks import Decoder

__all__ = ["Precision", "Profile", "ShamError", "Swept", "check_units", "products_in", "sweep"]

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
    reuse_kv: bool = True,
    trajectory: bool = False,
    shares_prefixes: bool | None = None,
) -> Swept:
    """Run every unit on every row, layer by layer: what is finished is finished for all rows.

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
        budget: How many tokens run side by side; what `parts` keeps, else measured, where None.
        parts: Where finished layers are kept; what lies there is read instead of run.
        progress: Called with (done, planned) units after each layer.
        reuse_kv: Whether units that act on the last token alone run that token alone.
        trajectory: Whether to read `TRAJECTORY` too, of all positions before the last block.
        shares_prefixes: Whether to run common beginnings of prompts once; None does so where these
            units allow it. Parts of a sweep that is to go on with other units need the same choice.

    Returns:
        The readouts, in float64.

    Raises:
        ValueError: A unit does not fit the model, a source is missing or of another length, or
            prefixes are to be shared by units that do not do the same everywhere.
        ShamError: A unit that changes nothing moved a logit difference.
    """
    begun = time.perf_counter()
    if trajectory and pad != "none":
        raise ValueError("a trajectory runs over real tokens only; take pad=none")
    names = (
        *(READOUTS if full else READOUTS[:1]),
        *((CLOSENESS,) if full and closeness is not None else ()),
        *(TRAJECTORY if trajectory else ()),
    )
    sources, by_layer = sources or {}, {dictionary.layer: dictionary for dictionary in latents}
    check_units(decoder, units, sources, roles or {}, by_layer)
    if budget is None:
        budget = parts.budget(decoder) if parts is not None else Budget.measured(decoder)
    may_share = can_share(units) and pad == "none" and closeness is None and not trajectory
    if shares_prefixes and not may_share:
        raise ValueError(
            "prefixes can be shared only by units that scale, or set latents, at all positions, "
            "without padding, trajectory or closeness"
        )
    packs = None if shares_prefixes is False or not may_share else pack_rows(rows, decoder)
    groups = packs or group_rows(rows, sources, pad, decoder, roles)
    profile = Profile()
    settings = Settings(
        names,
        frozenset(unit.site for unit in units),
        reuse_kv and pad == "none",
        latents=by_layer,
        closeness=closeness,
    )
    runs = [
        GroupRun(
            decoder, group, budget, profile, settings, parts,
            f"pack{number}" if packs else number, checks_sham=not packs or number == 0,
        )
        for number, group in enumerate(groups)
    ]  # fmt: skip
    values = {name: np.zeros((len(units), len(rows))) for name in names}
    clean, source = ({name: np.zeros(len(rows)) for name in names} for _ in range(2))
    done = 0
    for layer in sorted({unit.layer for unit in units}):
        chosen = [index for index, unit in enumerate(units) if unit.layer == layer]
        with products_in(precision):
            pieces = [run.finished(layer, [units[index] for index in chosen]) for run in runs]
        for run, found in zip(runs, pieces, strict=True):
            for name in names:
                values[name][np.array(chosen)[:, None], run.group.rows] = found[name]
        done += len(chosen)
        if progress is not None:
            progress(done, len(units))
    for run in runs:
        for name, column in run.clean_columns.items():
            clean[name][run.group.rows] = column
        for name, column in run.source_columns.items():
            source[name][run.group.rows] = column
    profile.n_unique = sum(group.last.numel() for group in groups)
    profile.max_tokens = budget.max_tokens
    profile.naive_forward_tokens = float(sum(map(len, rows.prompts)) * (len(units) + 1))
    profile.peak_memory_bytes = peak_memory(decoder.device)
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
                hint = ". Heads are written LAYER.HEAD, for example 9.6." if noun == "heads" else ""
                raise ValueError(
                    f"{unit.key}: layer {layer} has {noun} 0 to {n - 1}, not {index}{hint}"
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
