"""What the reports of the hierarchy show beside the claims; each experiment has its own module."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure
from allostasis.analysis.tables import Table


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Figures of an experiment, in the report's order."""
    return _of(arms[0].exp).figures(arms)


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Tables of an experiment, in the report's order."""
    return _of(arms[0].exp).tables(arms)


def cells(arms: Sequence[Arm]) -> list[Figure]:
    """Figures over arms of one condition that differ in their settings, where there are some."""
    draw = getattr(_of(arms[0].exp), "cells", None)
    return [] if draw is None else draw(arms)


def _of(exp: str) -> ModuleType:
    """`analysis/<name>_figures.py` of the experiment `hsae_<name>`."""
    return importlib.import_module(f"allostasis.analysis.{exp.removeprefix('hsae_')}_figures")
