"""Which concepts a row of activations is of, by lemmas of one split alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from allostasis.tasks.concepts import Chosen, ConceptTable
from allostasis.tasks.corpora import Split


class Labels(NamedTuple):
    """Truth about rows, one column a concept.

    Attributes:
        members: Whether the row is of the concept.
        known: Whether that is known: not where the row's token belongs to the concept by a lemma of
            another split, or to two siblings.
        names: What the concepts are called.
        parent: The column of each concept's parent, or -1.
    """

    members: Bool[Tensor, "row concept"]
    known: Bool[Tensor, "row concept"]
    names: tuple[str, ...]
    parent: tuple[int, ...]


def concept_labels(
    tokens: Int[Tensor, " row"], split: Split, table: ConceptTable, chosen: Sequence[Chosen]
) -> Labels:
    """Labels of rows by their tokens; parents first, then the children of each in turn.

    Args:
        tokens: The token that counts for each row; -1 is of no concept.
        split: Whose lemmas count; those of the other splits are not known.
        table: Concepts of the model's tokenizer.
        chosen: A teacher's parents and children.
    """
    synsets = [one.parent for one in chosen]
    parent = [-1] * len(chosen)
    for number, one in enumerate(chosen):
        synsets += one.children
        parent += [number] * len(one.children)
    every = [set(table.ids(synset).tolist()) for synset in synsets]
    n_tokens = 1 + max(max(ids, default=0) for ids in every)
    member = np.zeros((len(synsets), n_tokens + 1), dtype=bool)
    known = np.ones_like(member)
    for number, synset in enumerate(synsets):
        of_siblings: set[int] = set().union(
            *(
                every[other]
                for other, above in enumerate(parent)
                if above == parent[number] >= 0 and other != number
            )
        )
        own = set(table.ids(synset, split).tolist()) - of_siblings
        member[number, sorted(own)] = True
        known[number, sorted(every[number] - own)] = False
    index = tokens.cpu().numpy()
    index = np.where((index < 0) | (index >= n_tokens), n_tokens, index)  # of no concept
    return Labels(
        torch.from_numpy(member[:, index].T.copy()),
        torch.from_numpy(known[:, index].T.copy()),
        tuple(table.names[synset] for synset in synsets),
        tuple(parent),
    )
