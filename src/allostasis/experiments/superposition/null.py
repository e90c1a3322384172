"""Negative controls: where no head is a suppressor, none may be found."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float

from allostasis.analysis.suppressors import null_selection_rate, relabelled_coverage
from allostasis.core.progress import Ticker
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
DRAWS = 200
"""Data sets of random signs of a trained model."""
RATE = 0.05
"""Share of data sets without a suppressor in which one may be found; for an interval, may miss."""


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
    """All negative controls; gives what run.json says of them.

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
        rate = null_selection_rate(effects, survey.rng, draws=DRAWS, q=rule.q, min_effect=0.0)
        facts["random_signs"][value] = rate
        found.read(
            f"null.random_signs_{value}", rate, n=DRAWS, symbol="Psi", unit="1", split="select"
        )
    n_simulated = SIMULATED * n_sets
    coverage = relabelled_coverage(survey.rng, n_sets=n_simulated)
    facts["relabelled_coverage"] = coverage
    found.read("null.coverage", coverage, n=n_simulated, symbol="sigma2", unit="1", split="measure")
    return facts


def checks(facts: Mapping[str, Any], values: Sequence[Value]) -> dict[str, bool]:
    """Whether what was found where there is nothing stays within what chance allows.

    A detector that errs in exactly 1 data set of 20 finds nothing in at least 95 of 100 only 62
    times in 100, so that a share counts as too high where it is over 0.05 by more than two standard
    errors of a binomial count. `nothing_where_there_is_nothing` has ten data sets for each
    untrained model, 1,000 for 100: up to 6.4 % pass, which a detector that errs in 9 % does less
    than 3 times in 1,000, and one that errs in 5 % in 97 of 100.

    In untrained models as they are, false finds are counted on fresh sequences: a find without any
    effect falls there on either side of 0 alike, so that those below are half of the false ones.

    Args:
        facts: What `check_nulls` gave.
        values: What stood in a head's place.
    """
    untrained, silent = facts["untrained"], facts["silent"]
    n_sets = untrained["n_sets"]
    return {
        "nothing_where_there_is_nothing": all(
            untrained[value]["exchanged"] <= _most(RATE, SIMULATED * n_sets) for value in values
        ),
        "nothing_false_in_untrained_models": all(
            untrained[value]["false"] <= 2 * _most(RATE / 2, n_sets) for value in values
        ),
        "a_silent_head_has_no_effect": all(
            silent[value]["largest_effect"] == 0 and not silent[value]["selected"]
            for value in values
        ),
        "random_signs_find_none": all(
            rate <= _most(RATE, DRAWS) for rate in facts["random_signs"].values()
        ),
        "intervals_cover_1": 0.93 <= facts["relabelled_coverage"] <= 0.97,
    }


def _most(rate: float, n: int) -> float:
    """A share of n that is a rate and two standard errors."""
    return rate + 2 * float(np.sqrt(rate * (1 - rate) / n))


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
    each head that is selected is looked at again on fresh sequences: `false` is twice the share of
    them that has no effect there, mean over data sets, 0 for one in which nothing is selected.
    Where it is drawn by lot, sequence by sequence, which of the two losses is called clean, no head
    has an effect at all: `exchanged` is the share of such data sets in which anything is selected.
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
            effects = survey.effects(value, "select")
            seen = survey.detect(effects)
            again = _again(survey, value, heads, seen.selected)
            rows.append({
                "example": len(rows), "ablation": value, "intervention": f"{value}:untrained",
                "set": "null", "split": "select", "effect": float(seen.effect.max()),
                "q": float(seen.q.min()), "n_selected": seen.count,
                "effect_again": float(again.mean()) if len(again) else None,
                "n_without_effect_again": int((again <= 0).sum()),
                "exchanged": null_selection_rate(
                    effects, survey.rng, draws=SIMULATED, q=rule.q, min_effect=rule.min_effect
                ),
            })  # fmt: skip
        tick(number + 1, n_sets)
    found.add({name: [row[name] for row in rows] for name in rows[0]})
    told: dict[str, Any] = {"n_sets": n_sets}
    for value in values:
        some = [row for row in rows if row["ablation"] == value]
        again = [row["effect_again"] for row in some if row["effect_again"] is not None]
        told[value] = {
            "selected": len(again) / n_sets,
            "false": 2 * float(np.mean([
                row["n_without_effect_again"] / max(row["n_selected"], 1) for row in some
            ])),
            "exchanged": float(np.mean([row["exchanged"] for row in some])),
            "mean_effect_again": float(np.mean(again)) if again else None,
        }  # fmt: skip
        for part, n in (("selected", n_sets), ("false", n_sets), ("exchanged", SIMULATED * n_sets)):
            found.read(
                f"null.untrained_{part}_{value}", told[value][part], n=n, symbol="Psi",
                unit="1", split="select",
            )  # fmt: skip
    return told


def _again(
    survey: Survey, value: Value, heads: Sequence[Head], selected: np.ndarray
) -> Float[np.ndarray, " head"]:
    """Effect of each head that was selected on sequences that had no part in it."""
    chosen = [head for head, is_one in zip(heads, selected, strict=True) if is_one]
    return survey.effects(value, "measure", chosen).mean(axis=0) if chosen else np.empty(0)


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
