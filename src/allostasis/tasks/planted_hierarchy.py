"""Activations whose parents and children are known, because they were put there."""

from __future__ import annotations

import math
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Bool, Float
from torch import Tensor

from allostasis.core.seeding import derive
from allostasis.tasks.activations import ActivationBatch
from allostasis.tasks.corpora import Split
from allostasis.tasks.interleaved_patterns import Steps
from allostasis.tasks.labels import Labels

CHECKED = 100_000  # samples on which the hierarchy is held against its definition
FIRST: dict[Split, int] = {"val": 0, "test": 1, "train": 2}  # seeds of samples; train's go on
CHUNK = 8192  # samples that a split draws with one seed


class PlantedHierarchy(L.LightningDataModule):
    """Sums of parent and child directions; every batch is fresh.

    A batch is a function of seed and update alone. The `ids` of its rows are the features, 1 where
    one is on: parents first, then the children of each in turn.

    Args:
        seed: The run's seed.
        truth: What draws the samples: SAELens's `SyntheticModel`, from `models.sae`.
        n_parents: How many of its features are parents; the others are children, as many of each.
        batch_size: Rows a batch.
        n_rows: Rows of `val` and of `test`.
        is_hierarchical: Whether children need their parents: without, this is the control in which
            there is no hierarchy to be found.
    """

    hook = "planted"

    def __init__(
        self,
        *,
        seed: int,
        truth: Any,
        n_parents: Annotated[int, Gt(1)] = 16,
        batch_size: Annotated[int, Gt(0)] = 512,
        n_rows: Annotated[int, Gt(0)] = 32_768,
        is_hierarchical: bool = True,
    ) -> None:
        super().__init__()
        self.seed, self.truth, self.m, self.batch_size = seed, truth, n_parents, batch_size
        self.n_rows, self.is_hierarchical = n_rows, is_hierarchical
        vectors = truth.feature_dict.feature_vectors.detach()
        self.vectors: Float[Tensor, "feature d"] = vectors / vectors.norm(dim=1, keepdim=True)
        self.n_features, self.d_model = vectors.shape
        if self.n_features % n_parents or self.n_features == n_parents:
            raise ValueError(
                f"task.n_parents={n_parents}: {self.n_features} features are not parents with "
                "equally many children each"
            )
        self.c = self.n_features // n_parents - 1
        self._scale: float | None = None

    def prepare(self, model: Any = None) -> None:
        """Hold 100,000 samples against the definition, and measure the scale.

        Raises:
            RuntimeError: A child is on without its parent, or two of a parent's are.
        """
        del model
        if self._scale is not None:
            return
        batch = self._draw(FIRST["train"], CHECKED)
        if self.is_hierarchical:
            check_hierarchy(batch.ids.bool(), n_parents=self.m)
        self._scale = float(self.d_model**0.5 / batch.x.double().norm(dim=1).mean())

    @property
    def scale(self) -> float:
        """sqrt(d) / E||x||.

        Raises:
            RuntimeError: The task was not prepared.
        """
        if self._scale is None:
            raise RuntimeError("not measured yet: call task.prepare() first")
        return self._scale

    def batch(self, step: int, device: torch.device | str = "cpu") -> ActivationBatch:
        """The rows of an update; drawn on the CPU, so that every device sees the same."""
        return _on(self._draw(FIRST["train"] + 1 + step, self.batch_size), device)

    def split(
        self, split: Split, n: int | None = None, device: torch.device | str = "cpu"
    ) -> ActivationBatch:
        """The first `n` rows of a split, by default `n_rows`."""
        n_rows = n or self.n_rows
        number = derive(self.seed, "probe") // 2 + FIRST[split]
        x, ids = zip(
            *(self._draw(place, CHUNK, number) for place in range(-(-n_rows // CHUNK))), strict=True
        )
        return _on(ActivationBatch(torch.cat(x)[:n_rows], torch.cat(ids)[:n_rows]), device)

    def _draw(self, place: int, n: int, number: int | None = None) -> ActivationBatch:
        start = derive(self.seed, "data") if number is None else number
        with torch.random.fork_rng(devices=[]):
            # the library draws from the global generator
            torch.manual_seed((start * 1_000_003 + place) % 2**63)
            x, features = self.truth.sample_with_features(n)
        return ActivationBatch(x.detach().float(), (features.detach() > 0).int())

    def mean(self) -> Float[Tensor, " d"]:
        """Mean of the first rows of `train`."""
        return self.split("train", 65_536).x.double().mean(dim=0).float()

    def labels(self, batch: ActivationBatch, split: Split | None = None) -> Labels:
        """Which features are on in each row: all of it is known."""
        del split
        parents = [-1] * self.m
        children = [parent for parent in range(self.m) for _ in range(self.c)]
        names = [f"parent {j}" for j in range(self.m)]
        names += [f"child {j}.{k}" for j in range(self.m) for k in range(self.c)]
        members = batch.ids.bool()
        return Labels(members, torch.ones_like(members), tuple(names), (*parents, *children))

    def directions(
        self, noise_deg: Annotated[float, Ge(0), Le(90)] = 0.0
    ) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m c d"]]:
        """A teacher: the true directions, each turned away from itself by an angle.

        Args:
            noise_deg: The angle in degrees, towards a direction that the seed draws.
        """
        generator = torch.Generator().manual_seed(derive(self.seed, "control"))
        noise = torch.randn(self.vectors.shape, generator=generator, dtype=torch.float64)
        true = self.vectors.double()
        noise -= (noise * true).sum(dim=1, keepdim=True) * true
        noise /= noise.norm(dim=1, keepdim=True)
        angle = math.radians(noise_deg)
        turned = (math.cos(angle) * true + math.sin(angle) * noise).float()
        return turned[: self.m], turned[self.m :].view(self.m, self.c, self.d_model)

    def train_dataloader(self) -> Steps:
        """Steps without end: the module counts its updates and asks for their batches."""
        return Steps(None)

    def test_dataloader(self) -> Steps:
        """One step."""
        return Steps(1)

    def facts(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return {
            "kind": "planted", "n_parents": self.m, "n_children": self.c, "d_model": self.d_model,
            "scale": self.scale, "is_hierarchical": self.is_hierarchical, "n_test": self.n_rows,
        }  # fmt: skip


def check_hierarchy(on: Bool[Tensor, "row feature"], *, n_parents: int) -> None:
    """See that no child is on without its parent, nor two of a parent's at once.

    Args:
        on: Which features are on: parents first, then the children of each in turn.
        n_parents: How many of them are parents.

    Raises:
        RuntimeError: It is so in some row.

    Example:
        >>> check_hierarchy(torch.tensor([[True, True, False]]), n_parents=1)
    """
    parents, children = on[:, :n_parents], on[:, n_parents:].view(len(on), n_parents, -1)
    orphans = int((children.any(dim=2) & ~parents).sum())
    crowded = int((children.sum(dim=2) > 1).sum())
    if orphans or crowded:
        raise RuntimeError(
            f"of {len(on):,} samples {orphans} have a child without its parent and {crowded} two "
            "children of one parent: this is not the hierarchy that it is said to be"
        )


def _on(batch: ActivationBatch, device: torch.device | str) -> ActivationBatch:
    return ActivationBatch(batch.x.to(device), batch.ids.to(device))
