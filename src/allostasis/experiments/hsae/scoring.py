"""What a trained autoencoder is scored on: rows, concepts, losses of the language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from allostasis.analysis.matching import Matches, match_latents
from allostasis.experiments.hsae.latents import in_words, latent_table
from allostasis.metrics.base import Coding, Snapshot
from allostasis.models.hsae import HierarchicalSAE
from allostasis.models.sae import FlatSAE
from allostasis.models.teacher import Teacher
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.activations import COLUMNS, ActivationBatch, ActivationDataModule
from allostasis.tasks.concepts import Chosen, ConceptTable
from allostasis.tasks.harvest import UNEMBED_INPUT, Window, unembed_input_with
from allostasis.tasks.labels import Labels
from allostasis.tasks.planted_hierarchy import PlantedHierarchy

CELLS = 2**24  # logits that are held at once
WINDOWS = 16  # that the language model reads side by side
StandIn = Callable[[Tensor], Tensor]
Split = Literal["train", "val", "test"]
Activations = ActivationDataModule | PlantedHierarchy


class Scoring:
    """Snapshots of an autoencoder on fixed rows.

    Args:
        task: Where rows and labels come from.
        model: The language model, where the rows are one's activations.
        n_watch: Rows of train and val that are looked at on the way.
        n_match: Rows of train on which latents are matched to concepts.
        n_test: Rows of test.
        n_loss: Rows of test whose next token is predicted.
    """

    def __init__(
        self,
        task: Activations,
        model: LanguageModel | None,
        *,
        n_watch: int,
        n_match: int,
        n_test: int,
        n_loss: int,
    ) -> None:
        self.task, self.model = task, model
        self.n_watch, self.n_match, self.n_test, self.n_loss = n_watch, n_match, n_test, n_loss
        self.concepts: tuple[ConceptTable, list[Chosen]] | None = None
        self.names: tuple[str, ...] = ()
        self.matches: Matches | None = None
        self._rows: dict[tuple[Split, int], ActivationBatch] = {}

    def use(self, table: ConceptTable, teacher: Teacher) -> None:
        """Label rows by a teacher's concepts; it is the same ones in every arm of a seed."""
        chosen = [
            Chosen(parent, children, ())
            for parent, children in zip(teacher.synsets, teacher.child_synsets, strict=True)
        ]
        self.concepts = (table, chosen)

    def labels(self, batch: ActivationBatch, split: Split) -> Labels | None:
        """Which concepts rows are of, where that is known: planted ones, or a teacher's."""
        if isinstance(self.task, PlantedHierarchy):
            return self.task.labels(batch, split)
        return None if self.concepts is None else self.task.labels(batch, split, *self.concepts)

    def rows(self, split: Split, n: int) -> ActivationBatch:
        """The first rows of a split, read once."""
        if (split, n) not in self._rows:
            self._rows[split, n] = self.task.split(split, n)
        return self._rows[split, n]

    def pca(self, rank: int) -> float:
        """Explained variance of the test rows' own first components: no `rank` atoms can do better.

        Args:
            rank: Components.
        """
        x = self.rows("test", self.n_test).x.double()
        centred = x - x.mean(dim=0)
        values = torch.linalg.eigvalsh(centred.T @ centred)
        return float(values[-rank:].sum() / values.sum())

    # ------------------------------------------------------------------ snapshots

    def watch(self, sae: HierarchicalSAE | FlatSAE, step: int) -> Iterator[Snapshot]:
        """Rows of train and of val: how well they are reconstructed, and how sparsely."""
        for split in ("train", "val"):
            x = self.rows(split, self.n_watch).x
            yield Snapshot(step=step, split=split, coding=coding(sae, x))

    def whole(self, sae: HierarchicalSAE | FlatSAE, step: int) -> Iterator[Snapshot]:
        """Held-out rows with their concepts, their losses, and the dictionary."""
        batch = self.rows("test", self.n_test)
        fields: dict[str, Any] = {}
        labels = self.labels(batch, "test")
        if labels is not None:
            self.matches, self.names = self._matched(sae), labels.names
            fields = {
                "members": labels.members, "known": labels.known, "matches": self.matches,
            }  # fmt: skip
            if isinstance(self.task, PlantedHierarchy):
                fields |= {"truth": self.task.vectors, "truth_parent": labels.parent}
        yield Snapshot(
            step=step,
            split="test",
            coding=coding(sae, batch.x),
            decoder=sae.atoms().detach().cpu(),
            token_losses=self._losses(sae),
            **fields,
        )

    def latents(self, sae: HierarchicalSAE | FlatSAE) -> pd.DataFrame:
        """Each latent with the test rows where it is most on; concepts have been matched before."""
        batch = self.rows("test", self.n_test)
        labels = self.labels(batch, "test")
        assert labels is not None
        assert self.matches is not None
        return latent_table(
            coding(sae, batch.x), self.matches, labels.names, labels.members.numpy(),
            in_words(batch, None if self.model is None else self.model.tokenizer.decode),
        )  # fmt: skip

    def _matched(self, sae: HierarchicalSAE | FlatSAE) -> Matches:
        batch = self.rows("train", self.n_match)
        labels = self.labels(batch, "train")
        assert labels is not None
        return match_latents(
            coding(sae, batch.x).codes.numpy(),
            labels.members.numpy(),
            labels.known.numpy(),
            parent=labels.parent,
            n_parents=sae.m if isinstance(sae, HierarchicalSAE) else 0,
        )

    @torch.no_grad()
    def _losses(self, sae: HierarchicalSAE | FlatSAE) -> Mapping[str, Tensor]:
        """Cross-entropy of the next token when something stands in for the stream at the hook."""
        if self.model is None:
            return {}
        own = self._loss_with(lambda x: coding(sae, x.float().cpu()).reconstruction)
        return {**self._beside, "sae": own}

    @cached_property
    def _beside(self) -> dict[str, Tensor]:
        """The losses that no autoencoder has a part in, read once."""
        mean = self.rows("train", self.n_watch).x.mean(dim=0, keepdim=True)
        return {
            "clean": self._loss_with(lambda x: x),
            "zero": self._loss_with(lambda x: torch.zeros_like(x[:1])),
            "mean": self._loss_with(lambda x: mean.to(x)),
        }

    @cached_property
    def _windows(self) -> list[Window]:
        assert isinstance(self.task, ActivationDataModule)
        return self.task.windows(self.model, "test", self.n_loss)

    def _loss_with(self, stand_in: StandIn) -> Float[Tensor, " token"]:
        """The losses; at an earlier hook, by a forward pass of all that lies behind it."""
        if self.task.hook == UNEMBED_INPUT:
            batch = self.rows("test", self.n_loss)
            answers = batch.ids[:, COLUMNS.index("next_token")].long()
            return self._loss(stand_in(batch.x[answers >= 0]), answers[answers >= 0])
        found = []
        for begin in range(0, len(self._windows), WINDOWS):
            some = self._windows[begin : begin + WINDOWS]
            states = unembed_input_with(self.model, some, self.task.hook, stand_in)
            ids = torch.from_numpy(np.concatenate([window.ids for window in some]))
            answers = ids[:, COLUMNS.index("next_token")].long()
            found.append(self._loss(states[answers >= 0], answers[answers >= 0]))
        return torch.cat(found)

    def _loss(self, states: Float[Tensor, "row d"], answers: Tensor) -> Float[Tensor, " token"]:
        assert self.model is not None
        decoder, found = self.model.decoder, []
        size = max(1, CELLS // decoder.n_vocab)
        for begin in range(0, len(answers), size):
            part = states if len(states) == 1 else states[begin : begin + size]
            logits = decoder.unembed(part.to(decoder.device, decoder.dtype)).float()
            own = answers[begin : begin + size].to(logits.device)
            found.append(
                functional.cross_entropy(logits.expand(len(own), -1), own, reduction="none").cpu()
            )
        return torch.cat(found)


@torch.no_grad()
def coding(sae: HierarchicalSAE | FlatSAE, x: Float[Tensor, "row d"]) -> Coding:
    """What an SAE makes of rows, a few thousand at a time, on the CPU."""
    place = next(sae.parameters()).device
    kept: dict[str, list[Tensor]] = {"reconstruction": [], "codes": [], "parents_only": []}
    for part in x.split(4096):
        if isinstance(sae, HierarchicalSAE):
            codes = sae.encode(part.to(place))
            kept["parents_only"].append(sae.decode_parents(codes).cpu())
            kept["reconstruction"].append(sae.decode(codes).cpu())
            kept["codes"].append(codes.dense().cpu())
        else:
            flat = sae.encode(part.to(place))
            kept["reconstruction"].append(sae.decode(flat).cpu())
            kept["codes"].append(flat.dense().cpu())
    parents = kept["parents_only"]
    return Coding(
        x=x,
        reconstruction=torch.cat(kept["reconstruction"]),
        codes=torch.cat(kept["codes"]),
        n_parents=sae.m if isinstance(sae, HierarchicalSAE) else 0,
        parents_only=torch.cat(parents) if parents else None,
    )
