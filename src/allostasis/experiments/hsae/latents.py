"""What a browser of latents reads: how often each is on, and the held-out rows where it is most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from allostasis.analysis.matching import Matches
from allostasis.metrics.base import Coding
from allostasis.tasks.activations import COLUMNS, ActivationBatch

N_EXAMPLES = 8
BEFORE = 12  # tokens of a row's context
MOST = 4096  # latents that are listed: matched ones first, then those that are on most often


def latent_table(
    coding: Coding,
    matches: Matches,
    names: Sequence[str],
    members: Bool[np.ndarray, "row concept"],
    context: Callable[[int], str],
) -> pd.DataFrame:
    """One row a latent and example, and one without example for a latent that is never on.

    Args:
        coding: Codes of held-out rows.
        matches: Which concepts the latents were matched to, on training rows.
        names: What the concepts are called.
        members: Which rows are of which concept.
        context: A row in words.

    Returns:
        Columns `latent`, `parent` (the latent above it; -1), `concept` (that it is the best match
        of; empty), `rate` (share of rows where it is on), `mean_code` (where it is on; null),
        `rank`, `row`, `code`, `of` (concepts of the row) and `text`.
    """
    codes = coding.codes.numpy()
    rate = (codes > 0).mean(axis=0)
    order = np.lexsort((-rate, ~np.isin(np.arange(len(rate)), matches.best)))[:MOST]
    found: list[dict[str, object]] = []
    for latent in sorted(order.tolist()):
        column = codes[:, latent]
        on = np.flatnonzero(column > 0)
        top = on[np.argsort(-column[on], kind="stable")][:N_EXAMPLES]
        fixed = {
            "latent": latent,
            "parent": int(matches.parent_of_latent[latent]),
            "concept": ", ".join(names[i] for i in np.flatnonzero(matches.best == latent).tolist()),
            "rate": float(rate[latent]),
            "mean_code": float(column[on].mean()) if len(on) else None,
        }
        found += [
            {
                **fixed,
                "rank": rank,
                "row": int(row),
                "code": float(column[row]),
                "of": ", ".join(names[i] for i in np.flatnonzero(members[row]).tolist()),
                "text": context(int(row)),
            }
            for rank, row in enumerate(top)
        ] or [{**fixed, "rank": None, "row": None, "code": None, "of": None, "text": None}]
    return pd.DataFrame(found).astype({"rank": "Int64", "row": "Int64"})


def in_words(
    batch: ActivationBatch, decode: Callable[[list[int]], str] | None
) -> Callable[[int], str]:
    """A row as the tokens up to its own, which is marked, and the one that came next.

    Earlier tokens are told as far as they are among these rows; rows that are of no text are empty.
    """
    if decode is None:
        return lambda row: ""  # noqa: ARG005
    ids: Int[np.ndarray, "row column"] = batch.ids.cpu().numpy()
    document, position, token, after = (ids[:, COLUMNS.index(name)] for name in COLUMNS[:4])
    at = {(int(d), int(p)): int(t) for d, p, t in zip(document, position, token, strict=True)}

    def words(row: int) -> str:
        where = range(int(position[row]) - BEFORE, int(position[row]))
        before = [at[int(document[row]), p] for p in where if (int(document[row]), p) in at]
        following = decode([int(after[row])]) if after[row] >= 0 else ""
        return f"{decode(before)}[{decode([int(token[row])])}]{following}"

    return words
