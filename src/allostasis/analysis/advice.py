"""What to say before a sweep starts: claims that its seeds cannot decide."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Set
from pathlib import Path

from allostasis.analysis import claim_files
from allostasis.analysis.families import family_sizes, seeds_needed, units_of


def before_sweep(*, exp: str, module: str, conditions: Set[str], n_seeds: int) -> str | None:
    """Which of an experiment's claims a sweep's seeds are too few for, and how many each needs.

    Args:
        exp: The experiment.
        module: Dotted path of its LightningModule, beside which claims.yaml lies.
        conditions: The sweep's arms; claims about other arms are not meant.
        n_seeds: Seeds of the sweep.

    Returns:
        One line, or None if the seeds are enough for every claim.
    """
    package = importlib.import_module(module.rpartition(".")[0].rpartition(".")[0])
    registered = claim_files.load(Path(package.__path__[0]), exp)
    sizes = family_sizes(registered)
    short: dict[int, list[str]] = defaultdict(list)
    for claim in registered:
        if claim.arms is None or not {*vars(claim.arms).values()} - {None} <= conditions:
            continue
        if units_of(claim) != "seeds":
            continue
        least = seeds_needed(claim, sizes[claim.family])
        if least > n_seeds:
            short[least].append(claim.id)
    if not short:
        return None
    needs = "; ".join(f"{least} for {', '.join(short[least])}" for least in sorted(short))
    count = f"{n_seeds} seed{'s' if n_seeds != 1 else ''}"
    return f"{count} cannot support every claim. Needed are {needs}"
