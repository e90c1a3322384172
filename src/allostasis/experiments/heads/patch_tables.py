"""Tables of `heads_patch`: readings by direction, recovery, asymmetry, what a patch was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from allostasis.analysis import patching
from allostasis.analysis.patching import Direction, Recovered
from allostasis.engines.prompts import Prompt
from allostasis.experiments.heads import tables
from allostasis.experiments.heads.asked import Asked
from allostasis.experiments.heads.competence import Competence
from allostasis.experiments.heads.tables import Planned, Readings
from allostasis.tasks.probes.encoded import Example

SPLIT, COMPETENT = "test", "test_competent"
ARROWS: Mapping[Direction, str] = {"denoise": "clean->corrupt", "noise": "corrupt->clean"}


@dataclass(frozen=True)
class Pairs:
    """Pairs of prompts that are patched, with what the untouched model says of both.

    Attributes:
        asked: The pairs.
        clean: Logit difference after the clean prompt, one a pair.
        corrupt: After the corrupt one, with the same answers.
        seen: What the model can do, on the val split.
    """

    asked: Asked
    clean: np.ndarray
    corrupt: np.ndarray
    seen: Competence

    @property
    def apart(self) -> np.ndarray:
        """LD(clean) - LD(corrupt), one a pair."""
        return self.clean - self.corrupt

    @cached_property
    def competent(self) -> np.ndarray:
        """Indices of the pairs of a competent cell."""
        every = np.arange(len(self.asked))
        cells = self.seen.cells
        names = set(cells.loc[cells["is_competent"], "cell"])
        return np.array([i for i in every if self.asked.examples[i].cell in names], dtype=int)

    def clusters(self, at: np.ndarray) -> list[str]:
        """Groups of some pairs."""
        return [self.asked.clusters[index] for index in at]

    @cached_property
    def mirrored(self) -> float:
        """Share of the competent pairs that are there the other way round too, in [0, 1].

        Denoising a pair is noising its mirror image, so that over such pairs both are equal on
        average, whatever the model does.
        """
        every = [self.asked.examples[index] for index in self.competent]
        there = {_identity(each) for each in every}
        turned = [(b, a, foil, target) for a, b, target, foil in map(_identity, every)]
        return float(np.mean([each in there for each in turned])) if every else 0.0

    @cached_property
    def oriented(self) -> np.ndarray:
        """Indices of the competent pairs whose clean prompt is answered more clearly.

        LD(clean) + LD(corrupt) > 0: of a pair and its mirror image one, told by the untouched runs.
        """
        surer = self.clean + self.corrupt > 0
        return self.competent[surer[self.competent]]

    @cached_property
    def gate(self) -> str:
        """Why there is no recovery; empty where there is."""
        return patching.gate(self.apart[self.competent], self.clusters(self.competent))

    def facts(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """What run.json says of them."""
        return {
            "n": len(self.asked),
            "competent": len(self.competent),
            "mirrored": self.mirrored,
            "oriented": len(self.oriented),
            "unequal_lengths_excluded": data.get("dropped", {}).get("length_mismatch", 0),
            "gate": self.gate or "passed",
        }


def _identity(example: Example) -> tuple[Prompt, Prompt, int, int]:
    return example.clean_ids, example.corrupt_ids, example.target_id, example.foil_id


def directed(planned: Sequence[Planned], direction: Direction) -> list[Planned]:
    """The patches of one direction, by its name: `denoise:resid_post@12[last]`."""
    return [
        replace(
            each,
            intervention=f"{direction}:{each.unit.what}",
            ablation=direction,
            facts={**each.facts, "direction": ARROWS[direction]},
        )
        for each in planned
    ]


def collect(
    pairs: Pairs,
    found: Mapping[Direction, Readings],
    keep_examples: Any,
    text: Callable[[int], str],
) -> dict[str, pd.DataFrame]:
    """All tables of a run.

    Args:
        pairs: What is patched.
        found: Readings by direction.
        keep_examples: Interventions whose single examples are kept.
        text: How a token reads.
    """
    every = np.arange(len(pairs.asked))
    splits = {SPLIT: every, COMPETENT: pairs.competent}
    rows = [row for name in found for row in _metric_rows(name, found[name], splits)]
    rows += [*pairs.seen.metric_rows(), *_recovery_rows(pairs, found)]
    baseline = pairs.seen.baseline
    corrupt = dict(zip([each.example for each in pairs.asked.examples], pairs.corrupt, strict=True))
    made = {
        "metrics": pd.DataFrame(rows),
        "baseline": baseline.assign(ld_corrupt=baseline["example"].map(corrupt)),
        "interventions": pd.concat(
            [tables.interventions(readings, {}) for readings in found.values()], ignore_index=True
        ),
        "positions": _positions(pairs.asked, text),
    }
    examples = [_examples(pairs, name, found[name], keep_examples) for name in found]
    if kept := [frame for frame in examples if frame is not None]:
        made["examples"] = pd.concat(kept, ignore_index=True)
    return made


def _metric_rows(
    direction: Direction, found: Readings, splits: Mapping[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """Means of every readout; of the untouched corrupt run as `logit_diff.corrupt` and so on."""
    for row in tables.metric_rows(found, splits):
        if direction == "denoise" and "intervention" not in row:
            row["metric"] = f"{row['metric']}.corrupt"
        yield row


def _recovery_rows(pairs: Pairs, found: Mapping[Direction, Readings]) -> Iterator[dict[str, Any]]:
    """Recovery in each direction and their difference, over the pairs of competent cells.

    None where the model does not tell the two prompts of a pair apart. The difference is also taken
    over oriented pairs, and over those alone where all pairs are there the other way round too.
    """
    if pairs.gate:
        return
    at = pairs.competent
    moved: dict[Direction, np.ndarray] = {name: _moved(name, found[name]) for name in found}
    for name, values in moved.items():
        shares = patching.recovery(values[:, at], pairs.apart[at], pairs.clusters(at))
        yield from _share_rows("recovery", shares, found[name].interventions, pairs, at)
    if len(moved) < 2:
        return
    both = [
        replace(each, intervention=f"asymmetry:{each.unit.what}")
        for each in found["denoise"].interventions
    ]
    kinds = {
        "asymmetry": at[: 0 if pairs.mirrored == 1 else None],
        "asymmetry.oriented": pairs.oriented,
    }
    for metric, some in kinds.items():
        if len(set(pairs.clusters(some))) > 1:
            denoised, noised = moved["denoise"][:, some], moved["noise"][:, some]
            shares = patching.asymmetry(denoised, noised, pairs.apart[some], pairs.clusters(some))
            yield from _share_rows(metric, shares, both, pairs, some)


def _moved(direction: Direction, found: Readings) -> np.ndarray:
    """How far each patch moves each pair's logit difference, [intervention, pair]."""
    return patching.moved(direction, found.columns["ld"], found.clean["ld"])


