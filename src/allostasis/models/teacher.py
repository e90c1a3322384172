"""Concept vectors as they are handed from one experiment to the next, keyed by synset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from allostasis.core.records import write_atomically
from allostasis.core.spaces import CausalMetric, UnembVec

FILE = "teacher.safetensors"
VERSION = "1"


@dataclass(frozen=True)
class Teacher:
    """Parents and their children, as vectors of the unembedding.

    A parent is the vector of a concept, a delta what its child's vector has beyond it; neither is
    normalised. `metric.to_resid` makes directions of the residual stream of them.

    Attributes:
        parents: Raw coordinates of the unembedding's space.
        deltas: Child less parent, likewise; 0 where `mask` is false.
        mask: Which slots hold a child.
        synsets: WordNet offset of each parent.
        child_synsets: Of each child, in its parent's row.
        metric: The covariance and the mean under which they were estimated.
        tokenizer_sha256: Of the model's tokenizer.
        weights_sha256: Of the model's weights.
    """

    parents: UnembVec
    deltas: UnembVec
    mask: Bool[Tensor, "parent child"]
    synsets: tuple[int, ...]
    child_synsets: tuple[tuple[int, ...], ...]
    metric: CausalMetric
    tokenizer_sha256: str
    weights_sha256: str

    def __post_init__(self) -> None:
        counts = [len(children) for children in self.child_synsets]
        shape = (len(self.synsets), *self.deltas.values.shape[1:])
        assert self.deltas.values.shape == shape
        assert self.parents.values.shape == (shape[0], shape[2])
        assert self.mask.sum(dim=1).tolist() == counts
        assert len(set(self.synsets)) == len(self.synsets)

    def at(self, synsets: Sequence[int]) -> Teacher:
        """The same with its parents in another order, or fewer of them.

        Raises:
            KeyError: A synset is none of its parents.
        """
        rows = {synset: row for row, synset in enumerate(self.synsets)}
        order = [rows[synset] for synset in synsets]
        return Teacher(
            UnembVec(self.parents.values[order]),
            UnembVec(self.deltas.values[order]),
            self.mask[order],
            tuple(synsets),
            tuple(self.child_synsets[row] for row in order),
            self.metric,
            self.tokenizer_sha256,
            self.weights_sha256,
        )


def write_teacher(path: Path, teacher: Teacher) -> None:
    """Write a teacher as safetensors; which row is which concept stands in the header."""
    tensors = {
        "parents": teacher.parents.values,
        "deltas": teacher.deltas.values,
        "mask": teacher.mask,
        "sigma": teacher.metric.sigma,
        "gamma_bar": teacher.metric.mean,
    }
    header = {
        "version": VERSION,
        "synsets": json.dumps(teacher.synsets),
        "child_synsets": json.dumps(teacher.child_synsets),
        "shrinkage": repr(teacher.metric.shrinkage),
        "tokenizer_sha256": teacher.tokenizer_sha256,
        "weights_sha256": teacher.weights_sha256,
    }
    content = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(content, file, metadata=header))


def read_teacher(path: Path) -> Teacher:
    """Read a teacher, its parents in ascending order of synset, whatever order the file has.

    So that two files with the same concepts give the same rows; children likewise.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no teacher; make one with python -m allostasis +exp=hsae_teacher"
        )
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header.get("version") != VERSION:
        raise ValueError(
            f"{path} is a teacher of version {header.get('version')}, and this is {VERSION}; "
            "make it again with python -m allostasis +exp=hsae_teacher force=true"
        )
    synsets: list[int] = json.loads(header["synsets"])
    child_synsets: list[list[int]] = json.loads(header["child_synsets"])
    deltas, mask = tensors["deltas"].clone(), tensors["mask"].clone()
    sorted_children: list[tuple[int, ...]] = []
    for row, children in enumerate(child_synsets):
        slots = mask[row].nonzero().flatten().tolist()
        order = sorted(range(len(children)), key=children.__getitem__)
        deltas[row] = 0
        mask[row] = False
        deltas[row, : len(order)] = tensors["deltas"][row, [slots[place] for place in order]]
        mask[row, : len(order)] = True
        sorted_children.append(tuple(children[place] for place in order))
    found = Teacher(
        UnembVec(tensors["parents"]),
        UnembVec(deltas),
        mask,
        tuple(synsets),
        tuple(sorted_children),
        CausalMetric(tensors["sigma"], tensors["gamma_bar"], float(header["shrinkage"])),
        header["tokenizer_sha256"],
        header["weights_sha256"],
    )
    return found.at(sorted(synsets))
