"""What the report shows of the causal audit beside its claims.

Figures and tables take arms of one model, one arm a condition. A ratio of norms above 1 alone is
never called compensation: it stands beside its null.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from allostasis.analysis import ablation_figures as draw
from allostasis.analysis import ablation_tables as tabulate
from allostasis.analysis import ablations, heatmap
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.heatmap import HeadMap
from allostasis.analysis.plots import plot_heatmap_layer_compensation
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

CONTEXT = (
    ("Wang et al., 2211.00593", "GPT-2 small", "9.9, 9.6, 10.0", "mean (ABC prompts)",
     "all IOI prompts", "total effect of clean LD", "-0.05"),
    ("Gong, 2607.01940", "GPT-2 small", "the same three", "not stated in our source",
     "all prompts", "total effect, logit (clean LD 2.53)", "-0.22"),
    ("Rushing & Nanda, 2402.15390", "GPT-2 small", "each head alone", "resample",
     "top 2 % of tokens by DE", "SR / drop", "0.479"),
    ("Rushing & Nanda, 2402.15390", "GPT-2 small", "each head alone", "resample",
     "top 2 % of tokens by DE", "of it norm scale, heads, MLPs", "0.354, 0.207, -0.082"),
)  # fmt: skip


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Figures of the audit, in the report's order."""
    return [
        Figure(
            "repair",
            "What is lost and what makes up for it",
            "All chosen heads ablated together. Self-repair = total effect + drop. Bars on the "
            "right are Shapley values, which do not depend on an order; diamonds are the residual "
            "method, in which the norm's scale comes last. Intervals: 95 % over clusters.",
            partial(draw.repair, arms),
        ),
        Figure(
            "percentiles",
            "Self-repair by size of the direct effect",
            "Ratio of sums over the prompts in which the ablated heads write most towards the "
            "answer; on the right all prompts. A number for self-repair means little without its "
            "selection. Intervals: 95 % over five clusters or more; those that leave the "
            "figure are cut off.",
            partial(draw.percentiles, arms),
        ),
        Figure(
            "compensation_ratio",
            "Norm of the residual stream at END",
            "White is 1. The ratio to clean (C) has to be read beside its null, the norm if "
            "nothing downstream reacted; the excess is the logarithm of their ratio. A ratio "
            "above 1 alone is no sign of compensation.",
            partial(plot_heatmap_layer_compensation, arms),
        ),
        Figure(
            "heads",
            "Heads",
            "Evaluation split. Direct effect: what a head writes towards the answer at the clean "
            "scale of the final norm. Zero ablation of each head alone: below 0 it helped. "
            "Outlined: the heads that were ablated together in any seed.",
            partial(_draw_heads, arms),
            partial(_page_of_heads, arms),
        ),
        Figure(
            "random_sets",
            "Chosen heads among random sets",
            "Each grey point is a random set of the same size in the same layers, of each seed; "
            "the lines are no change.",
            partial(draw.random_sets, arms),
        ),
        Figure(
            "identity",
            "log margin = log A + log G",
            "Prompts in which the answer leads the whole vocabulary with and without the ablation. "
            "The identity is exact; the split between amplitude and alignment is what an ablation "
            "decides. Intervals: 95 % over clusters.",
            partial(draw.identity, arms),
        ),
    ]


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Tables of the audit, in the report's order; one that lacks its records is left out."""
    makers: list[Callable[[Sequence[Arm]], Table]] = [
        model_table,
        tabulate.baseline_table,
        tabulate.discovery_table,
        tabulate.effects_table,
        tabulate.percentiles_table,
        tabulate.shares_table,
        tabulate.norms_table,
        tabulate.random_table,
        tabulate.identity_table,
        tabulate.agreement_table,
        cost_table,
    ]
    made = []
    for make in makers:
        try:
            made.append(make(arms))
        except UndefinedError as error:
            title = make.__name__.replace("_", " ").capitalize()
            made.append(Table(title, ("missing",), ((str(error),),)))
    return [*made, context_table()]


