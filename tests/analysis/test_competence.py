"""Which cells a model can do: intervals against closed forms and simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from allostasis.analysis.competence import clustered_proportion, competence, recency


def table(right: list[int], groups: list[str], cell: str = "a") -> pd.DataFrame:
    ld = np.array(right) * 2.0 - 1 + np.linspace(0, 0.1, len(right))
    return pd.DataFrame({"ld": ld, "group": groups, "cell": cell})


@pytest.mark.parametrize(("count", "n"), [(0, 7), (3, 10), (9, 10), (12, 12)])
def test_one_row_a_group_gives_the_exact_binomial_interval(count: int, n: int) -> None:
    right = np.arange(n) < count
    found = clustered_proportion(right, [str(i) for i in range(n)])
    exact = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


def test_rows_of_a_group_that_are_all_alike_add_nothing() -> None:
    once = clustered_proportion(np.array([True, False, True, True]), list("abcd"))
    thrice = clustered_proportion(np.repeat([True, False, True, True], 3), [*"aaabbbcccddd"])
    assert (once.low, once.high) == pytest.approx((thrice.low, thrice.high))


def test_a_model_that_guesses_by_group_is_seldom_called_competent() -> None:
    rng = np.random.default_rng(0)
    groups = [str(i // 4) for i in range(40)]
    called = [
        clustered_proportion(np.repeat(rng.random(10) < 0.5, 4), groups).low > 0.5
        for _ in range(2_000)
    ]
    assert np.mean(called) <= 0.025 + 2 * np.sqrt(0.025 / 2_000)


def test_a_cell_is_competent_by_its_lower_limit_alone() -> None:
    names = [str(i) for i in range(10)]
    rows = pd.concat([
        table([1] * 10, names, "can"),
        table([1] * 7 + [0] * 3, names, "perhaps"),
        table([0] * 10, names, "cannot"),
        table([1, 1], ["0", "1"], "too few"),
    ])
    found = competence(rows).set_index("cell")
    assert found["state"].to_dict() == {
        "can": "competent", "perhaps": "undecided", "cannot": "not competent",
        "too few": "undecided",
    }  # fmt: skip
    assert found["is_competent"].tolist() == [state == "competent" for state in found["state"]]
    assert found["accuracy"].tolist() == [1.0, 0.0, 0.7, 1.0]
    assert found["n"].tolist() == [10, 10, 10, 2]
    assert (found["ld_low"] < found["ld"]).all()
    assert (found["ld"] < found["ld_high"]).all()


def test_one_group_has_no_interval_of_its_mean() -> None:
    found = competence(table([1, 1, 0], ["g", "g", "g"])).iloc[0]
    assert pd.isna(found["ld_low"])
    assert pd.isna(found["ld_high"])
    assert found["state"] == "undecided"


def test_recency_is_the_margin_of_what_was_read_last() -> None:
    rows = table([1, 0, 1, 0], list("abcd")).assign(recency=[1, -1, -1, 0])
    rows["ld"] = [2.0, -3.0, 1.0, 50.0]
    found = recency(rows)
    assert found["n"] == 3
    assert found["ld"] == pytest.approx((2.0 + 3.0 - 1.0) / 3)
    assert found["chosen"] == pytest.approx(2 / 3)


def test_a_corpus_that_mentions_no_answer_has_no_recency() -> None:
    rows = table([1, 0], ["a", "b"]).assign(recency=0)
    assert recency(rows) == {
        "n": 0, "chosen": None, "ld": None, "ld_low": None, "ld_high": None,
    }  # fmt: skip
