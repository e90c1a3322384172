"""Maps and tables of activation patching, from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from allostasis.analysis.aggregate import Arm
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.heatmap import HeadMap
from allostasis.analysis.lab_tables import runs
from allostasis.analysis.ov_figures import visible
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

SHOWN = 8
HINTED = 4  # tokens that are named at a position


@dataclass(frozen=True)
class Quantity:
    """What a map shows.

    Attributes:
        metric: Name in the records.
        value: Column that holds the number.
        split: Which prompts.
        unit: What stands beside its scale.
    """

    metric: str
    value: str
    split: str
    unit: str


RECOVERY = Quantity("recovery", "value", "test_competent", "recovery")
ASYMMETRY = Quantity("asymmetry.oriented", "value", "test_competent", "recovery")
SHIFT = Quantity("logit_diff", "delta", "test", "logit")


def rows_of(run: RunView, quantity: Quantity, granularity: str, verb: str) -> pd.DataFrame:
    """Readings of single members of a granularity, as layer, column, value, low, high.

    Args:
        run: The run.
        quantity: Which reading.
        granularity: What was patched.
        verb: `denoise`, `noise` or `asymmetry`.
    """
    planned = interventions(run)
    own = planned[(planned["granularity"] == granularity) & (planned["size"] == 1)]
    wanted = {f"{verb}:{key.partition(':')[2]}" for key in own["intervention"]}
    rows = run.interventions(quantity.metric, split=quantity.split)
    rows = rows[rows["intervention"].isin(wanted)]
    return rows.assign(found=rows[quantity.value].astype(float))


def interventions(run: RunView) -> pd.DataFrame:
    """interventions.parquet of a run.

    Raises:
        UndefinedError: It has none.
    """
    path = run.record.folder / "interventions.parquet"
    if not path.is_file():
        raise UndefinedError("interventions.parquet was not recorded")
    return pd.read_parquet(path)


def heads(arms: Sequence[Arm], quantity: Quantity, verb: str) -> list[HeadMap]:
    """Layer by head, one map a corpus.

    Raises:
        UndefinedError: No corpus has such readings.
    """
    found = _by_corpus(arms, quantity, "head_out", verb)
    width = max(int(rows["head"].max()) + 1 for rows in found.values() if len(rows))
    return [
        HeadMap(condition, quantity.unit, *_grid(rows, rows["head"], _height(found), width))
        for condition, rows in found.items()
    ]


def layers(arms: Sequence[Arm], quantity: Quantity, granularity: str, verb: str) -> list[HeadMap]:
    """Layer by position, one map a corpus: positions count back from the end, which is -1.

    Raises:
        UndefinedError: No corpus has such readings.
    """
    found = _by_corpus(arms, quantity, granularity, verb)
    maps = []
    for condition, rows in found.items():
        back = rows["position"].dropna()
        reach = int(-back.min()) if len(back) else 0
        columns = [str(at) for at in range(-reach, 0)] or ["as planned"]
        at = rows["position"] + reach if reach else pd.Series(0, index=rows.index)
        run = next(run for name, run in runs(arms) if name == condition)
        maps.append(
            HeadMap(
                condition, quantity.unit, *_grid(rows, at, _height(found), len(columns)),
                across="position", columns=columns, hints=_hints(run, columns),
            )
        )  # fmt: skip
    return maps


def _by_corpus(
    arms: Sequence[Arm], quantity: Quantity, granularity: str, verb: str
) -> dict[str, pd.DataFrame]:
    found: dict[str, list[pd.DataFrame]] = {}
    for condition, run in runs(arms):
        rows = rows_of(run, quantity, granularity, verb)
        if len(rows):
            found.setdefault(condition, []).append(rows)
    if not found:
        raise UndefinedError(f"{quantity.metric} of {granularity}, {verb}, was not recorded")
    return {condition: pd.concat(some) for condition, some in found.items()}


def _height(found: Mapping[str, pd.DataFrame]) -> int:
    return max(int(rows["layer"].max()) + 1 for rows in found.values())


def _grid(
    rows: pd.DataFrame, columns: pd.Series, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over seeds; the interval is the record's where there is one seed, else none."""
    value, low, high = np.full((3, height, width), np.nan)
    rows = rows.assign(column=columns.astype(int))
    for _, own in rows.groupby(["layer", "column"]):
        at = int(own["layer"].iloc[0]), int(own["column"].iloc[0])
        value[at] = own["found"].mean()
        if len(own) == 1:
            low[at], high[at] = own["ci_low"].iloc[0], own["ci_high"].iloc[0]
    return value, low, high


