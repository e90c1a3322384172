"""The LightningModule of `superposition`: one arm of it, from model to tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import torch
from annotated_types import Ge, Gt, Lt

from allostasis.core.records import write_json
from allostasis.engines.sequence_training import Schedule
from allostasis.engines.subjects import DecoderSubject, Filling, Head, Subject, ToySubject, Value
from allostasis.experiments.superposition import features, null, planted
from allostasis.experiments.superposition.collected import Collected
from allostasis.experiments.superposition.features import Grid
from allostasis.experiments.superposition.survey import Rule, Survey
from allostasis.experiments.superposition.training import held_out, score, train
from allostasis.models.toy_transformer import ToyTransformer
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.interleaved_patterns import InterleavedPatterns
from allostasis.tasks.sequences import Sequences
from allostasis.tasks.splits import Split
from allostasis.tasks.text import Text

Arm = Literal["toy", "language_model", "planted", "null", "toy_models"]
INERT = 1e-6  # nats: a smaller change of a loss is none


class Superposition(L.LightningModule):
    """Suppressors found by ablation and their variance, with controls, and toy models.

    Args:
        model: Makes the language model; called by the arm that is about one.
        task: Text for it.
        arm: `toy` and `language_model` look for suppressors in a model that is trained here or
            elsewhere; `planted` and `null` are controls; `toy_models` trains small autoencoders.
        patterns: What the toy transformer learns.
        toy: The toy transformer, untrained.
        grid: Which autoencoders are trained.
        values: What is put in a head's place.
        n_sequences: Sequences of the toy transformer, of all splits together.
        n_steps: Its updates.
        lr: Its learning rate.
        schedule: What its learning rate does after the warm-up.
        q: False discovery rate among all heads.
        min_effect: Least fall of the loss that makes a suppressor, in nats a token.
        draws: Resamples of an interval.
        outer: Resamples in which selection is repeated.
        layers: How many of the language model's layers are looked at, evenly spaced; null: all.
        n_plants: Pairs of heads that suppressors are planted in.
        n_sets: Data sets of the null.
    """

    def __init__(
        self,
        *,
        model: Callable[[], LanguageModel],
        task: Text,
        arm: Arm,
        patterns: InterleavedPatterns,
        toy: ToyTransformer,
        grid: Grid,
        values: Sequence[Value] = ("resample", "mean", "zero"),
        n_sequences: Annotated[int, Ge(8)] = 1_024,
        n_steps: Annotated[int, Gt(0)] = 3_000,
        lr: Annotated[float, Gt(0)] = 1e-3,
        schedule: Schedule = "constant",
        q: Annotated[float, Gt(0), Lt(1)] = 0.05,
        min_effect: Annotated[float, Ge(0)] = 0.005,
        draws: Annotated[int, Ge(100)] = 2_000,
        outer: Annotated[int, Ge(1)] = 200,
        layers: Annotated[int, Gt(0)] | None = None,
        n_plants: Annotated[int, Gt(0)] = 5,
        n_sets: Annotated[int, Gt(0)] = 100,
    ) -> None:
        super().__init__()
        self.make_model, self.task, self.arm = model, task, arm
        self.patterns, self.toy, self.grid = patterns, toy, grid
        self.values, self.n_sequences = tuple(values), n_sequences
        self.n_steps, self.lr = n_steps, lr
        self.schedule: Schedule = schedule
        self.rule = Rule(q=q, min_effect=min_effect, draws=draws, outer=outer)
        self.n_layers, self.n_plants, self.n_sets = layers, n_plants, n_sets
        self.workspace = Path()
        self.facts: dict[str, Any] = {}
        self._data: dict[str, Any] = {}
        self._summary: dict[str, Any] = {}

    @cached_property
    def language_model(self) -> LanguageModel:
        """The language model, made when it is first asked for."""
        return self.make_model()

    # ------------------------------------------------------------------ the run

    def prove_effect(self) -> dict[str, float]:
        """Show that what the arm does reaches the model it does it to.

        Returns:
            `loss_change`: largest change of a sequence's loss once every head of a layer is zeroed,
            in nats; or `gradient_norm` of the loss at step 0.

        Raises:
            RuntimeError: Nothing changes.
        """
        if self.arm == "toy_models":
            return self._prove_gradient()
        splits = self.splits
        batch = splits["select"].part(slice(8))
        subject = self._subject()
        layer = subject.n_layers // 2
        heads = [(layer, head) for head in range(subject.n_heads)]
        with torch.no_grad():
            ablated = subject.ablated_losses(batch, heads, Filling("zero"))
            moved = float((ablated - subject.losses(batch)).abs().max())
        if moved <= INERT:
            raise RuntimeError(
                f"zeroing any head of layer {layer} leaves the loss as it is (largest change "
                f"{moved:.1e} nat): heads are not where they are looked for"
            )
        return {"loss_change": moved}

    def _prove_gradient(self) -> dict[str, float]:
        shape = next(self.grid.shapes())
        model, _ = features.start(self.grid, *shape, seed=self.task.seed, device=self.device)
        norm = features.gradient_norm(self.grid, model, seed=self.task.seed, device=self.device)
        if norm <= INERT:
            raise RuntimeError(f"the loss has a gradient of norm {norm:.1e}; it cannot train")
        return {"gradient_norm": norm}

    def test_step(self, batch: Text, batch_idx: int) -> dict[str, Any]:
        """The whole arm; gives the tables that the run keeps."""
        del batch, batch_idx
        found = Collected()
        do = {
            "toy": self._toy, "language_model": self._language_model, "planted": self._planted,
            "null": self._null, "toy_models": self._toy_models,
        }  # fmt: skip
        # Lightning tests without gradients; some arms train here
        with torch.inference_mode(False), torch.enable_grad():
            do[self.arm](found)
        return {"tables": found.tables()}

    @cached_property
    def splits(self) -> dict[Split, Sequences]:
        """The arm's sequences, on its device."""
        if self.arm == "language_model":
            drawn = self.task.build(self.language_model.encode)
        else:
            drawn = held_out(self.patterns, self.n_sequences)
        self._data = {
            split: {"n": len(batch), "sha256": batch.sha256} for split, batch in drawn.items()
        }
        device = self._place()
        return {split: batch.to(device) for split, batch in drawn.items()}

    def _place(self) -> torch.device:
        if self.arm == "language_model":
            return self.language_model.decoder.device
        return self.device

    def _subject(self) -> Subject:
        if self.arm == "language_model":
            return DecoderSubject(self.language_model.decoder)
        return ToySubject(self.toy)

    def _trained(self, found: Collected) -> dict[Split, Sequences]:
        """Train the toy transformer; its sequences, of which it has seen none."""
        splits = self.splits
        train(
            self.toy, self.patterns, n_steps=self.n_steps, lr=self.lr, schedule=self.schedule,
            watch=splits["measure"], found=found, keep=self.workspace / "trained.safetensors",
            name=f"superposition {self.arm} seed {self.task.seed}",
        )  # fmt: skip
        self.toy.requires_grad_(False)
        ceiling = self.patterns.ceiling(splits["measure"])["predictable"].accuracy
        reached = score(self.toy, splits["measure"], ceiling)
        self._summary = {
            "steps": self.n_steps, "accuracy": reached.accuracy, "ceiling": reached.ceiling,
            "loss": reached.loss,
        }  # fmt: skip
        return splits

    def _toy(self, found: Collected) -> None:
        self._survey(self._trained(found), found)

    def _language_model(self, found: Collected) -> None:
        model = self.language_model
        self.facts |= {
            "model": {**model.identity, "title": model.title},
            "tokenizer": model.facts,
        }
        splits = self.splits
        with torch.no_grad():
            loss = float(self._subject().losses(splits["measure"]).mean())
        self._summary = {"steps": 0, "loss": loss}
        self._survey(splits, found)

    def _survey(self, splits: Mapping[Split, Sequences], found: Collected) -> None:
        subject = self._subject()
        survey = Survey(
            subject, splits, self._heads(subject), seed=self.task.seed, rule=self.rule,
            keep=self.workspace,
        )  # fmt: skip
        facts = survey.record(self.values, found)
        write_json(self.workspace.parent / "suppressors.json", facts)
        brief = {
            value: {name: fact for name, fact in some.items() if name != "heads"}
            for value, some in facts.items()
        }
        self.facts["suppressors"] = brief
        self._summary |= {
            "n_heads": len(survey.heads),
            "suppressors": {value: some["n_selected"] for value, some in facts.items()},
            "no_ratio": {v: f["undefined"] for v, f in facts.items() if "undefined" in f},
        }

    def _heads(self, subject: Subject) -> list[Head]:
        count = subject.n_layers if self.n_layers is None else self.n_layers
        spread = np.linspace(0, subject.n_layers - 1, min(count, subject.n_layers) + 2)[1:-1]
        every = range(subject.n_layers)
        whole = self.arm != "language_model" or count >= subject.n_layers
        layers = every if whole else sorted({round(float(layer)) for layer in spread})
        return list(itertools.product(layers, range(subject.n_heads)))

    def _planted(self, found: Collected) -> None:
        splits = self._trained(found)
        facts = planted.check_plants(
            self.toy, splits, self.patterns.calibration.to(self.device),
            n_plants=self.n_plants, values=self.values, seed=self.task.seed, rule=self.rule,
            found=found,
        )  # fmt: skip
        self.facts["plants"] = facts
        checks, undefined = planted.checks(facts)
        self._summary |= {"plants": facts, "checks": checks, "no_check": undefined}

    def _null(self, found: Collected) -> None:
        splits = self._trained(found)
        facts = null.check_nulls(
            self.toy, splits, n_sets=self.n_sets,
            values=self.values, seed=self.task.seed, rule=self.rule, found=found,
        )  # fmt: skip
        self.facts["nulls"] = facts
        self._summary |= {"nulls": facts, "checks": null.checks(facts, self.values)}

    def _toy_models(self, found: Collected) -> None:
        name = f"superposition toy_models seed {self.task.seed}"
        facts = features.survey(
            self.grid, seed=self.task.seed, device=self.device, name=name, found=found
        )
        self._data = {"grid": vars(self.grid) | {"n_models": facts["n_models"]}}
        self._summary = {"steps": self.grid.n_steps, **facts}

    # ------------------------------------------------------------------ what run.json says

    def data(self) -> dict[str, Any]:
        """Hash and size of each split."""
        return self._data

    def summary(self) -> dict[str, Any]:
        """The run in scalars."""
        return self._summary
