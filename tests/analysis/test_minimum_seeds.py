"""No claim of any experiment can be decided by fewer units than it registered."""

from __future__ import annotations

import numpy as np
import pytest

from allostasis.analysis import registry
from allostasis.analysis.aggregate import Arm, Sample
from allostasis.analysis.claim_files import freeze
from allostasis.analysis.claims import Claim
from allostasis.analysis.families import family_sizes, seeds_needed
from allostasis.analysis.measures import measure
from allostasis.analysis.verdicts import Result, Verdict, decide

ARM = Arm("any", "any", "hash", "cpu", (), {})
ATOMS = [
    pytest.param(claim, family_sizes(claims)[claim.family], id=claim.id)
    for claims in registry.registered().values()
    for claim in claims
    if not claim.all_of
]


def aim(claim: Claim) -> float:
    """A value that meets a claim by far, on the scale of its estimate."""
    assert claim.estimand is not None
    match claim.direction, claim.bound:
        case "greater", float(bound):
            return 1.0 if claim.estimand.of in {"proportion", "unanimous"} else 50 + 2 * abs(bound)
        case "less", float(bound):
            return bound / 50 if bound > 0 else -50 + 2 * bound
        case "inside", (low, high):
            return (low * high) ** 0.5 if low > 0 else (low + high) / 2
        case _, (_, high):
            return 50 + 2 * abs(high)
    raise AssertionError(claim.id)


def samples(claim: Claim, n: int) -> tuple[Sample, Sample | None]:
    """Units that agree with each other and with the claim."""
    assert claim.estimand is not None
    assert claim.arms is not None
    of, target = claim.estimand.of, aim(claim)
    spread = 1e-6 * np.linspace(-1, 1, n) ** 3
    noise = 1 + spread
    values = target * noise + 1e-3 * spread
    below, others = None, 1e-7 * noise[::-1]
    if of in {"proportion", "unanimous"}:
        values = np.full(n, target)
    if of in {"kappa", "ratio_of_sums", "log_ratio_of_sums", "geometric_ratio"}:
        ratio = np.exp(target) if of == "log_ratio_of_sums" else target
        below = 1 + 1e-7 * noise[::-1] * np.arange(n)
        values = ratio * below * noise
    if of == "geometric_ratio":
        assert below is not None
        values, below = np.column_stack([values, values]), np.column_stack([below, below])
    if of == "log_ratio":
        others = 1 + 1e-7 * noise[::-1]
    if of == "log_hazard_ratio":
        values, others = np.arange(1.0, n + 1), np.arange(1.0, n + 1) + 100
    if of == "kappa" and claim.arms.control is not None:  # levels: of the control, minus a change
        values, below = -values, below
    units, no = tuple(range(n)), np.zeros(n, dtype=bool)
    zeros = None if below is None else np.zeros_like(below)
    control = None
    if claim.arms.control is not None:
        others = np.zeros(n) if of == "kappa" else others
        control = Sample(ARM, units, (), others, no, zeros)
    return Sample(ARM, units, (), values, no, below), control


def verdict(claim: Claim, n: int, family_size: int) -> str:
    """What a study with n such units says of a claim in a family where nothing else is so."""
    treatment, control = samples(claim, n)
    found = measure(claim, {"": treatment}, control)
    alone = claim.model_copy(update={"requires": (), "proved": None})
    others = [
        alone.model_copy(update={"id": f"{claim.id}.other{k}"}) for k in range(family_size - 1)
    ]
    measured = {other.id: Result(other, "", Verdict("undecided", "")) for other in others}
    measured[claim.id] = Result(
        alone, "", Verdict("undecided", ""), inference=found.inference,
        p_support=found.p_support, p_refute=found.p_refute,
    )  # fmt: skip
    hashes = dict.fromkeys(measured, "")
    return decide([alone, *others], measured, hashes)[0].verdict.word


@pytest.mark.parametrize(("claim", "family_size"), ATOMS)
def test_no_claim_is_decided_by_fewer_units_than_registered(claim: Claim, family_size: int) -> None:
    least = seeds_needed(claim, family_size)
    assert least >= claim.min_seeds
    tried = {2, 3, claim.min_seeds - 1, least - 1}
    for n in sorted(n for n in tried if 2 <= n < least):
        assert verdict(claim, n, family_size) == "undecided", n
    assert claim.estimand is not None
    if (claim.estimand.unit, claim.estimand.of) != ("cluster", "mean"):  # which draws 99,999 flips
        enough = max(least, 20 if claim.estimand.unit == "cluster" else 12)
        assert verdict(claim, enough, family_size) in {"supported", "equivalent"}


def test_shares_and_orders_ask_for_six_seeds_and_everything_for_five() -> None:
    for parameters in ATOMS:
        claim = parameters.values[0]
        assert isinstance(claim, Claim)
        assert claim.estimand is not None
        counted = claim.estimand.of in {"proportion", "unanimous", "median_time"}
        least = 10 if claim.estimand.unit == "cluster" else 6 if counted else 5
        assert claim.min_seeds >= least, claim.id


def test_hashes_do_not_hold_what_was_proved() -> None:
    claim = registry.named("A1.all")
    assert claim is not None
    assert claim.proved is not None
    bare = claim.model_copy(update={"proved": None})
    assert freeze([claim]) == freeze([bare])