def _share_rows(
    metric: str, shares: Recovered, planned: Sequence[Planned], pairs: Pairs, at: np.ndarray
) -> Iterator[dict[str, Any]]:
    base = {
        "metric": metric, "symbol": "Psi", "unit": "1", "split": COMPETENT, "n": len(at),
        "n_unique": len({pairs.asked.rows.prompts[index] for index in at}),
    }  # fmt: skip
    for index, each in enumerate(planned):
        yield {
            **base, **tables.place(each), "value": shares.value[index],
            "ci_low": shares.low[index], "ci_high": shares.high[index],
        }  # fmt: skip


def _examples(
    pairs: Pairs, direction: Direction, found: Readings, keep_examples: Any
) -> pd.DataFrame | None:
    """One row a pair and patch of a direction: `ld_clean` and `ld_corrupt` are of the two runs."""
    keep, _ = tables.kept(found, keep_examples, {})
    if not keep:
        return None
    table = tables.examples(found, keep, {})
    names = [name for name in table if str(name).endswith("_clean")]
    table = table.rename(columns={n: f"{str(n).removesuffix('_clean')}_untouched" for n in names})
    moved = _moved(direction, found)[keep].ravel()
    every = np.arange(len(pairs.asked))
    competent = np.tile(np.isin(every, pairs.competent) & (pairs.gate == ""), len(keep))
    oriented = np.tile(np.isin(every, pairs.oriented) & (pairs.gate == ""), len(keep))
    apart = np.tile(pairs.apart, len(keep))
    # averaged over both directions of a patch, twice the signed move is denoising less noising
    signed = moved * (2 if direction == "denoise" else -2)
    return table.assign(
        direction=ARROWS[direction],
        ld_clean=np.tile(pairs.clean, len(keep)),
        ld_corrupt=np.tile(pairs.corrupt, len(keep)),
        recovery=np.where(competent, moved, np.nan),
        recovery_of=np.where(competent, apart, np.nan),
        asymmetry=np.where(oriented, signed, np.nan),
        asymmetry_of=np.where(oriented, apart, np.nan),
    )


def _positions(asked: Asked, text: Callable[[int], str]) -> pd.DataFrame:
    """positions.parquet: tokens of all prompts by distance from the end, with how often each."""
    counts: dict[tuple[int, int], int] = {}
    for example in asked.examples:
        for prompt in (example.clean_ids, example.corrupt_ids):
            for back, token in enumerate(reversed(prompt), start=1):
                counts[-back, token] = counts.get((-back, token), 0) + 1
    rows = [
        {"position": at, "token_id": token, "token": text(token), "n": n}
        for (at, token), n in sorted(counts.items())
    ]
    return pd.DataFrame(rows)


def summary(pairs: Pairs, metrics: pd.DataFrame, planned: pd.DataFrame) -> dict[str, Any]:
    """The run in scalars: both baselines, and the patch that gives back most."""
    told: dict[str, Any] = {
        "logit_diff": float(pairs.clean.mean()),
        "logit_diff_corrupt": float(pairs.corrupt.mean()),
        "accuracy": float((pairs.clean > 0).mean()),
        "gate": pairs.gate or "passed",
    }
    real = set(planned.loc[planned["degenerate"].isna(), "intervention"])
    rows = metrics[(metrics["metric"] == "recovery") & metrics["intervention"].isin(real)]
    for direction in ("denoise", "noise"):
        own = rows[rows["intervention"].astype(str).str.startswith(f"{direction}:")]
        if len(own):
            best = own.iloc[int(own["value"].to_numpy(float).argmax())]
            told[f"largest_{direction}"] = best["intervention"]
            told[f"recovery_{direction}"] = float(best["value"])
    return told
