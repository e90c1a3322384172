"""One group of prompts in a sweep: its clean pass, and every suffix that starts from it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.engines.budget import Budget
from allostasis.engines.keys import CleanKeys
from allostasis.engines.parts import Parts
from allostasis.engines.prompts import Group
from allostasis.engines.readouts import TRAJECTORY, Reader, trajectory_of
from allostasis.engines.start import Start
from allostasis.interventions.ablate import Site, Unit
from allostasis.interventions.latent import Latents
from allostasis.models.blocks import Capture, Decoder

SHAM = 1e-5
"""How far a sham unit may move a logit difference, relative to 1 + the largest one."""


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
        peak_memory_bytes: Most that was allocated on a GPU, or held by the process on a CPU.
    """

    forward_tokens: float = 0.0
    naive_forward_tokens: float = 0.0
    n_passes: int = 0
    n_unique: int = 0
    max_tokens: int = 0
    sham: float = 0.0
    wall_s: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Settings:
    """What a sweep reads and how.

    Attributes:
        names: Readouts.
        sites: Sites of all units, whose activations are kept.
        reuse_kv: Whether units that act on the last token alone run that token alone.
        latents: Dictionaries by the layer that they read.
        closeness: The source whose output is read too, if any.
    """

    names: tuple[str, ...]
    sites: frozenset[Site]
    reuse_kv: bool
    latents: Mapping[int, Latents] = field(default_factory=dict)
    closeness: str | None = None

    @property
    def kept(self) -> frozenset[str]:
        """Streams of the clean pass that a suffix needs."""
        wide = {"mlp_write", "attn_write"} if self.sites - {"z"} else set()
        return frozenset({"resid_pre", "z", "attn_out", *wide})


