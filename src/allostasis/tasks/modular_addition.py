"""Modular addition: every pair of numbers below p, a fixed split, the answer read at '='."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import lightning as L
import torch
from annotated_types import Gt, Lt

from allostasis.tasks.modular_pairs import Op, Pairs, generator, n_train_pairs, pairs_of, split

__all__ = ["Ceiling", "FullBatch", "ModularAddition", "Pairs", "Part"]

Part = Literal["train", "test", "probe", "all"]


class Ceiling(NamedTuple):
    """The best that any predictor can reach.

    Attributes:
        accuracy: Share of pairs answered rightly, in [0, 1].
        cross_entropy: Nats a pair, at least 0.
    """

    accuracy: float
    cross_entropy: float


class FullBatch:
    """A loader whose every batch is the same pairs: no sampler, no worker, no random draw."""

    def __init__(self, pairs: Pairs, *, times: int | None) -> None:
        self.pairs, self.times = pairs, times

    def __iter__(self) -> Iterator[Pairs]:
        if self.times is None:
            return itertools.repeat(self.pairs)
        return itertools.repeat(self.pairs, self.times)


class ModularAddition(L.LightningDataModule):
    """All p^2 ordered pairs, split once and for all by the seed.

    The pairs are permuted with the seed's `data` randomness; the first floor(train_frac p^2) are
    for training, the others for the test. The probe is a fixed part of the test pairs, drawn with
    the seed's `probe` randomness. The pairs of a set are sorted by (a, b), those of the probe are
    not: its neighbours have nothing to do with each other.

    Args:
        seed: The run's seed.
        p: The modulus. Tokens 0 to p - 1 are numbers, p is '='.
        train_frac: Share of the pairs that are trained on.
        probe_size: How many test pairs the probe holds.
        op: `add`: the answer is (a + b) mod p. `subtract`: it is (a - b) mod p.

    Raises:
        ValueError: A set would be empty, or the probe larger than the test set.

    Example:
        >>> task = ModularAddition(seed=0)
        >>> len(task.train), len(task.test), len(task.probe), len(task.all)
        (3830, 8939, 512, 12769)
    """

    def __init__(
        self,
        *,
        seed: int,
        p: Annotated[int, Gt(2)] = 113,
        train_frac: Annotated[float, Gt(0), Lt(1)] = 0.3,
        probe_size: Annotated[int, Gt(0)] = 512,
        op: Op = "add",
    ) -> None:
        super().__init__()
        self.p = p
        self.op: Op = op
        n_pairs, n_train = p * p, n_train_pairs(p, train_frac)
        n_test = n_pairs - n_train
        if n_train < 1:
            raise ValueError(
                f"train_frac={train_frac} of the {n_pairs} pairs at p={p} leaves none to train on; "
                f"set train_frac to at least {1 / n_pairs:.2g}"
            )
        if probe_size > n_test:
            raise ValueError(
                f"probe_size={probe_size} is more than the {n_test} test pairs that p={p} and "
                f"train_frac={train_frac} leave; set probe_size to 1 to {n_test}"
            )
        drawn = split(seed, p=p, train_frac=train_frac)
        chosen = torch.randperm(n_test, generator=generator(seed, "probe"))[:probe_size]
        self.train = pairs_of(drawn.train, p=p, op=op)
        self.test = pairs_of(drawn.test, p=p, op=op)
        self.probe = pairs_of(drawn.drawn_test[chosen], p=p, op=op)
        self.all = pairs_of(torch.arange(n_pairs), p=p, op=op)
        self._moved: dict[tuple[Pairs, torch.device], Pairs] = {}

    def train_dataloader(self) -> FullBatch:
        """Every batch is the whole training set, without end: the module counts the updates."""
        return FullBatch(self.train, times=None)

    def test_dataloader(self) -> FullBatch:
        """One batch: the whole test set."""
        return FullBatch(self.test, times=1)

    def transfer_batch_to_device(
        self, batch: Pairs, device: torch.device, dataloader_idx: int
    ) -> Pairs:
        """Move a set of pairs once, and hand out the moved one from then on."""
        del dataloader_idx
        if (batch, device) not in self._moved:
            self._moved[batch, device] = batch.to(device)
        return self._moved[batch, device]

    def ceiling(self, part: Part) -> Ceiling:
        """What a predictor that knows the rule reaches on a set: every answer follows from (a, b).

        Args:
            part: The set, for the caller's sake: all have the same ceiling.

        Returns:
            Accuracy 1 and cross-entropy 0 nats.
        """
        del part
        return Ceiling(accuracy=1.0, cross_entropy=0.0)
