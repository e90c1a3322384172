"""Lists of tokens that heads write: counted, clustered, compared between models, read for words.

A list is one end of one head's report: its tokens in order, the furthest out first. Tokens of
different vocabularies are aligned by their text, stripped and NFC-normalised.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import silhouette_score

PERSISTENCE = 0.98  # of rank-biased overlap: half of the weight lies on the first 34 ranks
DRAWS = 1_000
GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # cosine distances at which a tree may be cut

HEDGES = """
    almost apparently apparent appear appears around assume assumed believe could doubt doubtful
    estimate fairly generally guess likely mainly may maybe might mostly often partly perhaps
    possible possibly presumably probable probably quite rather relatively seem seems somewhat
"""
BOOSTERS = """
    absolutely actually always certain certainly clearly completely definite definitely entirely
    extremely fully indeed naturally never obvious obviously really surely totally truly
"""
LEXICONS: Mapping[str, frozenset[str]] = {
    "hedge": frozenset(HEDGES.split()),
    "booster": frozenset(BOOSTERS.split()),
}
"""Words that weaken and words that strengthen what is said; our own lists."""


def normalised(token: str) -> str:
    r"""A token's text as it is compared: without spaces around it, NFC.

    Example:
        >>> normalised(" cafe\u0301 ") == "caf\u00e9"
        True
    """
    return unicodedata.normalize("NFC", token).strip()


def is_fragment(token: str) -> bool:
    r"""Whether a token is a piece of a word or of a character, not a word or a mark of its own.

    Example:
        >>> [is_fragment(token) for token in (" store", "ing", ".", "\ufffd")]
        [False, True, False, True]
    """
    return "\ufffd" in token or (token[:1].isalpha())


def counts(tokens: pd.DataFrame) -> pd.DataFrame:
    """How often each token is listed, over reports, heads and ends.

    Args:
        tokens: One row a listed token: model, report, layer, head, token; as ov_tokens.parquet.

    Returns:
        By token: count, n_heads, n_models; the most frequent first, ties in alphabetical order.
    """
    rows = tokens.assign(text=[normalised(token) for token in tokens["token"]])
    rows["place"] = [*zip(rows["model"], rows["layer"], rows["head"], strict=True)]
    found = rows.groupby("text", observed=True).agg(
        count=("text", "size"), n_heads=("place", "nunique"), n_models=("model", "nunique")
    )
    ordered = found.reset_index().sort_values(["count", "text"], ascending=[False, True])
    return ordered.rename(columns={"text": "token"}).reset_index(drop=True)


@dataclass(frozen=True)
class Clusters:
    """Tokens in groups.

    Attributes:
        labels: Group of each token.
        threshold: Cosine distance at which the tree was cut.
        silhouette: Mean silhouette of the cut, in [-1, 1]; larger is better apart.
    """

    labels: np.ndarray
    threshold: float
    silhouette: float


def cluster(vectors: np.ndarray, grid: Sequence[float] = GRID) -> Clusters:
    """Agglomerative clusters of rows by cosine distance, average linkage.

    The tree is cut where the mean silhouette is largest among the grid's distances that leave at
    least 2 clusters and fewer clusters than rows.

    Args:
        vectors: One row a token: its row of the unembedding.
        grid: Distances that are tried.

    Raises:
        ValueError: No distance of the grid cuts the rows into such clusters.
    """
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distances = np.clip(1 - rows @ rows.T, 0, 2)
    np.fill_diagonal(distances, 0)
    best: Clusters | None = None
    for threshold in grid:
        labels = AgglomerativeClustering(
            n_clusters=None,  # pyright: ignore[reportArgumentType]
            metric="precomputed",
            linkage="average",
            distance_threshold=threshold,
        ).fit_predict(distances)
        if not 2 <= len(set(labels)) < len(labels):
            continue
        score = float(silhouette_score(distances, labels, metric="precomputed"))
        if best is None or score > best.silhouette:
            best = Clusters(labels, threshold, score)
    if best is None:
        raise ValueError(
            f"{len(rows)} tokens make no clusters at cosine distances {', '.join(map(str, grid))}"
        )
    return best


def cluster_table(
    tokens: pd.DataFrame, ids: np.ndarray, vectors: np.ndarray, found: Clusters
) -> pd.DataFrame:
    """One row a clustered token, with what its cluster is.

    Args:
        tokens: Listed tokens with token_id, token and logit.
        ids: The clustered tokens.
        vectors: Their rows of the unembedding.
        found: Their clusters.

    Returns:
        cluster (0 is the largest), size, medoid (the member nearest to all others), mean_logit
        (over the cluster's places in lists), token_id, token, count, is_fragment, is_medoid.
    """
    rows = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    listed = tokens.groupby("token_id", observed=True)
    logits, sizes = listed["logit"].sum(), listed.size()
    text = listed["token"].first()
    order = sorted(set(found.labels), key=lambda label: (-(found.labels == label).sum(), label))
    made = []
    for place, label in enumerate(order):
        here = np.flatnonzero(found.labels == label)
        nearest = here[int((rows[here] @ rows[here].T).sum(axis=1).argmax())]
        members = ids[here]
        mean = float(logits[members].sum() / sizes[members].sum())
        made += [
            {
                "cluster": place, "size": len(here), "medoid": text[ids[nearest]],
                "mean_logit": mean, "token_id": int(ids[index]), "token": text[ids[index]],
                "count": int(sizes[ids[index]]), "is_fragment": is_fragment(text[ids[index]]),
                "is_medoid": bool(index == nearest),
            }
            for index in here
        ]  # fmt: skip
    return pd.DataFrame(made).assign(threshold=found.threshold, silhouette=found.silhouette)


def no_clusters() -> pd.DataFrame:
    """The same table without a row, of tokens that make no clusters."""
    names = ("cluster", "size", "medoid", "mean_logit", "token_id", "token", "count")
    return pd.DataFrame(columns=[*names, "is_fragment", "is_medoid", "threshold", "silhouette"])


def rank_biased_overlap(
    left: Sequence[str], right: Sequence[str], *, p: float = PERSISTENCE
) -> float:
    """Extrapolated rank-biased overlap of two lists, to the depth of the shorter.

    RBO_ext = (X_k / k) p^k + (1 - p) / p * sum over d = 1..k of (X_d / d) p^d, X_d the number of
    items that both have among their first d.

    Args:
        left: Items without repetition, the most important first.
        right: Likewise.
        p: Persistence in (0, 1): weight of later ranks.

    Returns:
        In [0, 1]. 1: the same items in the same order. 0: none in common.

    Source:
        Webber, Moffat & Zobel (2010), A Similarity Measure for Indefinite Rankings, eq. 30.

    Example:
        >>> rank_biased_overlap("abc", "abc"), rank_biased_overlap("abc", "xyz")
        (1.0, 0.0)
    """
    depth = min(len(left), len(right))
    if not depth:
        raise ValueError("an empty list has no overlap with any")
    seen_left: set[str] = set()
    seen_right: set[str] = set()
    shared, total = 0, 0.0
    for place in range(depth):
        a, b = left[place], right[place]
        shared += (a == b) + (a != b and a in seen_right) + (a != b and b in seen_left)
        seen_left.add(a)
        seen_right.add(b)
        total += shared / (place + 1) * p ** (place + 1)
    return float(shared / depth * p**depth + (1 - p) / p * total)


def jaccard(left: Sequence[str], right: Sequence[str]) -> float:
    """Items that both lists have, over items that either has; in [0, 1]."""
    either = {*left} | {*right}
    return len({*left} & {*right}) / len(either) if either else 1.0


Place = tuple[int, int]


def lists(tokens: pd.DataFrame) -> dict[Place, list[str]]:
    """By head, its tokens in order, aligned by text; a text counts at its first place.

    Args:
        tokens: Rows of one model, report and end, with layer, head, rank and token.
    """
    found: dict[Place, list[str]] = {}
    for _, rows in tokens.sort_values("rank").groupby(["layer", "head"]):
        place = int(rows["layer"].iloc[0]), int(rows["head"].iloc[0])
        words = [normalised(token) for token in rows["token"]]
        found[place] = list(dict.fromkeys(word for word in words if word))
    return found


def compare(
    left: Mapping[Place, Sequence[str]],
    right: Mapping[Place, Sequence[str]],
    pairs: Sequence[tuple[Place, Place]],
    rng: np.random.Generator,
    *,
    draws: int = DRAWS,
) -> pd.DataFrame:
    """Overlap of heads of two models, against pairs of heads drawn at random.

    Args:
        left: Lists of one model's heads.
        right: Of the other's.
        pairs: Which heads are compared.
        rng: Draws the pairs of the null.
        draws: How many.

    Returns:
        One row a pair: left, right, rbo, jaccard, each with the null's mean and the p of an overlap
        at least as large.
    """
    heads = [*left], [*right]
    drawn = [rng.integers(len(side), size=draws) for side in heads]
    null = np.array([
        _overlaps(left[heads[0][a]], right[heads[1][b]]) for a, b in zip(*drawn, strict=True)
    ])
    rows = []
    for one, other in pairs:
        row: dict[str, object] = {"left": f"{one[0]}.{one[1]}", "right": f"{other[0]}.{other[1]}"}
        for index, name in enumerate(("rbo", "jaccard")):
            value = _overlaps(left[one], right[other])[index]
            larger = int((null[:, index] >= value - 1e-12).sum())
            row |= {
                name: value, f"{name}_null": float(null[:, index].mean()),
                f"{name}_p": (1 + larger) / (1 + draws),
            }  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


def _overlaps(left: Sequence[str], right: Sequence[str]) -> tuple[float, float]:
    return rank_biased_overlap(left, right), jaccard(left, right)


def _fisher_p(table: list[list[int]]) -> float:
    """Fisher's exact p, two-sided."""
    found: Any = stats.fisher_exact(table)
    return found.pvalue


def enrichment(found: Mapping[Place, Sequence[str]]) -> pd.DataFrame:
    """Whether a head lists more words of a lexicon than all other heads do.

    log odds = ln((a + 0.5) (d + 0.5) / ((b + 0.5) (c + 0.5))) with a words of the lexicon among the
    head's and b others, c and d those of all other heads; p is Fisher's exact, two-sided.

    Args:
        found: Lists by head, as `lists` gives them.

    Returns:
        One row a head and lexicon: lexicon, layer, head, n_words, n_tokens, log_odds, p, q
        (Benjamini-Hochberg over the heads of the lexicon).
    """
    made = []
    for name, words in LEXICONS.items():
        hits = {
            place: sum(token.lower() in words for token in some) for place, some in found.items()
        }
        n_hits, n_all = sum(hits.values()), sum(map(len, found.values()))
        for (layer, head), a in hits.items():
            n = len(found[layer, head])
            b, c = n - a, n_hits - a
            d = n_all - n - c
            made.append({
                "lexicon": name, "layer": layer, "head": head, "n_words": a, "n_tokens": n,
                "log_odds": float(np.log((a + 0.5) * (d + 0.5) / ((b + 0.5) * (c + 0.5)))),
                "p": _fisher_p([[a, b], [c, d]]),
            })  # fmt: skip
    table = pd.DataFrame(made)
    table["q"] = table.groupby("lexicon")["p"].transform(
        lambda p: stats.false_discovery_control(p, method="bh")
    )
    return table
