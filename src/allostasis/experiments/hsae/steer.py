"""The LightningModule of `hsae_steer`: directions added to the stream at equal gain, and H7."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt
from torch import Tensor

from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.effects import one_sample_effect
from allostasis.analysis.steer_figures import CLAIMED
from allostasis.core.progress import Ticker
from allostasis.core.records import RunRecord
from allostasis.core.seeding import derive
from allostasis.experiments.hsae import shifts
from allostasis.experiments.hsae.clouds import kept_tokens
from allostasis.experiments.hsae.features import Features
from allostasis.experiments.hsae.sources import (
    Concept,
    Source,
    Sources,
    chosen_of,
    concepts_of,
    run_that_was_read,
)
from allostasis.models.teacher import FILE, read_teacher
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.activations import COLUMNS, ActivationDataModule
from allostasis.tasks.concepts import read_table
from allostasis.tasks.harvest import UNEMBED_INPUT
from allostasis.tasks.ioi import IOI

TRAIN, TEACHER = "hsae_train", "hsae_teacher"
OUTCOMES = (
    "alpha", "gain", "leakage", "leakage_logit", "near", "far", "success", "success_clean",
    "log_perplexity_change", "hedges_g",
)  # fmt: skip


class HSAESteer(L.LightningModule):
    """Steering with what an autoencoder learned, beside its teacher, means, and chance.

    It reads a finished run of hsae_train, and through it that of hsae_teacher. Everything happens
    where the unembedding reads, so that logits move by exactly W_U^T of what is added.

    Args:
        model: A language model.
        task: Its activations, as the autoencoder was trained on.
        reads_of: The arm of hsae_train that is read.
        what: `steer`, or `features`: every feature toggled on indirect-object prompts (H7).
        gains: Doses, by the mean gain in nats of held-out members' log-probability.
        n_contexts: Rows of documents that trained nothing, at which logits are read.
        n_random: Random directions a concept.
        max_parents: Parents that are steered towards.
        max_children: Children of each.
        n_match: Training rows that decide which latent is which concept.
        n_prompts: Indirect-object prompts, each of those that choose features and that measure.
        n_features: Features with the largest attribution.
        n_controls: Others, as often active, drawn at random.
        n_perm: Permutations of heads.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        task: ActivationDataModule,
        reads_of: Mapping[str, str],
        what: Literal["steer", "features"] = "steer",
        gains: Sequence[Annotated[float, Gt(0)]] = (0.5, 1.0, 2.0),
        n_contexts: Annotated[int, Ge(2)] = 64,
        n_random: Annotated[int, Ge(1)] = 8,
        max_parents: Annotated[int, Ge(1)] = 16,
        max_children: Annotated[int, Ge(0)] = 8,
        n_match: Annotated[int, Ge(100)] = 32_768,
        n_prompts: Annotated[int, Ge(4)] = 100,
        n_features: Annotated[int, Ge(1)] = 200,
        n_controls: Annotated[int, Ge(0)] = 50,
        n_perm: Annotated[int, Ge(100)] = 1000,
    ) -> None:
        super().__init__()
        if task.hook != UNEMBED_INPUT:
            raise ValueError(
                f"task.hook='{task.hook}': steering is exact and measured at {UNEMBED_INPUT} only"
            )
        if set(reads_of) != {TRAIN}:
            raise ValueError(f"module.reads_of names an arm of {TRAIN}, and nothing else")
        self.model, self.task, self.what = model, task, what
        self.gains, self.n_contexts, self.n_random = tuple(gains), n_contexts, n_random
        self.max_parents, self.max_children, self.n_match = max_parents, max_children, n_match
        self.n_prompts, self.n_features, self.n_controls = n_prompts, n_features, n_controls
        self.n_perm = n_perm
        self.workspace = Path()
        self.facts: dict[str, Any] = {}
        self._summary: dict[str, Any] = {}

    def take(self, earlier: Mapping[str, RunRecord]) -> dict[str, Any]:
        """The autoencoder, and the teacher whose concepts it was scored on.

        Raises:
            ValueError: It is not of these activations.
        """
        from allostasis.models import sae as door  # SAELens takes seconds to import

        record = earlier[TRAIN]
        self.task.prepare(self.model)
        self.sae = door.load(record.folder / "sae")
        if self.sae.W_dec.shape[1] != self.task.d_model:
            raise ValueError(
                f"{record.folder / 'sae'} is of width {self.sae.W_dec.shape[1]}, and the "
                f"activations are of {self.task.d_model}"
            )
        taught = run_that_was_read(record, TEACHER)
        self.teacher = read_teacher(taught.folder / FILE)
        digest = self.model.identity["tokenizer_sha256"]
        self.table = read_table(taught.folder, tokenizer_sha256=digest)
        return {"teacher_run": taught.run["run_id"]}

    def prove_effect(self) -> dict[str, float]:
        """Show that adding an atom changes logits by exactly what it should.

        Raises:
            RuntimeError: Nothing changes, or something else.
        """
        return shifts.exactness(self.model, self.sae.W_dec[0].detach().float().cpu())

    @torch.no_grad()
    def test_step(self, batch: int, batch_idx: int) -> dict[str, Any]:
        """Everything; gives the tables that the run keeps."""
        del batch, batch_idx
        self.facts |= {
            "model": {**self.model.identity, "title": self.model.title},
            "tokenizer": self.model.facts,
        }
        tables = self._toggle() if self.what == "features" else self._steer()
        return {"tables": tables}

    # ------------------------------------------------------------------ steering

    def _steer(self) -> dict[str, pd.DataFrame]:
        rows = self.task.split("test")
        answers = rows.ids[:, COLUMNS.index("next_token")]
        kept = kept_tokens(self.model)
        usable = np.flatnonzero(np.isin(answers.numpy(), kept))
        if len(usable) < self.n_contexts:
            raise ValueError(
                f"module.n_contexts={self.n_contexts}: the split test has {len(usable)} rows with "
                "a next token; harvest more with task.n_tokens"
            )
        places = usable[np.linspace(0, len(usable) - 1, self.n_contexts).astype(int)]
        self.there = shifts.Shifts(self.model, self.teacher.metric, rows.x[places], kept)
        self.answers = self.there.at(answers[places].numpy())
        counts = np.bincount(
            self.task.split("train").ids[:, COLUMNS.index("token")].numpy(),
            minlength=int(kept.max()) + 1,
        )
        self.frequency = counts[kept]
        sources = Sources(self.sae, self.task, self.table, self.teacher, n_match=self.n_match)
        chosen = chosen_of(self.teacher)
        concepts = concepts_of(
            self.table, chosen, max_parents=self.max_parents, max_children=self.max_children
        )
        tick = Ticker(f"hsae_steer seed {self.task.seed}", noun="concepts")
        found: list[dict[str, Any]] = []
        for done, concept in enumerate(concepts):
            rng = np.random.default_rng([derive(self.task.seed, "control"), concept.synset])
            found += self._concept(concept, list(sources.of(concept, rng, self.n_random)))
            tick(done + 1, len(concepts))
        kinds = {"parent": "Int64", **dict.fromkeys(OUTCOMES, "float64")}
        table = pd.DataFrame(found).astype(kinds)
        matches = self._matches(sources)
        self._summary = {
            "concepts": len(concepts),
            "reached": float(table["reached"].mean()),
            "matched": float((sources.matches.latent >= 0).mean()),
        }
        return {
            "steering": table,
            "matches": matches,
            "metrics": readings(table),
            "examples": examples(table),
        }

    def _concept(self, concept: Concept, sources: Sequence[Source]) -> list[dict[str, Any]]:
        targets = self.there.at(concept.targets)
        noise = {one.draw: self._effect(one) for one in sources if one.name == "random"}
        controls = self._controls(concept)
        found = []
        for source in sources:
            what = {
                "concept": concept.name, "synset": concept.synset, "parent": concept.parent,
                "level": concept.level, "source": source.name, "draw": source.draw,
                "latent": source.latent,
            }  # fmt: skip
            effect, doses = None, [None] * len(self.gains)
            chance = [
                other
                for draw, other in noise.items()
                if (source.name, source.draw) != ("random", draw)  # it is not its own chance
            ]
            if source.direction is not None:
                effect = self._effect(source)
                doses = self.there.doses(effect, self.gains, targets, self.there.reach)
            for asked, alpha in zip(self.gains, doses, strict=True):
                row = {
                    **what, "asked": asked, "reached": False, "why_not": source.why_not,
                    **dict.fromkeys(OUTCOMES),
                }  # fmt: skip
                if effect is not None:
                    if alpha is None:
                        row["why_not"] = f"not within {shifts.LARGEST:g} lengths of the stream"
                    else:
                        row |= {"reached": True, "alpha": alpha}
                        row |= self._outcomes(concept, effect, alpha, controls, chance)
                found.append(row)
        return found

    def _effect(self, source: Source) -> Tensor:
        assert source.direction is not None
        return self.there.effect(source.direction.float())

    def _outcomes(
        self,
        concept: Concept,
        effect: Tensor,
        alpha: float,
        controls: Tensor,
        chance: Sequence[Tensor],
    ) -> dict[str, float]:
        there, before = self.there, self.there.logits
        targets, members = there.at(concept.targets), there.at(concept.members)
        is_member = torch.zeros(before.shape[1], dtype=torch.bool)
        is_member[members] = True
        shift = effect[targets].double().mean()
        growth = there.growth(effect[None], alpha)[:, 0]
        gains = alpha * shift - growth
        answered = alpha * effect[self.answers].double() - growth
        found = {
            "gain": float(gains.mean()),
            "leakage": float(there.leakage(effect, alpha, members).mean()),
            "leakage_logit": float(effect[controls].abs().mean() / shift),
            "near": float(effect[there.at(concept.near)].mean() / shift),
            "success": float(is_member[(before + alpha * effect).argmax(dim=1)].double().mean()),
            "success_clean": float(is_member[before.argmax(dim=1)].double().mean()),
            "log_perplexity_change": float(-answered.mean()),
        }
        if chance:
            by_chance = there.gains(torch.stack(list(chance)), alpha, targets).mean(dim=1)
            with suppress(UndefinedError):  # of two contexts there is no spread to speak of
                found["hedges_g"] = one_sample_effect((gains - by_chance).numpy(), 0.0).g
        if len(concept.far):
            found["far"] = float(effect[there.at(concept.far)].mean() / shift)
        return found

    def _controls(self, concept: Concept) -> Tensor:
        """For each target a token that is no member, as frequent in the training rows as it is."""
        others = np.setdiff1d(
            np.arange(len(self.frequency)), self.there.at(concept.members).numpy()
        )
        order = others[np.argsort(self.frequency[others], kind="stable")]
        wanted = np.sort(self.frequency[self.there.at(concept.targets).numpy()])
        first = np.searchsorted(self.frequency[order], wanted)
        taken: list[int] = []
        for place in first:  # ascending, so that no token is taken twice
            taken.append(max(int(place), taken[-1] + 1 if taken else 0))
        return torch.from_numpy(order[np.minimum(taken, len(order) - 1)])

    def _matches(self, sources: Sources) -> pd.DataFrame:
        matches = sources.matches
        return pd.DataFrame({
            "concept": sources.labels.names,
            "synset": list(sources.column),
            "latent": matches.latent,
            "best": matches.best,
            "auroc_train": matches.auroc,
        })

    # ------------------------------------------------------------------ features

    def _toggle(self) -> dict[str, pd.DataFrame]:
        task = IOI(seed=self.task.seed, n_examples=self.n_prompts, n_discovery=self.n_prompts)
        prompts = task.build(self.model.encode, self.model.tokenizer)
        features = Features(self.model, self.sae, seed=self.task.seed)
        found = features.measure(
            prompts,
            background=self.task.split("train", self.n_match).x,
            n_features=self.n_features,
            n_controls=self.n_controls,
            n_perm=self.n_perm,
        )
        self._summary = found.summary
        return found.tables

    # ------------------------------------------------------------------ what run.json says

    def data(self) -> dict[str, Any]:
        """The activations' hashes and sizes."""
        return self.task.facts()

    def summary(self) -> dict[str, Any]:
        """The run in scalars."""
        return self._summary


