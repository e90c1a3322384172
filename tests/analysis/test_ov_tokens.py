"""Lists of tokens: overlaps against their definitions, clusters and words against planted ones."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from allostasis.analysis import ov_tokens as ov

RANKS = st.permutations(range(12)).map(lambda order: [str(item) for item in order[:8]])


@given(left=RANKS, right=RANKS)
def test_rank_biased_overlap_is_its_definition(left: list[str], right: list[str]) -> None:
    """Webber's sum, each prefix intersected anew."""
    p, k = 0.9, 8
    shared = [len(set(left[:d]) & set(right[:d])) for d in range(1, k + 1)]
    tail = sum(x / d * p**d for d, x in enumerate(shared, start=1))
    expected = shared[-1] / k * p**k + (1 - p) / p * tail
    assert ov.rank_biased_overlap(left, right, p=p) == pytest.approx(expected)
    assert ov.rank_biased_overlap(right, left, p=p) == pytest.approx(expected)
    assert ov.rank_biased_overlap(left, left) == pytest.approx(1)


def test_agreement_at_the_top_counts_more_than_at_the_bottom() -> None:
    base = list("abcdefgh")
    late, early = [*"abcdefg", "x"], ["x", *"bcdefgh"]
    assert ov.rank_biased_overlap(base, late) > ov.rank_biased_overlap(base, early)
    assert ov.jaccard(base, late) == ov.jaccard(base, early) == 7 / 9


def _tokens(lists: dict[tuple[int, int], list[str]], model: str = "m") -> pd.DataFrame:
    rows = [
        {"model": model, "layer": layer, "head": head, "rank": rank, "token": token,
         "token_id": sum(map(ord, token)), "logit": 1.0 - rank}
        for (layer, head), some in lists.items()
        for rank, token in enumerate(some)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_tokens_are_counted_over_heads_and_models() -> None:
    one = _tokens({(0, 0): [" the", "caf\u00e9"], (0, 1): ["the", "x"]})
    two = _tokens({(0, 0): ["cafe\u0301", " the "]}, model="other")
    found = ov.counts(pd.concat([one, two])).set_index("token")
    assert found.loc["the"].tolist() == [3, 3, 2]
    assert found.loc["caf\u00e9"].tolist() == [2, 2, 2]
    assert found.index[0] == "the"


def test_planted_clusters_are_found_with_their_medoids() -> None:
    """Three bundles of directions, of 5, 4 and 3 tokens; the first of each lies in its middle."""
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(20, 3)))[0].T
    sizes, vectors = (5, 4, 3), []
    for centre, size in zip(centres, sizes, strict=True):
        vectors += [centre * 7, *(centre + 0.1 * rng.normal(size=(size - 1, 20)))]
    rows = np.array(vectors)
    found = ov.cluster(rows)
    assert found.silhouette > 0.5
    names = [f"t{chr(97 + i)}" for i in range(12)]
    tokens = _tokens({(0, 0): names, (0, 1): names[:2]})
    ids = tokens.drop_duplicates("token")["token_id"].to_numpy()
    table = ov.cluster_table(tokens, ids, rows, found)
    assert table.groupby("cluster")["size"].first().tolist() == [5, 4, 3]
    assert table[table["is_medoid"]]["token"].tolist() == ["ta", "tf", "tj"]
    assert table.loc[table["token"] == "ta", "count"].item() == 2
    logits = tokens[tokens["token"].isin(names[:5])]["logit"].mean()
    assert table.loc[table["cluster"] == 0, "mean_logit"].iloc[0] == pytest.approx(logits)
    assert table["is_fragment"].all()  # no token has a space before it


def test_tokens_that_make_no_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens make no clusters at cosine distances 0.3"):
        ov.cluster(np.eye(3), grid=(0.3,))


def test_a_shared_head_stands_out_of_random_pairs_and_others_do_not() -> None:
    rng = np.random.default_rng(1)
    words = [f"w{i}" for i in range(400)]

    def draw() -> list[str]:
        return [str(word) for word in rng.choice(words, 30, replace=False)]

    left = {(layer, head): draw() for layer in range(5) for head in range(6)}
    right = {place: draw() for place in left}
    right[3, 3] = [*left[1, 2][:25], "a", "b", "c", "d", "e"]
    pairs = [((1, 2), (3, 3)), *zip(left, right, strict=True)]
    table = ov.compare(left, right, pairs, np.random.default_rng(0))
    assert table["rbo"][0] > 0.9
    assert table["rbo_p"][0] <= 0.01
    assert table["jaccard"][0] == 25 / 35
    # each p of a pair from the null is at most 0.05 in about 1 of 20
    assert (table["rbo_p"][1:] <= 0.05).mean() <= 0.15


def test_enrichment_is_fishers_test_against_all_other_heads() -> None:
    hedges, others = sorted(ov.LEXICONS["hedge"]), [f"w{i}" for i in range(100)]
    found = {
        (0, 0): [*hedges[:6], *others[:4]],
        **{(1, head): [*others[10 * head : 10 * head + 9], hedges[head]] for head in range(5)},
    }
    table = ov.enrichment(found)
    row = table[(table["lexicon"] == "hedge") & (table["layer"] == 0)].iloc[0]
    assert (row["n_words"], row["n_tokens"]) == (6, 10)
    # two-sided: all tables as unlikely as this one, of 60 tokens with 11 hedges, 10 of them here
    p = hypergeom(60, 11, 10).pmf(np.arange(11))
    assert row["p"] == pytest.approx(p[p <= p[6] * (1 + 1e-7)].sum())
    assert row["log_odds"] == pytest.approx(np.log(6.5 * 45.5 / (5.5 * 4.5)))
    assert row["q"] == pytest.approx(6 * row["p"])
    assert table[table["lexicon"] == "booster"]["p"].eq(1).all()


def test_the_lexicons_are_as_large_as_said_and_share_no_word() -> None:
    assert [len(words) for words in ov.LEXICONS.values()] == [36, 21]
    for one, other in itertools.combinations(ov.LEXICONS.values(), 2):
        assert not one & other


def test_two_runs_are_compared_by_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from allostasis.experiments.heads import compare

    for name, shift in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        table = _tokens({(0, h): [f"w{10 * (h + shift) + i}" for i in range(9)] for h in range(4)})
        table = table.assign(report="write", end="top")
        table.to_parquet(tmp_path / name / "ov_tokens.parquet")
    runs = [str(tmp_path / name) for name in "ab"]
    assert compare.main([*runs, "--to", str(tmp_path / "pairs.csv")]) == 0
    pairs = pd.read_csv(tmp_path / "pairs.csv", dtype={"left": str, "right": str})
    best = pairs.set_index("left")
    assert best.loc[["0.1", "0.2", "0.3"], "right"].tolist() == ["0.0", "0.1", "0.2"]
    assert best.loc["0.1", "rbo"] == pytest.approx(1)
    assert compare.main([*runs, "--heads", "0.0", "0.3"]) == 0
    assert compare.main([*runs, "--heads", "0.0", "7.7"]) == 2
    assert "head 7.7 is not in the run; it has 4" in capsys.readouterr().err
    assert compare.main([runs[0], str(tmp_path / "none")]) == 2
