"""Where a steering vector comes from: the teacher, an autoencoder, the data, or chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from allostasis.analysis.matching import Matches, match_latents
from allostasis.core.records import RunRecord, read_run
from allostasis.core.spaces import UnembVec
from allostasis.models.teacher import Teacher
from allostasis.tasks.activations import ActivationDataModule
from allostasis.tasks.concepts import Chosen, ConceptTable

FEWEST = 2  # rows of a concept for a mean of them


@dataclass(frozen=True)
class Concept:
    """A concept that is steered towards.

    Attributes:
        name: What it is called.
        synset: WordNet offset.
        parent: Of the concept above it, or None.
        targets: Held-out members, whose probability counts.
        members: All members.
        near: Members of its siblings: children of the same parent, or other parents.
        far: Members of what is no sibling of a child.
    """

    name: str
    synset: int
    parent: int | None
    targets: np.ndarray
    members: np.ndarray
    near: np.ndarray
    far: np.ndarray

    @property
    def level(self) -> str:
        """`parent` or `child`."""
        return "parent" if self.parent is None else "child"


@dataclass(frozen=True)
class Source:
    """A direction of the stream, of unit length.

    Attributes:
        name: `teacher`, `sae`, `means` or `random`.
        direction: Empty where there is none.
        latent: The autoencoder's latent, or -1.
        draw: Which of several random ones.
        why_not: Why there is no direction.
    """

    name: str
    direction: Float64[Tensor, " d"] | None
    latent: int = -1
    draw: int = 0
    why_not: str = ""


def chosen_of(teacher: Teacher) -> list[Chosen]:
    """A teacher's parents and children, as labels ask for them."""
    pairs = zip(teacher.synsets, teacher.child_synsets, strict=True)
    return [Chosen(parent, tuple(children), ()) for parent, children in pairs]


def concepts_of(
    table: ConceptTable, chosen: Sequence[Chosen], *, max_parents: int, max_children: int
) -> list[Concept]:
    """Parents, each followed by some of its children; one without a held-out member is left out."""
    found = []
    every = {one.parent: table.ids(one.parent) for one in chosen}
    for one in chosen[:max_parents]:
        own = every[one.parent]
        others = _union(ids for synset, ids in every.items() if synset != one.parent)
        near = np.setdiff1d(others, own)
        targets = np.setdiff1d(table.ids(one.parent, "test"), others)
        name = table.names[one.parent]
        found.append(Concept(name, one.parent, None, targets, own, near, near[:0]))
        for child in one.children[:max_children]:
            members = table.ids(child)
            siblings = _union(table.ids(other) for other in one.children if other != child)
            targets = np.setdiff1d(table.ids(child, "test"), siblings)
            close = np.setdiff1d(siblings, members)
            distant = np.setdiff1d(near, members)
            name = table.names[child]
            found.append(Concept(name, child, one.parent, targets, members, close, distant))
    return [concept for concept in found if len(concept.targets)]


def _union(pieces: Iterator[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *pieces]))


class Sources:
    """All directions for the concepts of a teacher.

    Args:
        sae: A SAELens autoencoder; its codes and atoms are in the stream's own units.
        task: Whose training rows decide which latent is which concept.
        table: Concepts of the tokenizer.
        teacher: Vectors of the unembedding.
        n_match: Training rows.
    """

    def __init__(
        self,
        sae: Any,
        task: ActivationDataModule,
        table: ConceptTable,
        teacher: Teacher,
        *,
        n_match: int,
    ) -> None:
        batch = task.split("train", n_match)
        chosen = chosen_of(teacher)
        labels = task.labels(batch, "train", table, chosen)
        synsets = [one.parent for one in chosen] + [c for one in chosen for c in one.children]
        self.column = {synset: place for place, synset in enumerate(synsets)}
        self.x, self.labels, self.teacher = batch.x.double(), labels, teacher
        self.atoms = sae.W_dec.detach().double().cpu()
        self.matches: Matches = match_latents(
            codes_of(sae, batch.x).numpy(),
            labels.members.numpy(),
            labels.known.numpy(),
            parent=labels.parent,
            n_parents=n_parents_of(sae),
        )

    def of(self, concept: Concept, rng: np.random.Generator, n_random: int) -> Iterator[Source]:
        """The teacher's vector, the matched atom, a difference of means, random directions."""
        yield Source("teacher", _unit(self._taught(concept)))
        latent = int(self.matches.latent[self.column[concept.synset]])
        if latent < 0:
            yield Source("sae", None, why_not="no latent was matched on train")
        else:
            yield Source("sae", _unit(self.atoms[latent]), latent)
        yield self._means(concept)
        for draw in range(n_random):
            noise = torch.from_numpy(rng.standard_normal(self.x.shape[1]))
            yield Source("random", _unit(noise), draw=draw)

    def _taught(self, concept: Concept) -> Float64[Tensor, " d"]:
        """A parent's vector, or what a child has beyond its parent."""
        teacher = self.teacher
        if concept.parent is None:
            vector = teacher.parents.values[teacher.synsets.index(concept.synset)]
        else:
            row = teacher.synsets.index(concept.parent)
            slots = teacher.mask[row].nonzero().flatten()
            place = teacher.child_synsets[row].index(concept.synset)
            vector = teacher.deltas.values[row, slots[place]]
        return teacher.metric.to_resid(UnembVec(vector)).values.double()

    def _means(self, concept: Concept) -> Source:
        column = self.column[concept.synset]
        known, members = self.labels.known[:, column], self.labels.members[:, column]
        own, others = self.x[known & members], self.x[known & ~members]
        if min(len(own), len(others)) < FEWEST:
            return Source("means", None, why_not=f"fewer than {FEWEST} training rows")
        return Source("means", _unit(own.mean(dim=0) - others.mean(dim=0)))


def _unit(vector: Float64[Tensor, " d"]) -> Float64[Tensor, " d"]:
    return vector / vector.norm()


@torch.no_grad()
def codes_of(sae: Any, x: Float[Tensor, "row d"]) -> Float[Tensor, "row latent"]:
    """An autoencoder's latents, a few thousand rows at a time, on the CPU."""
    place = sae.W_dec.device
    return torch.cat([sae.encode(part.to(place)).float().cpu() for part in x.split(4096)])


def n_parents_of(sae: Any) -> int:
    """How many of a SAELens autoencoder's latents are parents; 0 for a flat one."""
    return int(getattr(sae.cfg, "m", 0))


def run_that_was_read(record: RunRecord, exp: str) -> RunRecord:
    """The run of another experiment that a finished run has read.

    Args:
        record: The run that read.
        exp: The experiment whose run it read.

    Raises:
        FileNotFoundError: It read none, or that run is no longer there.
    """
    read = record.run.get("read", {}).get(exp)
    if read is None:
        raise FileNotFoundError(f"{record.folder} names no run of {exp} that it read")
    name, _, rest = str(read["run_id"]).partition("-")
    condition, seed, device, digest = rest.rsplit("-", 3)
    outputs: Path = record.folder.parents[3]
    return read_run(outputs / name / condition / f"seed={seed}" / f"{device}-{digest}")