class GroupRun:
    """The clean pass of one group of prompts, made when it is first needed, and what follows.

    Args:
        decoder: The model.
        group: Its prompts.
        budget: How many tokens run side by side.
        profile: Where costs are added up.
        settings: What is read.
        parts: Where finished layers are kept.
        number: The group's number there.
        checks_sham: Whether a unit that changes nothing is run in each layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        group: Group,
        budget: Budget,
        profile: Profile,
        settings: Settings,
        parts: Parts | None = None,
        number: int | str = 0,
        *,
        checks_sham: bool = True,
    ) -> None:
        self.decoder, self.group, self.settings = decoder, group, settings
        self.budget, self.profile = budget, profile
        self.parts, self.number, self.checks_sham = parts, number, checks_sham
        self._sources: dict[str, Capture] = {}

    @cached_property
    def clean(self) -> Capture:
        """The untouched model's pass."""
        return self._captured(self.group.ids, self.group.mask, self.group.positions)

    @cached_property
    def keys(self) -> CleanKeys:
        """Its keys and values."""
        return CleanKeys(self.decoder, self.clean)

    @cached_property
    def reader(self) -> Reader:
        """What reads the group's answers."""
        closeness = self.settings.closeness
        return Reader(
            self.decoder,
            self.group,
            self._output_names,
            clean_end=self._at_last(self.clean),
            source_end=None if closeness is None else self._at_last(self.source(closeness)),
        )

    def _at_last(self, found: Capture) -> Float[Tensor, "kind d_model"]:
        end = found.resid_pre[-1]
        row = torch.arange(len(end), device=end.device)
        return end[row[:, None], self.group.last].flatten(0, 1)

    @property
    def _output_names(self) -> tuple[str, ...]:
        return tuple(name for name in self.settings.names if name not in TRAJECTORY)

    @cached_property
    def clean_columns(self) -> dict[str, np.ndarray]:
        """Readouts of the untouched model, one number a row."""
        return self._kept("clean", (), self._read_clean)

    @cached_property
    def source_columns(self) -> dict[str, np.ndarray]:
        """Readouts of the run that values come from, with the rows' answers; none without it."""
        name = self.settings.closeness
        if name is None:
            return {}
        return self._kept("source", (), lambda: self._read_run(self.source(name)))

    def finished(self, layer: int, units: Sequence[Unit]) -> dict[str, np.ndarray]:
        """Readouts of units that first act in a layer: [unit, row]; from disk where they lie."""
        return self._kept(str(layer), units, lambda: self.layer(layer, units))

    def _kept(
        self, name: str, units: Sequence[Unit], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        if self.parts is None:
            return make()
        found = self.parts.read(self.number, name, units, self.settings.names)
        if found is None:
            found = make()
            self.parts.write(self.number, name, units, found)
            self.parts.keep(self.budget)
        return found

    def _read_clean(self) -> dict[str, np.ndarray]:
        return self._read_run(self.clean)

    def _read_run(self, found_in: Capture) -> dict[str, np.ndarray]:
        found = self.reader.read(self._at_last(found_in)[None])
        if self.settings.names[-1] in TRAJECTORY:
            found |= self._of_kinds(trajectory_of(found_in.resid_pre[-2])[None])
        return {name: numpy(column)[0] for name, column in found.items()}

    def _of_kinds(self, columns: Float[Tensor, "unit kind number"]) -> dict[str, Tensor]:
        """Trajectory numbers of each row, by name."""
        rows = columns[:, self.group.kind.to(columns.device)]
        return dict(zip(TRAJECTORY, rows.unbind(-1), strict=True))

    def layer(self, layer: int, units: Sequence[Unit]) -> dict[str, np.ndarray]:
        """Readouts of units that first act in a layer: [unit, row of the group]."""
        if self.checks_sham:
            sham = Unit(members=((layer, 0),), scale=1.0)
            pair = torch.zeros(1, 2, dtype=torch.long, device=self.decoder.device)
            self._check_sham(layer, self._end(layer, [sham], pair)[0])
        n_rows, n_ends = self.group.last.shape
        like = {"dtype": self.decoder.dtype, "device": self.decoder.device}
        ends = torch.empty(len(units), n_rows, n_ends, self.decoder.d_model, **like)
        paths = torch.empty(len(units), n_rows, len(TRAJECTORY), device=self.decoder.device)
        for chosen in self._together(units):
            every = torch.cartesian_prod(torch.arange(len(chosen)), torch.arange(n_rows))
            pairs, place = every.to(ends.device), torch.tensor(chosen, device=ends.device)
            subset = [units[index] for index in chosen]

            def do(piece: slice, pairs: Tensor, place: Tensor, subset: Sequence[Unit]) -> None:
                own = pairs[piece]
                end, path = self._end(layer, subset, own)
                ends[place[own[:, 0]], own[:, 1]] = end
                if path is not None:
                    paths[place[own[:, 0]], own[:, 1]] = path

            width = 1 if self._is_tail(subset[0]) else self.group.ids.shape[1]
            self.budget.run(len(pairs), width, partial(do, pairs=pairs, place=place, subset=subset))
        found = self.reader.read(ends.flatten(1, 2))
        if self.settings.names[-1] in TRAJECTORY:
            found |= self._of_kinds(paths)
        return {name: numpy(column) for name, column in found.items()}

    def _together(self, units: Sequence[Unit]) -> list[list[int]]:
        """Which units share a stack: those of one layer, apart by what they run, others alone."""
        tail = [i for i, unit in enumerate(units) if self._is_tail(unit)]
        whole = [i for i, u in enumerate(units) if len(u.layers) == 1 and not self._is_tail(u)]
        alone = [[i] for i, u in enumerate(units) if len(u.layers) > 1 and not self._is_tail(u)]
        single = [i for i in tail if len(units[i].layers) == 1]
        across = [[i] for i in tail if len(units[i].layers) > 1]
        return [chosen for chosen in (single, whole, *across, *alone) if chosen]

    def _is_tail(self, unit: Unit) -> bool:
        return self.settings.reuse_kv and unit.positions == "last"

    def _end(
        self, layer: int, units: Sequence[Unit], pairs: Int[Tensor, "pair 2"]
    ) -> tuple[Float[Tensor, "pair end d_model"], Float[Tensor, "pair number"] | None]:
        """The stream at the last real tokens behind the last block, of (unit, row of ids) pairs.

        And what is read of all positions before the last block, where that is wanted.
        """
        decoder, kind, last = self.decoder, pairs[:, 1], self.decoder.n_layers - 1
        keys = self.keys if self._is_tail(units[0]) else None
        start = Start(
            decoder, self.clean, self.group, layer, units, pairs[:, 0], kind, self.source,
            self.settings.latents, keys,
        )  # fmt: skip
        resid = start.after_block()
        path = self._path(None, kind) if layer == last else None
        with start.later_members():
            for later in range(layer + 1, decoder.n_layers):
                if later == last:
                    path = self._path(resid, kind)
                attn_out = decoder.attention(later, resid, start.call(later))
                if later == last:
                    resid, attn_out = start.at_last(resid), start.at_last(attn_out)
                resid = start.after_later_block(later, resid, attn_out)
        self.profile.n_passes += 1
        n_ends = self.group.last.shape[1]
        layers = decoder.n_layers - layer - 1  # the last one, and this one if last, at ends alone
        tokens = layers + 1 if keys is not None else self.group.ids.shape[1] * layers + n_ends
        self.profile.forward_tokens += len(pairs) * tokens / decoder.n_layers
        return resid, path

    def _path(
        self, resid: Float[Tensor, "pair position d_model"] | None, kind: Int[Tensor, " pair"]
    ) -> Float[Tensor, "pair number"] | None:
        """Trajectory numbers of the stream before the last block; None where it is as it was."""
        if self.settings.names[-1] not in TRAJECTORY:
            return None
        whole = self.clean.resid_pre[-2][kind]
        if resid is not None and resid.shape[1] == whole.shape[1]:
            whole = resid
        elif resid is not None:  # only the last token was run
            whole = torch.cat([whole[:, :-1], resid], dim=1)
        return trajectory_of(whole)

    def _check_sham(self, layer: int, end: Float[Tensor, "1 end d_model"]) -> None:
        n_rows, n_ends = self.group.last.shape
        rows = np.flatnonzero(self.group.kind.numpy() < n_ends)  # those of the first row of ids
        clean = self.clean_columns["ld"]
        ends = end.repeat(1, n_rows, 1)
        found = numpy(self.reader.read(ends, only=("ld",))["ld"])[0]
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
            self._sources[name] = self._captured(ids, None, None).mixed(weights)
        return self._sources[name]

    def _captured(
        self, ids: Int[Tensor, "kind position"], mask: Tensor | None, positions: Tensor | None
    ) -> Capture:
        found = []
        for piece in self.budget.pieces(len(ids), ids.shape[1]):
            at = {"attention_mask": mask, "position_ids": positions}
            given = {name: value[piece] for name, value in at.items() if value is not None}
            found.append(self.decoder.capture(ids[piece], **given).only(self.settings.kept))
            self.profile.n_passes += 1
        self.profile.forward_tokens += ids.numel()
        return Capture.joined(found)


def numpy(column: Tensor) -> np.ndarray:
    """A column on the host, in float64."""
    return column.double().cpu().numpy()


def peak_memory(device: torch.device) -> int:
    """Most bytes that were allocated on a GPU, or held by this process, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
