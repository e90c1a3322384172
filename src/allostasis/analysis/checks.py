"""What could be wrong with a study's verdicts: controls, nulls, power, instrument gates."""

from __future__ import annotations

from collections.abc import Sequence

from allostasis.analysis.aggregate import Arm
from allostasis.analysis.curves import RunView
from allostasis.analysis.families import units_of
from allostasis.analysis.tables import Table
from allostasis.analysis.text import counted, number
from allostasis.analysis.verdicts import Result

NAMES = 12  # ids of claims listed in a warning before the rest are counted


def few_units(results: Sequence[Result]) -> list[str]:
    """Claims with fewer units than could support them: one line for each least number."""
    short: dict[tuple[int, str], list[str]] = {}
    for result in results:
        if result.seeds_needed is not None and _units(result) < result.seeds_needed:
            key = (result.seeds_needed, units_of(result.claim))
            short.setdefault(key, []).append(f"{result.claim.id} ({_units(result)})")
    return [
        f"Fewer than the {least} {units} that could support it, with how many there are: "
        f"{_listed(claims)}"
        for (least, units), claims in sorted(short.items())
    ]


def tables(results: Sequence[Result], arms: Sequence[Arm], runs: Sequence[RunView]) -> list[Table]:
    """Controls and nulls, power, and gates; a table without a row is left out.

    Args:
        results: One a claim.
        arms: All arms.
        runs: All runs, those included that no arm counts.
    """
    made = [_controls(results, arms), _power(results), _gates(runs)]
    return [table for table in made if table.rows]


def _units(result: Result) -> int:
    return 0 if result.inference is None else result.inference.n


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMES
    return ", ".join(names[:NAMES]) + (f" and {more} more" if more > 0 else "")


def _controls(results: Sequence[Result], arms: Sequence[Arm]) -> Table:
    seeds: dict[str, set[int]] = {}
    for arm in arms:
        seeds.setdefault(arm.condition, set()).update(arm.seeds)
    asked: dict[tuple[str, str], list[str]] = {}
    for result in results:
        claim = result.claim
        if claim.arms is not None and claim.arms.control is not None:
            asked.setdefault(("the arm compared with", claim.arms.control), []).append(claim.id)
        for confound, arm in claim.confounds.items():
            key = (confound.replace("_", " "), arm or "")
            asked.setdefault(key, []).append(claim.id)
    rows = []
    for (what, arm), claims in asked.items():
        told = counted(len(seeds.get(arm, ())), "finished seeds") if arm else ""
        rows.append((what, arm or "none: not excluded", told, _listed(claims)))
    return Table(
        "Controls and nulls",
        ("what else could give the result", "control arm", "run", "claims"),
        tuple(rows),
        "Named before the runs. One that no arm excludes stands beside the verdict above.",
    )


def _power(results: Sequence[Result]) -> Table:
    rows = []
    for result in results:
        if result.verdict.word != "undecided" or result.seeds_needed is None:
            continue
        planned = result.seeds_for_power
        rows.append((
            result.claim.id,
            counted(_units(result), units_of(result.claim)),
            str(result.seeds_needed),
            "no registered effect or spread to plan with" if planned is None else str(planned),
        ))
    return Table(
        "Power of what is undecided",
        ("claim", "there are", "least that could support it", "for power 0.8"),
        tuple(rows),
        "Power is of the claim's own test at the registered effect and the observed spread, never "
        "at the observed effect.",
    )


def _gates(runs: Sequence[RunView]) -> Table:
    found: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        for name, gate in (run.run.get("gates") or {}).items():
            found.setdefault(name, []).append(gate)
    rows = [
        (
            name,
            f"{sum(bool(gate['passed']) for gate in gates)} of {len(gates)} runs",
            number(max(float(gate["worst"]) for gate in gates)),
            number(float(gates[0]["tolerance"])),
        )
        for name, gates in found.items()
    ]
    return Table(
        "Instrument gates",
        ("gate", "passed", "worst", "allowed"),
        tuple(rows),
        "Identities that the instruments must satisfy, checked before each of these runs; a run "
        "that fails one is not counted.",
    )
