"""Rows of the unembedding in whitened coordinates, and what stands in their place in a control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.core.spaces import CausalMetric, UnembVec, causal_metric
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.concepts import ConceptTable

Control = Literal["shuffled", "gaussian", "permuted", "euclidean"]
"""`shuffled`: one permutation of the vocabulary's rows. `gaussian`: standard normal rows.
`permuted`: nouns are permuted among themselves. `euclidean`: the rows themselves, centred.
"""


def kept_tokens(model: LanguageModel) -> np.ndarray:
    """Ids that are a token of the tokenizer and no special one."""
    size = min(model.decoder.n_vocab, len(model.tokenizer))
    return np.setdiff1d(np.arange(size), model.tokenizer.all_special_ids)


def unembedding(model: LanguageModel) -> Float[Tensor, "vocab width"]:
    """Rows of a model's unembedding, by token, float32 on the CPU."""
    return model.decoder.W_U.detach().T.float().cpu()


@dataclass(frozen=True)
class Cloud:
    """Whitened rows by token id.

    Attributes:
        rows: Gives those of some ids.
        background: Ids that members are told from.
    """

    rows: Callable[[np.ndarray], Float[Tensor, "token width"]]
    background: np.ndarray


def cloud(
    raw: Float[Tensor, "vocab width"],
    metric: CausalMetric,
    kept: np.ndarray,
    background: np.ndarray,
    *,
    control: Control | None,
    nouns: np.ndarray,
    rng: np.random.Generator,
) -> Cloud:
    """The rows of a model, or of a control that has the same tokens in the same places.

    Args:
        raw: Rows of the unembedding.
        metric: Whitens them.
        kept: Ids that count.
        background: Ids that members are told from.
        control: What is done to them; None leaves them as they are.
        nouns: Ids of the table.
        rng: Draws the control.
    """
    instead = np.arange(len(raw))
    if control == "shuffled":
        instead[kept] = rng.permutation(kept)
    elif control == "permuted":
        instead[nouns] = rng.permutation(nouns)
    if control == "gaussian":
        noise = torch.randn(
            len(raw), raw.shape[1],
            generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
        )  # fmt: skip
        return Cloud(lambda ids: noise[torch.from_numpy(ids)].double(), background)
    used = (
        causal_metric(UnembVec(raw[kept]), metric="euclidean") if control == "euclidean" else metric
    )

    def rows(ids: np.ndarray) -> Float[Tensor, "token width"]:
        return used.whiten_points(UnembVec(raw[torch.from_numpy(instead[ids])]))

    return Cloud(rows, background)


@dataclass(frozen=True)
class Placed:
    """A table's tokens in a cloud, whitened once.

    Attributes:
        table: The concepts.
        ids: Every token of the table, ascending.
        rows: Of them, whitened.
        background: Ids that members are told from.
        others: Their rows.
    """

    table: ConceptTable
    ids: np.ndarray
    rows: Float[Tensor, "token width"]
    background: np.ndarray
    others: Float[Tensor, "other width"]

    @classmethod
    def of(cls, table: ConceptTable, there: Cloud) -> Placed:
        """Look every token up."""
        ids = np.unique(table.tokens["token_id"].to_numpy())
        background = there.background
        return cls(table, ids, there.rows(ids), background, there.rows(background))

    def at(self, ids: np.ndarray) -> Float[Tensor, "token width"]:
        """Rows of some tokens of the table."""
        return self.rows[torch.from_numpy(np.searchsorted(self.ids, ids))]