def _hints(run: RunView, columns: Sequence[str]) -> list[str]:
    """The most frequent tokens at each position."""
    path = run.record.folder / "positions.parquet"
    if not path.is_file():
        return []
    seen = pd.read_parquet(path).sort_values(["n", "token_id"], ascending=[False, True])
    hints = []
    for name in columns:
        here = seen[seen["position"].astype(str) == name].head(HINTED)
        hints.append(f"({' '.join(visible(token) for token in here['token'])})")
    return hints


def pairs_table(arms: Sequence[Arm]) -> Table:
    """How many pairs there are, and how far apart their runs are."""
    rows = []
    for condition, run in runs(arms):
        said, ld = run.run.get("pairs") or {}, run.summary
        rows.append((
            condition, str(run.seed), str(said.get("n")),
            str(said.get("unequal_lengths_excluded")), str(said.get("competent")),
            number(float(said.get("mirrored", np.nan))), str(said.get("oriented")),
            _number(ld.get("logit_diff")), _number(ld.get("logit_diff_corrupt")),
            str(said.get("gate")),
        ))  # fmt: skip
    return Table(
        "Pairs of prompts",
        ("corpus", "seed", "pairs", "unequal, left out", "of competent cells", "mirrored",
         "oriented", "LD clean", "LD corrupt", "gate"),
        tuple(rows),
        "Recovery is told for pairs of competent cells, and only where LD(clean) - LD(corrupt) has "
        "a lower limit above 0. Denoising a pair is noising its mirror image: where all pairs are "
        "mirrored (1) both directions recover the same on average, whatever the model does, so "
        "that asymmetry is told of oriented pairs, whose clean prompt is answered more clearly.",
    )  # fmt: skip


def top_table(arms: Sequence[Arm]) -> Table:
    """The patches that cover most of the distance between the runs."""
    rows = []
    for condition, run in runs(arms):
        planned = interventions(run)
        real = planned[planned["degenerate"].isna()]["intervention"]
        found = run.interventions("recovery", split="test_competent")
        found = found[found["intervention"].isin(set(real))]
        best = found.sort_values("value", ascending=False, kind="stable").head(SHOWN)
        rows += [
            (condition, str(run.seed), row["intervention"], _share(row))
            for row in best.to_dict("records")
        ]
    if not rows:
        raise UndefinedError("no run has a recovery: the model does not tell pairs apart")
    return Table(
        "Largest recoveries",
        ("corpus", "seed", "patch", "recovery"),
        tuple(rows),
        "Ratio of sums over pairs, Fieller's 95 % interval over groups. denoise: clean values into "
        "the corrupt run; noise: corrupt values into the clean run. Patches that are the other run "
        "by construction (full_overwrite) are left out; a window of layer_resid would be the patch "
        "of its last layer.",
    )


def windows_table(arms: Sequence[Arm]) -> Table:
    """Layers that were patched together, in both directions."""
    rows = []
    for condition, run in runs(arms):
        planned = interventions(run)
        joint = planned[planned["set"].isin(["early", "middle", "late", "window"])]
        if not len(joint):
            continue
        whats = dict.fromkeys(key.partition(":")[2] for key in joint["intervention"])
        shares = pd.concat([
            run.interventions(metric, split="test_competent")
            for metric in ("recovery", "asymmetry.oriented")
        ]).set_index("intervention")
        for what in whats:
            kls = [
                _mean(run, metric, f"denoise:{what}")
                for metric in ("kl_divergence", "kl_divergence.source")
            ]
            cells = [
                _share(shares.loc[key].to_dict()) if (key := f"{verb}:{what}") in shares.index
                else "not told"
                for verb in ("denoise", "noise", "asymmetry")
            ]  # fmt: skip
            rows.append((condition, str(run.seed), what, *cells, *kls))
    if not rows:
        raise UndefinedError("no layers were patched together")
    return Table(
        "Windows of layers",
        ("corpus", "seed", "window", "denoising", "noising", "asymmetry, oriented pairs",
         "KL from the patched run, nat", "KL from the source, nat"),
        tuple(rows),
        "attn_out: all heads of the layers. Asymmetry is denoising less noising, paired. KL of "
        "denoising over all pairs: first how much the patch does, then how far the output still is "
        "from the clean run's.",
    )  # fmt: skip


def _mean(run: RunView, metric: str, key: str) -> str:
    rows = run.interventions(metric, split="test")
    own = rows[rows["intervention"] == key]
    return number(float(own["value"].iloc[0])) if len(own) else "not recorded"


def _share(row: Mapping[Any, Any]) -> str:
    value = number(float(row["value"]))
    if pd.isna(row["ci_low"]) or pd.isna(row["ci_high"]):
        return f"{value} [no interval]"
    return f"{value} [{number(float(row['ci_low']))}, {number(float(row['ci_high']))}]"


def _number(value: object) -> str:
    return number(float(value)) if isinstance(value, int | float) else "not recorded"
