"""Prompts of one length: their clean pass, the values put into it, and what follows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from allostasis.core.seeding import derive
from allostasis.engines.trace import clean_trace, trace
from allostasis.experiments.ioi.effects import Answers, Effects
from allostasis.interventions.ablate import Unit
from allostasis.models.blocks import Capture, Decoder
from allostasis.tasks.prompts import Form, Prompt, Prompts

AT_ONCE = 25
"""Prompts of a group: their passes are kept layer by layer, with every attention pattern."""


def groups_of(
    decoder: Decoder, prompts: Sequence[Prompt], every: Prompts, *, seed: int
) -> Iterator[Group]:
    """Cut prompts into groups of one length each."""
    together: dict[int, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        together[len(prompt.ids)].append(prompt)
    for _, some in sorted(together.items()):
        for begin in range(0, len(some), AT_ONCE):
            yield Group(decoder, some[begin : begin + AT_ONCE], every, seed=seed)


class Group:
    """Prompts of one length with their clean pass.

    Args:
        decoder: The model.
        prompts: The prompts.
        every: All prompts of the run, for the reference sets.
        seed: The run's seed, which draws the donors.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[Prompt], every: Prompts, *, seed: int
    ) -> None:
        self.decoder, self.prompts, self.references = decoder, prompts, every.references
        self.seed = seed
        self._donors: dict[int, Capture] = {}
        self.clean = clean_trace(decoder, self._ids([prompt.ids for prompt in prompts]))
        as_tensor = {
            "last": [prompt.roles["END"] for prompt in prompts],
            "target": [prompt.io_id for prompt in prompts],
            "foil": [prompt.s_id for prompt in prompts],
        }
        answers = {k: torch.tensor(v, device=decoder.device) for k, v in as_tensor.items()}
        self.effects = Effects(decoder, Answers(**answers), self.clean)

    def _ids(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(prompts, device=self.decoder.device)

    @cached_property
    def mean(self) -> Capture:
        """At each place, the mean over the sentences about other people of the same form."""
        forms: list[Form] = [(prompt.template, prompt.order) for prompt in self.prompts]
        kinds = list(dict.fromkeys(forms))
        some = [ids for form in kinds for ids in self.references[form]]
        each = len(self.references[kinds[0]])
        weights = torch.zeros(len(forms), len(some), device=self.decoder.device)
        for row, form in enumerate(forms):
            at = kinds.index(form) * each
            weights[row, at : at + each] = 1 / each
        return Capture(z=self.decoder.capture(self._ids(some)).z).mixed(weights)

    @cached_property
    def donors(self) -> list[list[tuple[int, ...]]]:
        """For each prompt, sentences about other people of the same form, in drawn order."""
        drawn = []
        for prompt in self.prompts:
            rng = np.random.default_rng([derive(self.seed, "donor"), prompt.example])
            pool = self.references[prompt.template, prompt.order]
            drawn.append([pool[index] for index in rng.permutation(len(pool))])
        return drawn

    def donor(self, number: int) -> Capture:
        """The heads' outputs on each prompt's donor of a number."""
        if number not in self._donors:
            found = self.decoder.capture(self._ids([some[number] for some in self.donors]))
            self._donors[number] = Capture(z=found.z)  # a unit puts in nothing else
        return self._donors[number]

    def source(self, unit: Unit) -> dict[str, Capture]:
        """The pass whose values a unit puts in."""
        if unit.op == "mean":
            return {"mean": self.mean}
        if unit.donor is not None and unit.source is not None:
            return {unit.source: self.donor(unit.donor)}
        return {}

    def follow(
        self, unit: Unit, n_donors: int
    ) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
        """Columns of examples.parquet and, depth by depth, of depths.parquet.

        A `resample` unit is followed with each of its donors, and every number averaged.
        """
        numbers = range(n_donors) if unit.op == "resample" else (None,)
        columns: list[dict[str, np.ndarray]] = []
        depths: list[Sequence[dict[str, np.ndarray]]] = []
        for donor in numbers:
            one = replace(unit, donor=donor)
            sources = self.source(one)
            found = trace(self.decoder, self.clean, one, sources)
            columns.append(self.effects.columns(one, found))
            depths.append(self.effects.depths(one, found, sources))
        totals = np.stack([column["te"] for column in columns])
        mean = {name: _mean([column[name] for column in columns]) for name in columns[0]}
        if len(columns) > 1:
            mean["te_donor_sd"] = totals.std(axis=0, ddof=1)
        by_depth = [
            {name: _mean([row[place][name] for row in depths]) for name in depths[0][place]}
            for place in range(len(depths[0]))
        ]
        return mean, by_depth


def _mean(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean(columns, axis=0)
