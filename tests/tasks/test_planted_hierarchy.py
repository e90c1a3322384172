"""Planted activations are sums of what they say they are; labels know only their own split."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close


def task(seed: int = 0, **changes: Any) -> Any:
    from allostasis.models.sae import planted_hierarchy
    from allostasis.tasks.planted_hierarchy import PlantedHierarchy

    made = PlantedHierarchy(seed=seed, truth=planted_hierarchy(seed=seed, **changes), n_rows=4096)
    made.prepare()
    return made


def test_a_planted_row_is_the_sum_of_its_features_and_a_function_of_the_update() -> None:
    first, again = task(), task()
    assert (first.m, first.c, first.d_model) == (16, 4, 64)
    batch = first.batch(3)
    assert torch.equal(batch.x, again.batch(3).x)
    assert not torch.equal(batch.x, first.batch(4).x)
    assert not torch.equal(batch.x, task(1).batch(3).x)
    for row, on in zip(batch.x[:50], batch.ids[:50].bool(), strict=True):
        active = first.vectors[on].double()
        solved = torch.linalg.lstsq(active.T, row.double()[:, None]).solution
        assert_close(active.T @ solved, row.double()[:, None], rtol=0, atol=1e-5)
        assert (solved > 0).all()
    assert first.scale * first.split("test").x.norm(dim=1).mean() == pytest.approx(8.0, rel=0.05)
    test, train = first.split("test"), first.split("train", 4096)
    assert not torch.equal(test.x, train.x)
    assert torch.equal(test.x[:100], first.split("test", 100).x)
    assert test.ids[:, :16].float().mean() == pytest.approx(0.08, abs=0.005)


def test_a_hierarchy_that_is_none_is_refused() -> None:
    from allostasis.tasks.planted_hierarchy import check_hierarchy

    with pytest.raises(RuntimeError, match="1 have a child without its parent and 0 two"):
        check_hierarchy(torch.tensor([[False, True, False]]), n_parents=1)
    with pytest.raises(RuntimeError, match="0 have a child without its parent and 1 two"):
        check_hierarchy(torch.tensor([[True, True, True]]), n_parents=1)
    with pytest.raises(RuntimeError, match="not the hierarchy"):
        task(is_hierarchical=False)


@pytest.mark.parametrize("degrees", [0.0, 15.0, 45.0])
def test_a_noisy_teacher_is_off_by_its_angle(degrees: float) -> None:
    made = task()
    parents, children = made.directions(degrees)
    found = torch.cat([parents, children.reshape(-1, 64)]).double()
    cosines = (found * made.vectors.double()).sum(dim=1)
    expected = torch.full((80,), np.cos(np.radians(degrees)), dtype=torch.float64)
    assert_close(cosines, expected, rtol=0, atol=1e-6)


def test_labels_are_of_the_splits_own_lemmas_and_know_nothing_of_the_others() -> None:
    from allostasis.tasks.concepts import Chosen, ConceptTable
    from allostasis.tasks.labels import concept_labels

    rows = [
        ("animal", 1, pd.NA, 10, "train"), ("animal", 1, pd.NA, 11, "test"),
        ("animal", 1, pd.NA, 12, "train"), ("dog", 2, 1, 10, "train"), ("cat", 3, 1, 11, "test"),
        ("dog", 2, 1, 12, "train"), ("cat", 3, 1, 12, "train"),
    ]  # fmt: skip
    columns = ["concept", "synset", "parent", "token_id", "split"]
    table = ConceptTable(pd.DataFrame(rows, columns=columns).astype({"parent": "Int64"}), {})
    chosen = [Chosen(1, (2, 3), (np.array([10]), np.array([11])))]
    tokens = torch.tensor([10, 11, 12, 99, -1])
    labels = concept_labels(tokens, "train", table, chosen)
    assert labels.names == ("animal", "dog", "cat")
    assert labels.parent == (-1, 0, 0)
    assert labels.members.int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0] * 3, [0] * 3]
    # 11 is animal and cat by a lemma of test; 12 is dog and cat at once
    assert labels.known.int().tolist() == [[1, 1, 1], [0, 1, 0], [1, 0, 0], [1] * 3, [1] * 3]
    assert concept_labels(tokens, "test", table, chosen).members.int().tolist()[1] == [1, 0, 1]