def context_table() -> Table:
    """What others found, with what they did; context, not claims."""
    return Table(
        "Context from the literature",
        ("source", "model", "heads", "ablation", "selection", "quantity", "value"),
        CONTEXT,
        "Published numbers, for orientation: models, ablations and selections differ from those of "
        "this study, so none is a test of any claim here.",
    )


def head_maps(arms: Sequence[Arm]) -> list[HeadMap]:
    """Direct effect of every head and, where it was swept, the effect of zeroing it alone.

    Raises:
        UndefinedError: Neither was recorded.
    """
    marked = sorted({
        tuple(map(int, head.split("."))) for _, head, _ in ablations.selected(arms)
    })  # fmt: skip
    found: list[tuple[str, dict[str, np.ndarray]]] = []
    for title, metric, value, is_ablated in (
        ("direct effect", "direct_effect", "value", False),
        ("zero ablation alone", "logit_diff", "delta", True),
    ):
        for arm in arms:
            try:
                cells = ablations.head_values(
                    arm.runs, metric, value, split="evaluation", is_ablated=is_ablated
                )
            except UndefinedError:
                continue
            found.append((title, dict(cells)))
            break
    if not found:
        raise UndefinedError("no number was recorded by head")
    shape = np.max([cells["value"].shape for _, cells in found], axis=0)
    marks = [(layer, head) for layer, head in marked]
    return [
        HeadMap(
            title, "logit", _to(shape, cells["value"]), _to(shape, cells["low"]),
            _to(shape, cells["high"]), marked=marks,
        )
        for title, cells in found
    ]  # fmt: skip


def _to(shape: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The same with rows and columns of NaN where heads are missing."""
    missing = [(0, int(whole - there)) for whole, there in zip(shape, values.shape, strict=True)]
    return np.pad(values, missing, constant_values=np.nan)


def _draw_heads(arms: Sequence[Arm]) -> Any:
    return heatmap.draw(head_maps(arms))


def _page_of_heads(arms: Sequence[Arm]) -> Any:
    return heatmap.page(head_maps(arms))


def model_table(arms: Sequence[Arm]) -> Table:
    """What was audited: weights, tokenizer, prompts."""
    run = next(run for arm in arms for run in arm.runs)
    if not run.model:
        raise UndefinedError("run.json says nothing of the model")
    data = run.run.get("data") or {}
    rows = [*_flat("", run.model), *_flat("tokenizer ", run.run.get("tokenizer") or {})]
    rows += _flat("data ", {key: value for key, value in data.items() if key != "dropped"})
    dropped = data.get("dropped") or {}
    rows += [(f"dropped {kind}", ", ".join(map(str, words)) or "none")
             for kind, words in dropped.items()]  # fmt: skip
    note = (
        "Of the first run; all runs of this part share the model. Quantised weights are a model of "
        "their own. Runs with and without a BOS token, or of other weights, are never compared."
    )
    return Table("Model and prompts", ("fact", "value"), tuple(rows), note)


def cost_table(arms: Sequence[Arm]) -> Table:
    """What each run cost, and whether its re-check on other arithmetic agreed."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            facts = [*_flat("", run.run.get("profile") or {})]
            facts += _flat("verify ", run.run.get("verify") or {})
            rows += [(arm.condition, str(run.seed), *fact) for fact in facts]
    if not rows:
        raise UndefinedError("run.json has neither profile nor verify")
    return Table(
        "Cost and verification",
        ("condition", "seed", "quantity", "value"),
        tuple(rows),
        "A token that goes through all layers counts 1; naive is one full pass for every "
        "intervention and prompt, without deduplication.",
    )


def _flat(prefix: str, facts: dict[str, Any] | Any) -> list[tuple[str, str]]:
    """Facts as rows, nested ones by dotted name."""
    rows: list[tuple[str, str]] = []
    for key, value in dict(facts).items():
        if isinstance(value, dict):
            rows += _flat(f"{prefix}{key}.", value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            rows.append((f"{prefix}{key}", str(value)))
        else:
            rows.append((f"{prefix}{key}", number(float(value))))
    return rows
