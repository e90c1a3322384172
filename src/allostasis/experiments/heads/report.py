"""What the reports of the head lab show beside the claims; each experiment has its own module."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from allostasis.analysis import cross_condition, lab_tables
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.tables import Table
from allostasis.core.records import RunRecord

CROSSED = ("heads_zero", "heads_patch")
"""Experiments that measure the same units on every corpus."""


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Figures of an experiment, in the report's order."""
    return _of(arms[0].exp).figures(arms)


def tables(arms: Sequence[Arm]) -> list[Table]:
    """What the model can do, the experiment's own tables, and what all this cost."""
    own = _of(arms[0].exp).tables(arms)
    shared = lab_tables.made([lab_tables.competence_table, lab_tables.recency_table], arms)
    return [*shared, *own, *lab_tables.made([lab_tables.cost_table], arms)]


def artefacts(records: Sequence[RunRecord], folder: Path, allow_mixed: bool) -> list[Path]:  # noqa: FBT001
    """Matrices over conditions, rebuilt from the single runs."""
    own = [record for record in records if record.run["exp"] in CROSSED]
    try:
        found = cross_condition.crossed(own, allow_mixed=allow_mixed)
    except UndefinedError:  # nothing is finished, which the report says
        return []
    return cross_condition.write(found, folder)


def _of(exp: str) -> ModuleType:
    name = exp.removeprefix("heads_")
    return importlib.import_module(f"allostasis.experiments.heads.report_{name}")
