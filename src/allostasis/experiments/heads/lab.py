"""What the lab's experiments share: prompts, a sweep that goes on where it stopped, its tables."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt

from allostasis.callbacks.recorder import describe
from allostasis.core.progress import Ticker
from allostasis.core.seeding import derive
from allostasis.engines.budget import Budget
from allostasis.engines.packs import can_share
from allostasis.engines.parts import Parts
from allostasis.engines.suffix import Precision, Swept, sweep
from allostasis.engines.verify import kl_of_a_zeroed_layer, verify_slice
from allostasis.experiments.heads import choices, tables
from allostasis.experiments.heads.asked import Asked
from allostasis.experiments.heads.choices import Layers
from allostasis.experiments.heads.tables import Planned, Readings
from allostasis.interventions.ablate import Member, Op, Unit
from allostasis.metrics.accuracy import Accuracy
from allostasis.metrics.flip_rate import FlipRate
from allostasis.metrics.kl_divergence import KLDivergence
from allostasis.metrics.logit_diff import LogitDiff
from allostasis.metrics.output_entropy import OutputEntropy
from allostasis.metrics.prob_drop import ProbDrop
from allostasis.metrics.trajectory_curvature import TrajectoryCurvature
from allostasis.metrics.trajectory_step import TrajectoryStep
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.probes.encoded import Encoded
from allostasis.tasks.probes.task import Probes

log = logging.getLogger(__name__)

Ablation = Literal["zero", "mean", "resample"]
Span = Literal["first_token", "full_span"]
Keep = Literal["all", "none"] | Annotated[int, Ge(1)]

METRICS = (
    Accuracy, FlipRate, KLDivergence, LogitDiff, OutputEntropy, ProbDrop, TrajectoryCurvature,
    TrajectoryStep,
)  # fmt: skip
"""What the readouts are; run.json says so, so that a report can cite them."""

OPS: dict[Ablation, Op] = {"zero": "scale", "mean": "mean", "resample": "resample"}
Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
"""Heads are chosen on the first and measured on the second."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How a sweep is computed; nothing here decides what it gives, beyond rounding.

    Attributes:
        max_tokens: Tokens that run side by side; `auto` measures what is fastest here.
        precision: `bf16` rounds the factors of products; it is re-checked in float32.
        reuse_kv: Whether interventions on the last token run that token alone.
    """

    max_tokens: Literal["auto"] | Annotated[int, Gt(0)] = "auto"
    precision: Precision = "fp32"
    reuse_kv: bool = True

    @property
    def budget(self) -> Budget | None:
        """What was asked for; None where it is to be measured."""
        return None if self.max_tokens == "auto" else Budget(self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class Verify:
    """A sample of the sweep that TransformerLens repeats on the CPU in float32.

    Attributes:
        units: Interventions, the one of the largest effect among them; 0 checks none.
        prompts: Of each.
        atol: By how many logits they may differ; `auto` goes by the precision.
    """

    units: Annotated[int, Ge(0)] = 8
    prompts: Annotated[int, Ge(1)] = 8
    atol: Literal["auto"] | Annotated[float, Gt(0)] = "auto"


class HeadLab(L.LightningModule):
    """One corpus under many interventions on one model.

    A subclass plans the interventions and adds what it reads from them. Everything here is done for
    the prompts of the train and the test split together; tables tell the splits apart.

    Args:
        model: A language model.
        task: The corpus.
        name: What log lines call the experiment.
        span: Which readouts of answers of several tokens: of their first token, of all of them.
        positions: Which tokens are changed.
        trajectory: Whether to read the path of the residual stream over tokens.
        keep_examples: Interventions whose single examples are kept: `all`, `none`, or so many of
            the largest effect.
        engine: How the sweep is computed.
        verify: What of it is re-checked.
    """

    splits: tuple[Split, ...] = SPLITS

    def __init__(
        self,
        *,
        model: LanguageModel,
        task: Probes,
        name: str,
        span: Sequence[Span],
        positions: Literal["all", "last"] | list[int],
        trajectory: bool,
        keep_examples: Keep,
        engine: Engine | None,
        verify: Verify | None,
    ) -> None:
        super().__init__()
        self.model, self.task, self.name = model, task, name
        self.decoder = model.decoder
        self.with_span, self.trajectory = "full_span" in span, trajectory
        self.positions: Literal["all", "last"] | tuple[int, ...] = (
            positions if isinstance(positions, str) else tuple(positions)
        )
        self.keep_examples: Keep = keep_examples
        self.engine, self.check = engine or Engine(), verify or Verify()
        self.workspace = Path()
        self.facts: dict[str, Any] = {}
        self._finished = 0
        self._is_swept = False
        self._data: dict[str, Any] = {}
        self._summary: dict[str, Any] = {}

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def plan(self) -> list[Planned]:
        """The interventions, in the order of their first layers."""

    @abstractmethod
    def read(self, readings: Readings) -> dict[str, pd.DataFrame]:
        """Tables of the experiment from its readings, by file name without ending."""

    # ------------------------------------------------------------------ the run

    def prove_effect(self) -> dict[str, float]:
        """Show that the hooks reach the model: zeroing every head of a layer moves the logits.

        Raises:
            RuntimeError: Nothing moves.
        """
        return {"kl_of_a_zeroed_layer": kl_of_a_zeroed_layer(self.model)}

    @torch.no_grad()
    def test_step(self, batch: Probes, batch_idx: int) -> dict[str, Any]:
        """The whole sweep; gives the tables that the run keeps."""
        del batch_idx
        self.corpus: Encoded = batch.build(self.model.encode, self.model.tokenizer)
        drawn = [example for split in self.splits for example in self.corpus.drawn(split)]
        self.asked = Asked(self.corpus, drawn, seed=self.task.seed)
        self._tell()
        self.planned = self.plan()
        self.facts["planned_units"] = len(self.planned)
        tick = Ticker(f"{self.name} {self.task.corpus} seed {self.task.seed}", noun="interventions")

        def progress(done: int, planned: int) -> None:
            self._finished = self.facts["completed_units"] = done
            tick(done, planned)

        swept = self._sweep([each.unit for each in self.planned], progress)
        self._is_swept = True
        self.facts["profile"] = {
            **asdict(swept.profile),
            "token_ratio": swept.profile.naive_forward_tokens / swept.profile.forward_tokens
            if swept.profile.forward_tokens
            else None,
        }
        verified = self._verify(swept)
        made = self.collect(swept, self.planned)
        noise = self.facts.get("verify", {}).get("below_noise", [])
        kinds = made["interventions"]
        made["interventions"] = kinds.assign(below_noise=kinds["unit"].isin(noise))
        return {"tables": made | verified}

    def mark(self, readings: Readings) -> dict[str, str]:
        """Kinds of set that only the readings can tell, by intervention; claims select by them."""
        del readings
        return {}

    def extra_columns(self, readings: Readings) -> dict[str, np.ndarray]:
        """Further columns of examples.parquet, [intervention, example]."""
        del readings
        return {}

    def records(self, readings: Readings) -> dict[str, pd.DataFrame]:
        """interventions.parquet and, as far as they are kept, examples.parquet."""
        marks = self.mark(readings)
        made = {"interventions": tables.interventions(readings, marks)}
        keep, notice = tables.kept(readings, self.keep_examples, marks)
        if notice:
            log.warning("%s", notice)
            self.facts["examples"] = notice
        if keep:
            extra = self.extra_columns(readings)
            made["examples"] = tables.examples(readings, keep, marks, extra)
        return made

    def partial(self) -> dict[str, pd.DataFrame]:
        """Tables of what is finished of a run that was stopped; none where nothing is.

        They hold the interventions that were finished on all prompts and no others. No model runs:
        finished pieces are read.
        """
        if self._is_swept or not self._finished:
            return {}
        done = sorted(self.planned, key=lambda each: each.unit.layer)[: self._finished]
        swept = self._sweep([each.unit for each in done], None)
        return self.collect(swept, done)

    def collect(self, swept: Swept, planned: Sequence[Planned]) -> dict[str, pd.DataFrame]:
        """Tables of what was swept."""
        return self.read(tables.readings(self.asked, planned, swept, with_span=self.with_span))

    def _sweep(self, units: Sequence[Unit], progress: Any) -> Swept:
        return sweep(
            self.decoder,
            self.asked.rows,
            units,
            sources=self.asked.sources(units),
            precision=self.engine.precision,
            budget=self.engine.budget,
            parts=Parts(self.workspace / "sweep", self._identity),
            progress=progress,
            reuse_kv=self.engine.reuse_kv,
            trajectory=self.trajectory,
            shares_prefixes=None if can_share([each.unit for each in self.planned]) else False,
        )

    @property
    def _identity(self) -> str:
        facts = self.model.identity
        kept = {k: facts[k] for k in ("weights_sha256", "prepend_bos") if k in facts}
        return f"{kept} {self.corpus.sha256} {vars(self.engine)} {self.trajectory}"

    def _verify(self, swept: Swept) -> dict[str, pd.DataFrame]:
        """A sample of the sweep done again; the run fails where it is off."""
        if not self.check.units:
            return {}
        sources = self.asked.sources(swept.units)
        settings = self.verify_settings(swept)
        return self.note_verified(
            verify_slice(self.model, self.asked.rows, swept, sources=sources, **settings)
        )

    def verify_settings(self, swept: Swept) -> dict[str, Any]:
        """How much is done again, and how exactly."""
        return {
            "seed": derive(self.task.seed, "verify"),
            "precision": self.engine.precision,
            "n_units": min(self.check.units, len(swept.units)),
            "n_prompts": self.check.prompts,
            "atol": None if self.check.atol == "auto" else self.check.atol,
        }

    def note_verified(self, found: dict[str, Any]) -> dict[str, pd.DataFrame]:
        """Keep what was done again: its outcome for run.json, its rows as a table."""
        self.facts["verify"] = {k: v for k, v in found.items() if k != "rows"}
        return {"verify": pd.DataFrame(found["rows"])}

    def _tell(self) -> None:
        self.facts |= {
            "metrics": {metric.name: describe(metric) for metric in METRICS},
            "model": {**self.model.identity, "title": self.model.title},
            "tokenizer": self.model.facts,
            "seed_changes": "which prompts are drawn, donors, random controls, bootstrap; the "
            "model is one and the same",
        }
        self._data = self.corpus.data() | {
            "measured": {split: len(self.asked.at(split)) for split in self.splits}
        }

    # ------------------------------------------------------------------ heads

    def chosen_layers(self, layers: Layers) -> list[int]:
        """Layers that a config names."""
        return choices.layers(self.decoder, layers)

    def chosen_heads(
        self, heads: Literal["all"] | Sequence[str], layers: Layers
    ) -> list[tuple[int, int]]:
        """Heads that a config names, in the layers that it names."""
        return choices.heads(self.decoder, heads, layers)

    def units_of(
        self, heads: Sequence[Member], ablation: Ablation, *, scale: float = 0.0, n_donors: int = 1
    ) -> list[Unit]:
        """What takes some heads away together: one unit, or one a donor, averaged afterwards."""
        base = {"members": tuple(heads), "op": OPS[ablation], "positions": self.positions}
        if ablation == "zero":
            return [Unit(**base, scale=scale)]
        if ablation == "mean":
            return [Unit(**base)]
        return [Unit(**base, donor=donor) for donor in range(n_donors)]

    # ------------------------------------------------------------------ what run.json says

    def data(self) -> dict[str, Any]:
        """Hash and size of the corpus, and what was dropped."""
        return self._data

    def summary(self) -> dict[str, Any]:
        """The run in scalars."""
        return self._summary
