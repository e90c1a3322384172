"""Tables and documents of `heads_ov`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from allostasis.analysis import ov_tokens
from allostasis.engines.ov import HeadCircuit, HeadWrite, Tokens
from allostasis.experiments.heads.asked import Asked
from allostasis.experiments.heads.vocabulary import Vocabulary

Report = Literal["circuit", "write"]

NUMBERS: Mapping[Report, Mapping[str, str]] = {
    "circuit": {
        "copying_score": "1", "eigenvalue_positivity": "1", "ov_positivity": "1",
        "frobenius_norm": "resid/resid", "spectral_norm": "resid/resid",
    },
    "write": {
        "vector_norm": "resid", "norm_ratio": "1", "snr": "1",
        "target": "logit", "foil": "logit", "delta": "logit",
    },
}  # fmt: skip
"""By report, numbers of a head with their units."""


def rows(
    report: Report, found: Sequence[HeadCircuit | HeadWrite], n: int
) -> Iterator[dict[str, Any]]:
    """Rows of metrics.parquet: each head's numbers.

    Args:
        report: Which report.
        found: Its heads.
        n: Input words, or prompts.
    """
    for one in found:
        for name, unit in NUMBERS[report].items():
            yield {
                "metric": f"ov_{report}.{name}", "symbol": "other", "unit": unit,
                "split": "test" if report == "write" else None, "layer": one.layer,
                "head": one.head, "value": getattr(one, name), "n": n, "n_unique": n,
            }  # fmt: skip


def tokens(
    report: Report, found: Sequence[HeadCircuit | HeadWrite], vocabulary: Vocabulary, model: str
) -> pd.DataFrame:
    """Rows of ov_tokens.parquet: every listed token."""
    made = []
    for one in found:
        for end, some in (("top", one.top), ("bottom", one.bottom)):
            for rank, (index, text, logit) in enumerate(_read(some, vocabulary)):
                made.append({
                    "model": model, "report": report, "layer": one.layer, "head": one.head,
                    "end": end, "rank": rank, "token_id": index, "token": text, "logit": logit,
                    "is_fragment": ov_tokens.is_fragment(text),
                    "snr": one.snr if isinstance(one, HeadWrite) else np.nan,
                })  # fmt: skip
    return pd.DataFrame(made)


def _read(some: Tokens, vocabulary: Vocabulary) -> Iterator[tuple[int, str, float]]:
    for index, logit in zip(some.ids.tolist(), some.logits.tolist(), strict=True):
        yield index, vocabulary.text(index), logit


def words(listed: pd.DataFrame) -> pd.DataFrame:
    """ov_words.parquet: words of each lexicon in every head's lists, by report and end."""
    return pd.concat(
        [
            ov_tokens.enrichment(ov_tokens.lists(some)).assign(
                report=some["report"].iloc[0], end=some["end"].iloc[0]
            )
            for _, some in listed.groupby(["report", "end"])
        ],
        ignore_index=True,
    )


def examples(
    asked: Asked,
    columns: Mapping[str, np.ndarray],
    heads: Sequence[tuple[int, int]],
    sets: Sequence[str],
) -> pd.DataFrame:
    """Rows of examples.parquet: one a prompt and head.

    Args:
        asked: The prompts of a split.
        columns: [head, prompt].
        heads: (layer, head) pairs.
        sets: What claims call each.
    """
    said = pd.DataFrame([
        {
            "example": e.example, "row_id": e.row.id, "group": e.group, "cell": e.cell,
            "split": e.split, "target_id": e.target_id, "foil_id": e.foil_id,
        }
        for e in asked.examples
    ])  # fmt: skip
    return pd.concat([
        said.assign(
            ablation="none", intervention=f"write:{layer}.{head}", set=name, layer=layer, head=head,
            **{column: values[index] for column, values in columns.items()},
        )
        for index, ((layer, head), name) in enumerate(zip(heads, sets, strict=True))
    ])  # fmt: skip


def listed(
    report: Report, found: Sequence[HeadCircuit | HeadWrite], vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """Heads in the shape of the source documents' reports."""
    return [
        {
            "layer": one.layer,
            "head": one.head,
            **{name: getattr(one, name) for name in NUMBERS[report]},
            "tokens": {
                end: [
                    {"token_id": index, "token": text, "logit": logit}
                    for index, text, logit in _read(some, vocabulary)
                ]
                for end, some in (("top", one.top), ("bottom", one.bottom))
            },
        }
        for one in found
    ]
