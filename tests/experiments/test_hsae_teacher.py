"""Geometry of a small ontology with planted rows: what noise gives, and what a hierarchy does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

WIDTH, N_ROOTS, N_CHILDREN, N_LEMMAS = 64, 12, 3, 24


@pytest.fixture(scope="module")
def table() -> Any:
    """Twelve topmost concepts of three children each; a lemma is a token, of one child."""
    from allostasis.tasks.concepts import ConceptTable

    rows, sides = [], ["train"] * 7 + ["val", "test", "test"]
    for token in range(N_ROOTS * N_CHILDREN * N_LEMMAS):
        child = token // N_LEMMAS
        root = 1000 + child // N_CHILDREN
        about = (f"w{token}", f"w{token}", token, sides[token % 10])
        rows += [(f"p{root}", root, None, *about), (f"c{child}", child + 1, root, *about)]
    columns = ["concept", "synset", "parent", "lemma", "form", "token_id", "split"]
    return ConceptTable(pd.DataFrame(rows, columns=columns).astype({"parent": "Int64"}), {})


def rows_of(table: Any, *, parent: float, child: float) -> torch.Tensor:
    """Normal rows, to which each concept adds a direction of its own of some length."""
    generator = torch.Generator().manual_seed(0)
    n = N_ROOTS * N_CHILDREN * N_LEMMAS
    rows = torch.randn(n + 2000, WIDTH, dtype=torch.float64, generator=generator)
    axes = torch.eye(WIDTH, dtype=torch.float64)
    for synset, above in table.parents.items():
        ids = torch.from_numpy(table.ids(synset))
        own = axes[synset - 1000] if above is None else axes[N_ROOTS + synset]
        rows[ids] += (parent if above is None else child) * own
    return rows


def collected(table: Any, rows: torch.Tensor) -> Any:
    from allostasis.experiments.hsae import teacher_tables
    from allostasis.experiments.hsae.clouds import Cloud, Placed
    from allostasis.experiments.hsae.geometry import Geometry, Precision
    from allostasis.models.concept_directions import derangement

    precision = Precision(n_boot=200, n_perm=100, n_partitions=4)
    placed = Placed.of(
        table,
        Cloud(lambda ids: rows[torch.from_numpy(ids)], np.arange(len(rows) - 2000, len(rows))),
    )
    roots = {synset: table.root(synset) for synset in table.names}
    parents = {int(one) for one in table.edges["parent"]}
    pairs = derangement(
        [int(one) for one in table.edges["child"]], sorted(parents), roots, np.random.default_rng(1)
    )
    own, other = (
        Geometry(placed, estimator="lda", precision=precision, rng=np.random.default_rng(2),
                 parent_of=parent_of)
        for parent_of in (None, pairs)
    )  # fmt: skip
    measured = {
        "own": teacher_tables.measure(own, deranged=None, share=0.7),
        "random_parent": teacher_tables.measure_pairs(other),
    }
    return teacher_tables.Collected(table, measured, precision, np.random.default_rng(3))


@pytest.fixture(scope="module")
def noise(table: Any) -> Any:
    return collected(table, rows_of(table, parent=0.0, child=0.0))


@pytest.fixture(scope="module")
def hierarchy(table: Any) -> Any:
    return collected(table, rows_of(table, parent=6.0, child=4.0))


def of_edges(found: Any) -> pd.DataFrame:
    rows = found.examples()
    return rows[rows["intervention"] == "edge"]


def reading(found: Any, metric: str, control: str | None = None) -> float:
    (value,) = [
        row["value"]
        for row in found.readings
        if (row["metric"], row["intervention"]) == (metric, control)
    ]
    return float(value)


def test_noise_supports_no_claim_on_angles(noise: Any) -> None:  # T-06
    edges = of_edges(noise)
    assert edges["defined"].mean() <= 0.1
    assert edges["cross_squared"].isna().all()  # nothing that H.angle.c could be estimated from
    assert "held-out members are not told from other tokens" in noise.summary()["gate"]
    assert reading(noise, "existence.projection") < 0.2


def test_a_planted_hierarchy_has_members_and_parents(hierarchy: Any) -> None:  # T-06
    edges = of_edges(hierarchy)
    assert edges["defined"].mean() == 1
    assert np.sqrt(max(0.0, edges["cross_squared"].mean())) < 0.1
    assert reading(hierarchy, "existence.projection") > 0.8
    assert reading(hierarchy, "cosine.mean", "random_parent") < -0.3


def test_the_largest_cosine_of_a_parent_with_its_childrens_differences_needs_a_parent(
    noise: Any, hierarchy: Any
) -> None:
    assert hierarchy.tables()["families"]["slant"].notna().all()
    assert reading(hierarchy, "family.slant") < 0.2  # orthogonal ones were planted
    assert noise.tables()["families"]["slant"].isna().mean() > 0.9


def test_the_published_angle_passes_for_noise_and_is_read_of_every_cloud(
    noise: Any, hierarchy: Any
) -> None:
    for found in (noise, hierarchy):
        assert reading(found, "published_angle.above_80") == 1
        assert reading(found, "published_angle.median") >= 90
        assert (of_edges(found)["published_angle"] >= 90).all()


def test_the_claim_on_the_published_angle_counts_as_nothing() -> None:
    from pathlib import Path

    from allostasis.analysis import claim_files, claims
    from allostasis.experiments import hsae

    there = {claim.id: claim for claim in claim_files.load(Path(hsae.__path__[0]), "hsae_teacher")}
    found = claims.by_construction(there["H.angle.unit"])
    assert found is not None
    assert found[0] == "supported (vacuous)"
    assert claims.by_construction(there["H.angle"]) is None
