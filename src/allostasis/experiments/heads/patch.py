"""The LightningModule of `heads_patch`: values of one run of a pair, put into the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge

from allostasis.analysis.patching import Direction
from allostasis.engines.parts import Parts
from allostasis.engines.prompts import Places, Prompt, Rows
from allostasis.engines.suffix import Swept, sweep
from allostasis.engines.verify import verify_slice
from allostasis.experiments.heads import choices, competence, patch_tables, tables
from allostasis.experiments.heads.asked import Asked
from allostasis.experiments.heads.choices import Layers
from allostasis.experiments.heads.lab import Engine, HeadLab, Keep, Span, Verify
from allostasis.experiments.heads.patch_plan import (
    Granularity,
    Plan,
    Windows,
    places,
    windows_of,
)
from allostasis.experiments.heads.tables import Planned, Readings
from allostasis.experiments.heads.vocabulary import Vocabulary
from allostasis.interventions.ablate import ALIGNED, Member, Unit
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.probes.task import Probes

WAYS: Mapping[str, tuple[Direction, ...]] = {
    "clean->corrupt": ("denoise",),
    "corrupt->clean": ("noise",),
    "both": ("noise", "denoise"),
}
SHAM = 1e-5
"""How far a patch of a run with itself may move a logit difference, relative to 1 + the largest."""
N_SHAM = 2


class HeadsPatch(HeadLab):
    """Activation patching between the clean and the corrupt prompt of each pair.

    Args:
        model: A language model.
        task: The corpus.
        direction: Patched-in run -> run that is patched: `clean->corrupt` is denoising,
            `corrupt->clean` noising.
        granularity: What is patched: the stream behind a layer, an MLP's write, a head's z, single
            neurons of an MLP.
        positions: Where: `all`, `last`, `each` (one after the other), `aligned:ROLE`, or indices;
            one for all granularities or one each.
        layers: In which layers: all, a list, or so many from the first to the last.
        heads: Which heads, for `head_out`.
        windows: Layers that are patched together: a list of [first, last], or the model's `thirds`.
            At the positions of their granularity; at all of them where that is `each`.
        neurons: For `mlp_post`: how many a layer, those of which what they write differs most
            between the runs of the train split; or a list such as ["4.17"].
        sham: Whether a sample of runs is patched with itself by everything that is planned.
        span: Which readouts of answers of several tokens.
        keep_examples: Interventions whose single examples are kept.
        engine: How the sweep is computed.
        verify: What of it is re-checked.

    Raises:
        ValueError: A layer, head, window, position or number of positions that does not fit.
    """

    splits = ("test",)

    def __init__(
        self,
        *,
        model: LanguageModel,
        task: Probes,
        direction: Literal["clean->corrupt", "corrupt->clean", "both"] = "both",
        granularity: Granularity | list[Granularity] = "layer_resid",
        positions: str | list[int] | list[str] = "last",
        layers: Layers = "all",
        heads: Literal["all"] | list[str] = "all",
        windows: Windows = "thirds",
        neurons: Annotated[int, Ge(1)] | list[str] = 8,
        sham: bool = True,
        span: Sequence[Span] = ("first_token",),
        keep_examples: Keep = "all",
        engine: Engine | None = None,
        verify: Verify | None = None,
    ) -> None:
        super().__init__(
            model=model, task=task, name="heads_patch", span=span, positions="all",
            trajectory=False, keep_examples=keep_examples, engine=engine, verify=verify,
        )  # fmt: skip
        self.directions = WAYS[direction]
        wanted: list[Granularity] = [granularity] if isinstance(granularity, str) else granularity
        self.granularity: tuple[Granularity, ...] = tuple(dict.fromkeys(wanted))
        if not self.granularity:
            raise ValueError("module.granularity is an empty list, so that nothing would be done")
        self.places = places(positions, self.granularity)
        self.layers = choices.layers(self.decoder, layers)
        self.heads = choices.heads(self.decoder, heads, layers)
        self.windows = windows_of(windows, self.granularity, self.decoder.n_layers)
        self.neurons, self.sham = neurons, sham

    # ------------------------------------------------------------------ pairs of runs

    @cached_property
    def corrupt(self) -> Asked:
        """The pairs' corrupt prompts, with the answers of the clean ones."""
        turned = [
            replace(
                each, tokens=replace(each.tokens, clean=each.corrupt_ids, corrupt=each.clean_ids)
            )
            for each in self.asked.examples
        ]
        return Asked(self.corpus, turned, seed=self.task.seed)

    @cached_property
    def _sides(self) -> dict[Direction, tuple[Rows, Sequence[Prompt]]]:
        """By direction, the rows that are patched and, one for one, where values come from."""
        clean, corrupt = self.asked.rows, self.corrupt.rows
        both = {"noise": (clean, corrupt.prompts), "denoise": (corrupt, clean.prompts)}
        return {direction: both[direction] for direction in self.directions}

    @cached_property
    def _rows(self) -> Rows:
        sides = [rows for rows, _ in self._sides.values()]
        return Rows(
            prompts=[prompt for rows in sides for prompt in rows.prompts],
            target=[target for rows in sides for target in rows.target],
            foil=[foil for rows in sides for foil in rows.foil],
        )

    @cached_property
    def _sources(self) -> dict[str, list[tuple[Prompt, ...]]]:
        return {"patch": [(prompt,) for _, some in self._sides.values() for prompt in some]}

    @cached_property
    def _roles(self) -> dict[str, list[Places]]:
        """Places by role, the same in both runs of a pair; `-3` is the third from the end.

        Places before the first token that differs are left out: both runs are the same there.
        """
        found: dict[str, list[Places]] = {}
        for where in self.places:
            if isinstance(where, str) and where.startswith(ALIGNED):
                name = where.removeprefix(ALIGNED)
                self._check_role(name)
                found[name] = self._everywhere(
                    lambda row, name=name: self.asked.examples[row].roles[name]
                )
        for back in range(2, self._reach + 1) if "each" in self.places else ():
            found[f"-{back}"] = self._everywhere(lambda row, back=back: self._from_end(row, back))
        return found

    def _check_role(self, name: str) -> None:
        there = self.asked.examples[0].roles
        if name not in there:
            raise ValueError(
                f"module.positions=aligned:{name}: prompts of this corpus have the roles "
                f"{', '.join(there)}"
            )

    def _everywhere(self, of: Any) -> list[Places]:
        """A role's places in every row of the sweep; continuations have those of their prompt."""
        own = [tuple((at, at) for at in of(row)) for row in range(len(self.asked))]
        more = [own[c.row] for c in self.asked.continuations]
        return [*own, *more] * len(self.directions)

    def _from_end(self, row: int, back: int) -> tuple[int, ...]:
        example = self.asked.examples[row]
        at = len(example.clean_ids) - back
        return (at,) if at >= example.roles["first_changed"][0] else ()

    @property
    def _reach(self) -> int:
        """How far from the end the first difference of a pair can be."""
        return max(
            len(each.clean_ids) - each.roles["first_changed"][0] for each in self.asked.examples
        )

    # ------------------------------------------------------------------ the sweep

    def plan(self) -> list[Planned]:
        """Every patch, layer by layer."""
        return Plan(
            n_layers=self.decoder.n_layers, granularity=self.granularity, positions=self.places,
            layers=self.layers, heads=self.heads, neurons=self._chosen_neurons(),
            windows=self.windows, reach=self._reach,
        ).planned()  # fmt: skip

    def _chosen_neurons(self) -> list[Member]:
        """Neurons that a list names, or those that differ most on the train split."""
        if "mlp_post" not in self.granularity:
            return []
        if isinstance(self.neurons, int):
            n, found = self.neurons, []
            for layer, differences in self._neuron_differences().items():
                best = differences.argsort(descending=True)[:n].tolist()
                found += [(layer, int(neuron)) for neuron in sorted(best)]
            return found
        pairs = [name.partition(".") for name in self.neurons]
        return [(int(layer), int(neuron)) for layer, _, neuron in pairs]

    @torch.no_grad()
    def _neuron_differences(self) -> dict[int, torch.Tensor]:
        """By layer, how much each neuron's write differs between the runs of a pair, on average.

        The norm over positions of its change times the norm of its row of W_down.
        """
        decoder = self.decoder
        total = {layer: torch.zeros(decoder.W_down(layer).shape[0]) for layer in self.layers}
        for example in self.corpus.drawn("train"):
            pair = [example.clean_ids, example.corrupt_ids]
            ids = torch.tensor(pair, device=decoder.device)
            found = decoder.capture(ids)
            for layer, sums in total.items():
                read = found.resid_pre[layer]
                read = read if decoder.is_parallel else read + found.attn_write[layer]
                clean, corrupt = decoder.mlp_post(layer, read).float().cpu()
                sums += (clean - corrupt).norm(dim=0)
        lengths = {layer: decoder.W_down(layer).float().norm(dim=1).cpu() for layer in total}
        return {layer: sums * lengths[layer] for layer, sums in total.items()}

    def _sweep(self, units: Sequence[Unit], progress: Any) -> Swept:
        if self.sham and progress is not None:
            self._patch_with_itself(units)
        return sweep(
            self.decoder,
            self._rows,
            units,
            sources=self._sources,
            roles=self._roles,
            closeness="patch",
            precision=self.engine.precision,
            budget=self.engine.budget,
            parts=Parts(self.workspace / "sweep", f"{self._identity} {self.directions}"),
            progress=progress,
            reuse_kv=self.engine.reuse_kv,
        )

    def _patch_with_itself(self, units: Sequence[Unit]) -> None:
        """Refuse an engine in which a run that is patched with itself changes."""
        some, rows = slice(N_SHAM), self._rows
        few = Rows(prompts=rows.prompts[some], target=rows.target[some], foil=rows.foil[some])
        swept = sweep(
            self.decoder, few, units, sources={"patch": [(prompt,) for prompt in few.prompts]},
            roles={name: found[some] for name, found in self._roles.items()}, full=False,
            budget=self.engine.budget, reuse_kv=self.engine.reuse_kv,
        )  # fmt: skip
        moved = float(np.abs(swept.values["ld"] - swept.clean["ld"]).max())
        self.facts["sham"] = {"patches": len(units), "prompts": len(few), "largest_change": moved}
        allowed = SHAM * torch.finfo(self.decoder.dtype).eps / torch.finfo(torch.float32).eps
        if moved > allowed * (1 + float(np.abs(swept.clean["ld"]).max())):
            raise RuntimeError(
                f"a run that is patched with itself moves by {moved:.2g} logit: the engine puts "
                "values where they do not belong"
            )

    def _verify(self, swept: Swept) -> dict[str, pd.DataFrame]:
        if not self.check.units:
            return {}
        return self.note_verified(
            verify_slice(
                self.model, self._rows, swept, sources=self._sources, roles=self._roles,
                **self.verify_settings(swept),
            )
        )  # fmt: skip

    # ------------------------------------------------------------------ what it says

    def collect(self, swept: Swept, planned: Sequence[Planned]) -> dict[str, pd.DataFrame]:
        """Tables of both directions, and what a share of the distance between the runs is."""
        n = len(self.asked.rows)
        found: dict[Direction, Readings] = {}
        for index, direction in enumerate(self.directions):
            here = slice(index * n, (index + 1) * n)
            part = replace(
                swept,
                values={name: column[:, here] for name, column in swept.values.items()},
                clean={name: column[here] for name, column in swept.clean.items()},
                source={name: column[here] for name, column in swept.source.items()},
            )
            own = patch_tables.directed(planned, direction)
            found[direction] = tables.readings(self.asked, own, part, with_span=self.with_span)
        is_noised = self.directions[0] == "noise"
        first = slice(0, n)
        runs = {
            name: {key: column[first] for key, column in side.items()}
            for name, side in (("own", swept.clean), ("other", swept.source))
        }
        clean, corrupt = (runs["own"], runs["other"]) if is_noised else (runs["other"], runs["own"])
        untouched = replace(swept, values={k: v[None][:0] for k, v in clean.items()}, clean=clean)
        plain = tables.readings(self.asked, [], untouched, with_span=False)
        seen = competence.of(self.decoder, self.corpus, plain)
        pairs = patch_tables.Pairs(
            self.asked, clean["ld"][: len(self.asked)], corrupt["ld"][: len(self.asked)], seen
        )
        vocabulary = Vocabulary(self.model.tokenizer, self.decoder.n_vocab)
        made = patch_tables.collect(pairs, found, self.keep_examples, vocabulary.text)
        self.facts["pairs"] = pairs.facts(self.corpus.data())
        self._summary = patch_tables.summary(pairs, made["metrics"], made["interventions"])
        return made