def readings(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of metrics.parquet: means over concepts, for each source, level and dose."""
    names = {
        "leakage": ("steering_leakage", "nat"),
        "leakage_logit": ("steering_leakage.logit_share", "1"),
        "gain": ("steering_leakage.gain", "nat"), "success": ("steering_success", "1"),
        "log_perplexity_change": ("steering_log_perplexity", "nat"),
        "hedges_g": ("steering_hedges_g", "1"), "alpha": ("steering_dose", "resid"),
    }  # fmt: skip
    found = []
    for (source, level, asked), rows in table.groupby(["source", "level", "asked"], sort=True):
        where = {"symbol": "other", "split": "test", "intervention": f"{source}:{level}:{asked:g}"}
        share = float(rows["reached"].mean())
        found.append({
            **where, "metric": "steering_reached", "unit": "1", "value": share, "n": len(rows)
        })  # fmt: skip
        there = rows[rows["reached"]]
        for column, (metric, unit) in names.items():
            values = there[column].dropna()
            if len(values):
                found.append({
                    **where, "metric": metric, "unit": unit, "value": float(values.mean()),
                    "n": len(values), "scale": asked,
                })  # fmt: skip
    at_one = table[(table["asked"] == CLAIMED) & table["reached"]]
    for (source, level), rows in at_one.groupby(["source", "level"], sort=True):
        found.append({
            "symbol": "other", "split": "test", "metric": f"steering_leakage.{source}_{level}",
            "unit": "nat", "value": float(rows["leakage"].mean()), "n": len(rows),
        })  # fmt: skip
    return pd.DataFrame(found)


def examples(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of examples.parquet: one a concept and direction, concepts being what is independent."""
    number = pd.factorize(table["synset"])[0]
    key = table["source"] + ":" + table["level"] + ":" + table["asked"].map("{:g}".format)
    columns = table[["source", "draw", "reached", "gain", "leakage", "leakage_logit", "success"]]
    return columns.assign(
        example=number, split="test", cluster=table["synset"].astype(str), intervention=key,
    )  # fmt: skip
