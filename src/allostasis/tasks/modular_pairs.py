"""Pairs of numbers with their sum modulo p, and the split of all of them by a seed."""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from allostasis.core.seeding import derive

Op = Literal["add", "subtract"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Questions 'a op b =' and their answers.

    Attributes:
        a: Left operand, 0 to p - 1.
        b: Right operand, 0 to p - 1.
        answer: The label, 0 to p - 1.
        p: The modulus, which is also the '=' token.
    """

    a: Int64[Tensor, " pair"]
    b: Int64[Tensor, " pair"]
    answer: Int64[Tensor, " pair"]
    p: int

    def __len__(self) -> int:
        return len(self.a)

    @cached_property
    def tokens(self) -> Int64[Tensor, "pair 3"]:
        """The questions as a model reads them: a, b, '='. The answer is not among them."""
        return torch.stack((self.a, self.b, torch.full_like(self.a, self.p)), dim=1)

    @cached_property
    def sha256(self) -> str:
        """Hash of the operands, so that two runs can prove that they used the same pairs."""
        operands = torch.stack((self.a, self.b)).cpu().numpy().astype("<i8")
        return hashlib.sha256(operands.tobytes()).hexdigest()

    def to(self, device: torch.device | str) -> "Pairs":
        """The same pairs on a device; this very object where they are there already."""
        if self.a.device == torch.device(device):
            return self
        return Pairs(
            a=self.a.to(device), b=self.b.to(device), answer=self.answer.to(device), p=self.p
        )


class Split(NamedTuple):
    """Numbers of pairs, a p + b: sorted for both sets, and the test set as it was drawn."""

    train: Int64[Tensor, " pair"]
    test: Int64[Tensor, " pair"]
    drawn_test: Int64[Tensor, " pair"]


def n_train_pairs(p: int, train_frac: float) -> int:
    """How many of the p^2 pairs are trained on: floor(train_frac p^2).

    Example:
        >>> n_train_pairs(113, 0.3)
        3830
    """
    return math.floor(train_frac * p * p)


def split(seed: int, *, p: int, train_frac: float) -> Split:
    """The pairs trained on and the others, permuted by the seed's `data` randomness on the CPU."""
    n_train = n_train_pairs(p, train_frac)
    order = torch.randperm(p * p, generator=generator(seed, "data"))
    return Split(order[:n_train].sort().values, order[n_train:].sort().values, order[n_train:])


def pairs_of(index: Int64[Tensor, " pair"], *, p: int, op: Op = "add") -> Pairs:
    """Pairs by their numbers a p + b."""
    a, b = index // p, index % p
    answer = a + b if op == "add" else a - b
    return Pairs(a=a, b=b, answer=answer % p, p=p)


def generator(seed: int, name: str) -> torch.Generator:
    """The seed's generator for one kind of randomness."""
    return torch.Generator().manual_seed(derive(seed, name))
