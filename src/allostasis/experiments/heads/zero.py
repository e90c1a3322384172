"""The LightningModule of `heads_zero`: take every head away alone, and rank what that does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge
from scipy.stats import rankdata

from allostasis.analysis import impact
from allostasis.core.seeding import derive
from allostasis.experiments.heads import calibration, competence, tables
from allostasis.experiments.heads.lab import (
    SPLITS,
    Ablation,
    Engine,
    HeadLab,
    Keep,
    Layers,
    Span,
    Verify,
)
from allostasis.experiments.heads.tables import Planned, Readings
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.probes.task import Probes

TOP = 10
"""Heads that a run's summary names."""


class HeadsZero(HeadLab):
    """Each head alone, scaled or replaced, on the train and the test split of one corpus.

    Args:
        model: A language model.
        task: The corpus.
        layers: Which layers: all, a list, or so many from the first to the last.
        heads: Which heads: all, or a list such as ["9.6", "10.0"].
        scales: By what a head's output is multiplied, for `zero`; 0 takes it away, 1 changes
            nothing.
        ablation: What stands in a head's place.
        n_donors: Prompts that a `resample` averages over, after the readout.
        positions: Which tokens are changed.
        random_control: Heads of each layer that the seed draws as controls; they are marked among
            all heads, which are measured anyway.
        span: Which readouts of answers of several tokens.
        trajectory: Whether to read the path of the residual stream over tokens.
        keep_examples: Interventions whose single examples are kept.
        engine: How the sweep is computed.
        verify: What of it is re-checked.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        task: Probes,
        layers: Layers = "all",
        heads: Literal["all"] | list[str] = "all",
        scales: Sequence[float] = (0.0,),
        ablation: Ablation = "zero",
        n_donors: Annotated[int, Ge(1)] = 4,
        positions: Literal["all", "last"] | list[int] = "all",
        random_control: Annotated[int, Ge(0)] = 4,
        span: Sequence[Span] = ("first_token", "full_span"),
        trajectory: bool = False,
        keep_examples: Keep = "all",
        engine: Engine | None = None,
        verify: Verify | None = None,
    ) -> None:
        super().__init__(
            model=model, task=task, name="heads_zero", span=span, positions=positions,
            trajectory=trajectory, keep_examples=keep_examples, engine=engine, verify=verify,
        )  # fmt: skip
        self.heads = self.chosen_heads(heads, layers)
        if ablation != "zero" and tuple(scales) != (0.0,):
            raise ValueError(
                f"module.scales={[*scales]} multiplies a head's output, which "
                f"ablation={ablation} replaces; leave scales at [0.0]"
            )
        if not scales:
            raise ValueError("module.scales is an empty list, so that nothing would be done")
        self.scales, self.n_donors = tuple(scales), n_donors
        self.ablation: Ablation = ablation
        self.random_control = random_control

    def plan(self) -> list[Planned]:
        """Every head at every scale, layer by layer."""
        control = self._control()
        return [
            planned
            for head in self.heads
            for scale in self.scales
            for planned in Planned.of(
                self.units_of([head], self.ablation, scale=scale, n_donors=self.n_donors),
                set="head",
                ablation=self.ablation,
                is_random_control=head in control,
            )
        ]

    def _control(self) -> set[tuple[int, int]]:
        """Heads of each layer that the seed draws."""
        rng = np.random.default_rng(derive(self.task.seed, "control"))
        drawn: set[tuple[int, int]] = set()
        for layer in sorted({layer for layer, _ in self.heads}):
            own = [head for at, head in self.heads if at == layer]
            size = min(self.random_control, len(own))
            drawn |= {(layer, int(head)) for head in rng.choice(own, size=size, replace=False)}
        return drawn

    def read(self, readings: Readings) -> dict[str, pd.DataFrame]:
        """Tables of the run; its summary says which heads suppress, found on train."""
        splits = {split: readings.asked.at(split) for split in SPLITS}
        seen = competence.of(self.decoder, self.corpus, readings)
        splits["test_competent"] = seen.rows(readings, splits["test"])
        rows = [*tables.metric_rows(readings, splits), *seen.metric_rows()]
        rows += calibration.metric_rows(readings, splits, seed=self.task.seed)
        ranks = {split: self._ranks(readings, split, at) for split, at in splits.items() if len(at)}
        rows += [row for found in ranks.values() for row in found.to_dict("records")]
        self._summarise(readings)
        return {"metrics": pd.DataFrame(rows), "baseline": seen.baseline} | self.records(readings)

    def _ranks(self, readings: Readings, split: str, at: np.ndarray) -> pd.DataFrame:
        """Percentiles and p of every head's effect, in the shape of metrics.parquet."""
        effects = readings.effect[:, at]
        sums = impact.clustered(effects, readings.clusters(at))
        rng = np.random.default_rng(derive(self.task.seed, "bootstrap"))
        flips = impact.sign_flips(sums, rng)
        means = effects.mean(axis=1)
        q = impact.benjamini_hochberg(flips.p)
        scale = np.array([each.unit.scale for each in readings.interventions])
        layer = np.array([each.unit.layer for each in readings.interventions])
        within, model = np.zeros((2, len(means)))
        for one in np.unique(scale):
            model[scale == one] = impact.percentile(means[scale == one])
            for there in np.unique(layer):
                own = (scale == one) & (layer == there)
                if own.any():
                    within[own] = impact.percentile(means[own])
        columns = {
            "effect.p": flips.p, "effect.p_max": flips.p_max, "effect.q": q,
            "effect.percentile_layer": within, "effect.percentile_model": model,
            "effect.rank_signed": rankdata(-means),
            "effect.rank_absolute": rankdata(-np.abs(means)),
        }  # fmt: skip
        base = {"symbol": "Psi", "unit": "1", "split": split, "n": len(at)}
        return pd.DataFrame([
            {**base, **tables.place(each), "metric": metric, "value": float(values[index])}
            for metric, values in columns.items()
            for index, each in enumerate(readings.interventions)
        ])

    def mark(self, readings: Readings) -> dict[str, str]:
        """The head of the first layer with the largest effect on train: claims are about it."""
        train = readings.mean_effects("train")
        first = [
            index
            for index, each in enumerate(readings.interventions)
            if each.unit.layer == 0 and each.unit.scale == self.scales[0]
        ]
        if not first:
            return {}
        return {readings.keys[max(first, key=lambda index: train[index])]: "suppressor"}

    def _summarise(self, readings: Readings) -> None:
        """Suppressors found on train with what they do on test."""
        train, test = (readings.mean_effects(split) for split in SPLITS)
        order = np.argsort(-train, kind="stable")[:TOP]
        top = [int(index) for index in order if train[index] > 0]
        at = readings.asked.at("test")
        ld = readings.clean["ld"]
        self.facts["suppressors"] = {
            readings.keys[index]: {"train": float(train[index]), "test": float(test[index])}
            for index in top
        }
        self._summary = {
            "logit_diff": float(ld[at].mean()),
            "accuracy": float((ld[at] > 0).mean()),
            "top_suppressor": readings.keys[top[0]] if top else "none",
            "delta_train": float(train[top[0]]) if top else 0.0,
            "delta_test": float(test[top[0]]) if top else 0.0,
        }
