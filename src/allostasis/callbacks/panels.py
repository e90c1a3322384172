"""The dashboard as data: what runs log under which name, and which of it is drawn together.

W&B's workspace and TensorBoard's layout are both made of `PANELS`; `MAPS` are the pictures that a
tracker gets when a run has ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Symbol = Literal["Psi", "G", "A", "sigma2"]

WORDS: Mapping[Symbol, str] = {
    "Psi": "separability (Psi)",
    "G": "geometry (G)",
    "A": "amplitude (A)",
    "sigma2": "variance (sigma^2)",
}
MAX_SETS = 100  # interventions of which a dashboard has a number each; a table shows more


@dataclass(frozen=True)
class Panel:
    """Some curves over steps, drawn together.

    Attributes:
        symbol: Which of the four quantities they are readings of.
        title: Plain name and unit.
        pattern: Regular expression of the whole names that it draws; without lookaround, since
            W&B reads it as RE2.
        is_log: Whether its values span decades.
    """

    symbol: Symbol
    title: str
    pattern: str
    is_log: bool = False

    def draws(self, names: Iterable[str]) -> list[str]:
        """Those of some names that this panel draws."""
        return [name for name in names if re.fullmatch(self.pattern, name)]


PANELS = (
    Panel("Psi", "accuracy", "(train|test)/accuracy"),
    Panel("Psi", "accuracy over the ceiling", "(train|test)/accuracy\\.over_ceiling"),
    Panel("Psi", "cross-entropy, nat", "(train|test)/cross_entropy", is_log=True),
    Panel("Psi", "log margin, nat", "(train|test)/log_margin"),
    Panel("G", "alignment (margin = A G)", "(train|test)/alignment"),
    Panel("G", "routing drift, bit, by head", "probe/routing_drift/L\\d+/H\\d+"),
    Panel(
        "G", "routing drift from the first step, bit, by head",
        "probe/routing_drift\\.from_init/L\\d+/H\\d+",
    ),
    Panel("G", "attention entropy, by head", "probe/attention_entropy/L\\d+/H\\d+"),
    Panel("A", "logit scale, logit", "(train|test)/logit_scale", is_log=True),
    Panel("A", "residual RMS, by layer", "probe/amplitude_activation/L\\d+"),
    Panel("A", "readout gain, logit", "amplitude_learned"),
    Panel("A", "OV norm, by head", "amplitude_param/L\\d+/H\\d+"),
    Panel("sigma2", "residual variance, by layer", "(probe|classes)/residual_variance/L\\d+"),
    Panel(
        "sigma2", "variance between classes, by layer",
        "(probe|classes)/residual_variance\\.between/L\\d+",
    ),
    Panel(
        "sigma2", "variance within classes, by layer",
        "(probe|classes)/residual_variance\\.within/L\\d+",
    ),
)  # fmt: skip

MAPS = (
    "amplitude_param",
    "qk_norm",
    "probe/attention_entropy",
    "probe/routing_drift.from_init",
    "evaluation/direct_effect",
    "test/logit_diff",
    "test/prob_drop",
)
"""What is drawn by layer and head: a trained model's last reading, or what an ablation changes."""


def layout() -> dict[str, dict[str, list[Any]]]:
    """The panels as TensorBoard's custom scalars has them: by quantity, title and pattern."""
    tabs: dict[str, dict[str, list[Any]]] = {word: {} for word in WORDS.values()}
    for panel in PANELS:
        tabs[WORDS[panel.symbol]][panel.title] = ["Multiline", [f"^{panel.pattern}$"]]
    return tabs


def name(row: Mapping[str, Any]) -> str:
    """What a tracker calls a row of metrics.parquet: `test/accuracy`, `amplitude_param/L0/H1`."""
    places = [f"{k}{row[c]}" for k, c in (("L", "layer"), ("H", "head")) if row[c] is not None]
    return "/".join([*([row["split"]] if row["split"] else []), row["metric"], *places])


def flat(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Rows of one step under their names; no spectra, whose rows are by position."""
    return {name(row): row["value"] for row in rows if row["position"] is None}


def flat_units(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Rows of an experiment that intervenes, those of the whole model.

    A reading with an interval is `<name>_mean`, `<name>_ci_lower` and `<name>_ci_upper`; one of an
    intervention has its name behind it (`evaluation/logit_diff/zero_9.6_9.9`), unless there are
    more than `MAX_SETS`. Single heads are left to `MAPS` and the table.
    """
    rows = [row for row in rows if row["layer"] is None and row["position"] is None]
    sets = {row["intervention"] for row in rows if row["intervention"]}
    found: dict[str, float] = {}
    for row in rows:
        if row["intervention"] and len(sets) > MAX_SETS:
            continue
        what = name(row)
        if row["intervention"]:  # MLflow takes no other signs
            what += "/" + re.sub(r"[^\w.\- ]", "_", row["intervention"])
        if row["ci_low"] is None or row["ci_high"] is None:
            found[what] = row["value"]
        else:
            found |= {
                f"{what}_mean": row["value"],
                f"{what}_ci_lower": row["ci_low"],
                f"{what}_ci_upper": row["ci_high"],
            }
    return found
