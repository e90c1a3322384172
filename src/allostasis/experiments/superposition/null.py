"""Negative controls: where no head is a suppressor, none may be found."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch

from allostasis.analysis.suppressors import null_selection_rate, relabelled_coverage
from allostasis.callbacks.progress import Ticker
from allostasis.core.seeding import derive
from allostasis.engines.subjects import Head, ToySubject, Value
from allostasis.experiments.superposition.collected import Collected
from allostasis.experiments.superposition.survey import Rule, Survey
from allostasis.models.toy_transformer import Block, Norm, ToyTransformer
from allostasis.tasks.sequences import Sequences
from allostasis.tasks.splits import Split, next_tokens, quotas

NULL_SEQUENCES = 256
"""Sequences of each data set of an untrained model, of all splits together."""
SIMULATED = 10
"""Simulated data sets for each of an untrained model."""


def iid_sequences(
    n_sequences: int, n_positions: int, vocab_size: int, generator: torch.Generator
) -> dict[Split, Sequences]:
    """Tokens that nothing predicts, in three splits; every position is scored."""
    counts = quotas(n_sequences)
    shape = (sum(counts.values()), n_positions + 1)
    tokens = torch.randint(vocab_size, shape, generator=generator)
    parts = tokens.split(list(counts.values()))
    return {split: next_tokens(part) for split, part in zip(counts, parts, strict=True)}


def check_nulls(
    trained: ToyTransformer,
    splits: Mapping[Split, Sequences],
    *,
    n_sets: int,
    values: Sequence[Value],
    seed: int,
    rule: Rule,
    found: Collected,
) -> dict[str, Any]:
    """All four negative controls; gives what run.json says of them.

    Args:
        trained: A trained model.
        splits: Sequences that it never trained on.
        n_sets: Data sets of untrained models.
        values: What stands in a head's place.
        seed: The run's seed.
        rule: What counts as a suppressor.
        found: The records.
    """
    heads = list(itertools.product(range(trained.n_layers), range(trained.n_heads)))
    facts: dict[str, Any] = {
        "untrained": _untrained(trained, heads, n_sets, values, seed, rule, found),
        "silent": _silent(trained, heads, splits, values, seed, rule),
        "random_signs": {},
    }
    survey = Survey(ToySubject(trained), splits, heads, seed=seed, rule=rule)
    for value in values:
        effects = survey.effects(value, "select")
        rate = null_selection_rate(effects, survey.rng, q=rule.q, min_effect=0.0)
        facts["random_signs"][value] = rate
        found.read(
            f"null.random_signs_{value}", rate, n=200, symbol="Psi", unit="1", split="select"
        )
    n_simulated = SIMULATED * n_sets
    coverage = relabelled_coverage(survey.rng, n_sets=n_simulated)
    facts["relabelled_coverage"] = coverage
    found.read("null.coverage", coverage, n=n_simulated, symbol="sigma2", unit="1", split="measure")
    return facts


def _untrained(
    like: ToyTransformer,
    heads: Sequence[Head],
    n_sets: int,
    values: Sequence[Value],
    seed: int,
    rule: Rule,
    found: Collected,
) -> dict[str, Any]:
    """Models as they begin, each on its own tokens without any pattern.

    A head of such a model has a small effect of its own: what it writes is noise, and without noise
    the prediction is nearer to the best one, which is none. Selecting it is then right, so that
    what is selected is looked at again on fresh sequences; only what has no effect there is false.
    """
    generator = torch.Generator().manual_seed(derive(seed, "control"))
    rows: list[dict[str, Any]] = []
    tick = Ticker(f"superposition null seed {seed}", noun="data sets")
    block, device = like.blocks[0], like.W_E.device
    assert isinstance(block, Block)
    for number in range(n_sets):
        drawn = int(torch.randint(2**31, (1,), generator=generator))
        model = ToyTransformer(
            seed=drawn, vocab_size=like.vocab_size, seq_len=like.seq_len, d_model=like.d_model,
            n_layers=like.n_layers, n_heads=like.n_heads, d_ff=block.mlp.W_in.shape[1],
            norm=cast(Norm, like.norm),
        ).to(device)  # fmt: skip
        fresh = iid_sequences(NULL_SEQUENCES, like.seq_len, like.vocab_size, generator)
        splits: dict[Split, Sequences] = {split: batch.to(device) for split, batch in fresh.items()}
        survey = Survey(ToySubject(model), splits, heads, seed=drawn, rule=rule)
        for value in values:
            seen = survey.detect(survey.effects(value, "select"))
            rows.append({
                "example": len(rows), "ablation": value, "intervention": f"{value}:untrained",
                "set": "null", "split": "select", "effect": float(seen.effect.max()),
                "q": float(seen.q.min()), "n_selected": seen.count,
                "effect_again": _again(survey, value, heads, seen.selected),
            })  # fmt: skip
        tick(number + 1, n_sets)
    found.add({name: [row[name] for row in rows] for name in rows[0]})
    told: dict[str, Any] = {"n_sets": n_sets}
    for value in values:
        some = [row for row in rows if row["ablation"] == value]
        again = [row["effect_again"] for row in some if row["effect_again"] is not None]
        told[value] = {
            "selected": len(again) / n_sets,
            "false": sum(effect <= 0 for effect in again) / n_sets,
            "mean_effect_again": float(np.mean(again)) if again else None,
        }
        for part in ("selected", "false"):
            found.read(
                f"null.untrained_{part}_{value}", told[value][part], n=n_sets, symbol="Psi",
                unit="1", split="select",
            )  # fmt: skip
    return told


def _again(
    survey: Survey, value: Value, heads: Sequence[Head], selected: np.ndarray
) -> float | None:
    """Mean effect of what was selected on sequences that had no part in it; None: nothing was."""
    chosen = [head for head, is_one in zip(heads, selected, strict=True) if is_one]
    return float(survey.effects(value, "measure", chosen).mean()) if chosen else None


def _silent(
    trained: ToyTransformer,
    heads: Sequence[Head],
    splits: Mapping[Split, Sequences],
    values: Sequence[Value],
    seed: int,
    rule: Rule,
) -> dict[str, Any]:
    """A head that writes nothing: its effect is 0 exactly, and it is never selected."""
    silent = copy.deepcopy(trained)
    layer, head = heads[len(heads) // 2]
    block = silent.blocks[layer]
    assert isinstance(block, Block)
    with torch.no_grad():
        block.attn.W_O[head] = 0.0
    survey = Survey(ToySubject(silent), splits, heads, seed=seed, rule=rule)
    told: dict[str, Any] = {"head": f"{layer}.{head}"}
    for value in values:
        effects = survey.effects(value, "select")
        at = heads.index((layer, head))
        told[value] = {
            "largest_effect": float(np.abs(effects[:, at]).max()),
            "selected": bool(survey.detect(effects).selected[at]),
        }
    return told
