"""Families of claims: what one Holm correction counts, and the seeds that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from allostasis.analysis import statistics as st
from allostasis.analysis.claims import Claim


def members(claims: Sequence[Claim], family: str) -> dict[str, list[Claim]]:
    """What a family's correction counts: atoms in no compound, and compounds as one each.

    Returns:
        The atoms below each member, by the member's id.
    """
    by_id = {claim.id: claim for claim in claims}
    inside = {name for claim in claims for name in claim.all_of}

    def atoms(claim: Claim) -> list[Claim]:
        return [a for name in claim.all_of for a in atoms(by_id[name])] if claim.all_of else [claim]

    tops = [claim for claim in claims if claim.family == family and claim.id not in inside]
    return {claim.id: atoms(claim) for claim in tops}


def family_sizes(claims: Sequence[Claim]) -> dict[str, int]:
    """Number of members of each family."""
    return {family: len(members(claims, family)) for family in {c.family for c in claims}}


def adjusted(
    claims: Sequence[Claim],
    q: Mapping[str, float],
    combine: Callable[[Sequence[float]], float],
) -> dict[str, float]:
    """Holm's adjustment of every atom in its family.

    A conjunction needs no correction among its atoms, so each atom takes its compound's place
    beside the family's other members.

    Args:
        claims: All claims of an experiment.
        q: p-values of the atoms on alpha's scale; 1 where an atom has none.
        combine: How the atoms' values make their compound's: max for support, min for refutation.
    """
    levels: dict[str, float] = {}
    for family in {claim.family for claim in claims}:
        below = members(claims, family)
        together = {top: combine([q[a.id] for a in atoms]) for top, atoms in below.items()}
        whole = dict(zip(together, st.holm(list(together.values())), strict=True))
        for top, atoms in below.items():
            others = [value for other, value in together.items() if other != top]
            for atom in atoms:
                alone = q[atom.id] == together[top]  # then it is in its place already
                levels[atom.id] = whole[top] if alone else st.holm([q[atom.id], *others])[0]
    return levels


def units_of(claim: Claim) -> str:
    """What a claim's units are, in the plural."""
    return "seeds" if claim.estimand is None else f"{claim.estimand.unit}s"


def seeds_needed(claim: Claim, family_size: int) -> int:
    """Least units with which an atom's test can support it at its level in its family.

    A share needs bound ** n, a median and flipped signs 1/2 ** n, a permutation and the log-rank
    test 1 / C(2 n, n) small enough; t tests need only `min_seeds`.
    """
    assert claim.estimand is not None
    relabelled: dict[str, st.Design] = {
        "sign_flip": "sign_flip",
        "permutation": "unpaired",
        "log_rank": "unpaired",
    }
    if claim.test in relabelled:
        least = st.minimum_seeds(
            relabelled[claim.test], alpha=claim.alpha, family_size=family_size,
            sides=1 if claim.direction == "inside" else 2,
        )  # fmt: skip
        return max(claim.min_seeds, least)
    match claim.estimand.of, claim.bound:
        case (("proportion" | "unanimous"), float(bound)):
            share = bound if claim.direction == "greater" else 1 - bound
            least = st.minimum_seeds(
                "binomial", alpha=claim.alpha, sides=2, family_size=family_size, share=share
            )
        case "median_time", _:
            sides = 1 if claim.direction == "inside" else 2
            least = st.minimum_seeds(
                "binomial", alpha=claim.alpha, sides=sides, family_size=family_size
            )
        case _:
            least = 2
    return max(claim.min_seeds, least)


def seed_warnings(claims: Sequence[Claim], n_seeds: int) -> list[str]:
    """Claims that this many seeds cannot support, with the number needed: to say before a sweep.

    Example:
        >>> seed_warnings([], 3)
        []
    """
    sizes = family_sizes(claims)
    counted = [claim for claim in claims if not claim.all_of and units_of(claim) == "seeds"]
    needed = {claim.id: seeds_needed(claim, sizes[claim.family]) for claim in counted}
    return [
        f"{name} needs at least {least} seeds to be supported; there are {n_seeds}"
        for name, least in needed.items()
        if least > n_seeds
    ]
