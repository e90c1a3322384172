"""What the report of `heads_ov` shows: a page of tokens, maps of circuits and writes, words."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from allostasis.analysis import heatmap, lab_tables
from allostasis.analysis import ov_figures as ov
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure
from allostasis.analysis.tables import Table

CIRCUIT = {
    "copying_score": (
        "Copying", "Share of words whose own logit the head raises into the top 1 %.", "1",
    ),
    "eigenvalue_positivity": (
        "Eigenvalues from token to token",
        "Sum over sum of absolute values, whole vocabulary: 1 copies, -1 suppresses what it reads. "
        "The direction that all embeddings share weighs heavily.",
        "1",
    ),
    "ov_positivity": ("Eigenvalues of W_V W_O", "Sum over sum of absolute values.", "1"),
    "frobenius_norm": ("Norm of W_V W_O", "Frobenius norm, in units of the stream.", "resid/resid"),
}  # fmt: skip
WRITE = {
    "delta": ("Direct effect", "Mean of what a head adds to target less foil, on test.", "logit"),
    "snr": (
        "Signal to noise of the mean write",
        f"Below {ov.SILENT:g} a head has no measurable direct effect on average.",
        "1",
    ),
}  # fmt: skip


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """What the strongest heads write, with a page of every head's tokens; then the maps."""
    found = [
        Figure(
            "ov",
            "What every head writes",
            "Picture: the heads of the largest direct effects on target less foil, with 95 % "
            "intervals over groups of prompts, and the tokens that each writes for and against; of "
            "a corpus's first seed. They are chosen by this number, so that it is too large. Page: "
            "the tokens of every head, first of its weights alone, then on each corpus at the last "
            "token; pieces of words in italics; · is a space. Grey: no measurable direct effect.",
            partial(ov.draw, arms),
            partial(ov.page, arms),
        )
    ]
    for report, quantities in (("write", WRITE), ("circuit", CIRCUIT)):
        for name, (title, caption, unit) in quantities.items():
            drawn = partial(_draw, arms, report, name, unit)
            paged = partial(_page, arms, report, name, unit)
            found.append(Figure(f"{name}_heads", title, caption, drawn, paged))
    return found


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Largest effects, frequent tokens, clusters, words, overlaps between corpora."""
    makers = [
        ov.effects_table, ov.counts_table, ov.clusters_table, ov.words_table, ov.overlap_table,
    ]  # fmt: skip
    return lab_tables.made(makers, arms)


def _draw(arms: Sequence[Arm], report: str, name: str, unit: str) -> Any:
    return heatmap.draw(ov.maps(arms, report, name, unit))


def _page(arms: Sequence[Arm], report: str, name: str, unit: str) -> Any:
    return heatmap.page(ov.maps(arms, report, name, unit))
