"""What the lab asks of a model: rows of a corpus, their continuations, the values put in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from allostasis.core.seeding import derive
from allostasis.engines.prompts import Prompt, Rows
from allostasis.interventions.ablate import Unit
from allostasis.tasks.probes.encoded import Encoded, Example


@dataclass(frozen=True)
class Continuation:
    """A prompt with the beginning of an answer, whose next token is read.

    Attributes:
        row: Index of the example.
        sign: 1 for the target, -1 for the foil.
        given: Tokens of the answer that stand in the prompt.
        token: The next one.
    """

    row: int
    sign: int
    given: Prompt
    token: int


class Asked:
    """Rows of an engine's sweep: one an example, then one a further token of a long answer.

    Args:
        corpus: Where values that are put in come from.
        examples: What is asked.
        seed: The run's seed, which draws donors.
    """

    def __init__(self, corpus: Encoded, examples: Sequence[Example], *, seed: int) -> None:
        self.corpus, self.examples, self.seed = corpus, tuple(examples), seed
        self.continuations = [
            Continuation(row, sign, answer[:begin], answer[begin])
            for row, example in enumerate(examples)
            for sign, answer in ((1, example.tokens.target), (-1, example.tokens.foil))
            for begin in range(1, len(answer))
        ]

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def rows(self) -> Rows:
        """What the engine is given."""
        more = self.continuations
        return Rows(
            prompts=[
                *(example.tokens.clean for example in self.examples),
                *((*self.examples[c.row].tokens.clean, *c.given) for c in more),
            ],
            target=[*(example.target_id for example in self.examples), *(c.token for c in more)],
            foil=[*(example.foil_id for example in self.examples), *(c.token for c in more)],
        )

    @cached_property
    def clusters(self) -> list[str]:
        """The group of each example."""
        return [example.group for example in self.examples]

    def at(self, split: str) -> np.ndarray:
        """Indices of a split's examples."""
        return np.flatnonzero([example.split == split for example in self.examples])

    def sources(self, units: Sequence[Unit]) -> Mapping[str, list[tuple[Prompt, ...]]]:
        """For each run that a unit takes values from, each row's prompts."""
        wanted = {unit.source: unit for unit in units if unit.source is not None}
        return {
            name: self._extended([self._prompts(unit, row) for row in range(len(self))])
            for name, unit in wanted.items()
        }

    def _prompts(self, unit: Unit, row: int) -> tuple[Prompt, ...]:
        example = self.examples[row]
        pool = self.corpus.references(example)
        if unit.op == "mean":
            return tuple(pool)
        assert unit.donor is not None, f"{unit.key}: no values are known to be put in"
        rng = np.random.default_rng([derive(self.seed, "donor"), example.example])
        if unit.donor >= len(pool):
            raise ValueError(
                f"row {example.row.id}: donor {unit.donor} of {len(pool)}; lower module.n_donors"
            )
        return (tuple(pool[rng.permutation(len(pool))[unit.donor]]),)

    def _extended(self, prompts: list[tuple[Prompt, ...]]) -> list[tuple[Prompt, ...]]:
        """Those of the continuations too: the same answer's beginning behind each."""
        more = [tuple((*ids, *c.given) for ids in prompts[c.row]) for c in self.continuations]
        return [*prompts, *more]

    def span(self, logp_target: np.ndarray, logp_foil: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log probability of all tokens of the target less those of the foil, teacher-forced.

        Args:
            logp_target: [unit, row] over all rows of the sweep.
            logp_foil: Likewise.

        Returns:
            [unit, example], in nats: of whole answers, and per token of each answer.
        """
        n = len(self)
        target, foil = logp_target[:, :n].copy(), logp_foil[:, :n].copy()
        for place, c in enumerate(self.continuations, start=n):
            if c.sign > 0:
                target[:, c.row] += logp_target[:, place]
            else:
                foil[:, c.row] += logp_target[:, place]
        lengths = np.array([
            (len(example.tokens.target), len(example.tokens.foil)) for example in self.examples
        ])
        return target - foil, target / lengths[:, 0] - foil / lengths[:, 1]
