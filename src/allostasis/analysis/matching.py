"""Which latent of an autoencoder is which concept: decided on training rows, used on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csc_array

Codes = csc_array
RISE = 0.03  # by which F1 must rise for one more latent to be a part of a concept
MOST = 10  # latents that a concept is split into at most
CONTAINED = 0.5  # of a latent's firings, the share in which its parent fires too


@dataclass(frozen=True)
class Matches:
    """What training rows say of concepts and latents; -1 is none.

    Attributes:
        best: Of each concept, the latent with the best AUROC; two concepts may share one.
        latent: The same one-to-one, by the assignment of largest summed AUROC.
        auroc: Of `best`, on the training rows.
        threshold: Of `best`, the code from which on F1 is best on the training rows.
        groups: Of each concept, the latents that together are on where it is; `best` comes first.
        parent: Of each concept, the concept above it.
        parent_of_latent: Of each latent, the latent above it.
    """

    best: Int[np.ndarray, " concept"]
    latent: Int[np.ndarray, " concept"]
    auroc: Float[np.ndarray, " concept"]
    threshold: Float[np.ndarray, " concept"]
    groups: tuple[tuple[int, ...], ...]
    parent: Int[np.ndarray, " concept"]
    parent_of_latent: Int[np.ndarray, " latent"]


def match_latents(
    codes: Float[np.ndarray, "row latent"],
    members: Bool[np.ndarray, "row concept"],
    known: Bool[np.ndarray, "row concept"],
    *,
    parent: Sequence[int],
    n_parents: int,
) -> Matches:
    """Match concepts to latents on training rows.

    A hierarchical autoencoder's parents are matched to parent concepts and its children to child
    concepts. A flat one has no levels: every latent may be either, and what is above a latent is
    read off its firing.

    Args:
        codes: What the latents say, >= 0.
        members: Whether a row is of a concept.
        known: Whether that is known.
        parent: Of each concept, the concept above it, or -1.
        n_parents: How many latents, the first ones, are parents; the others are children, as many
            of each in turn. 0: the autoencoder is flat.
    """
    above = np.asarray(parent)
    n_latents = codes.shape[1]
    sparse = csc_array(codes)
    scores = aurocs(sparse, members, known)
    levels = (
        latent_parents(n_latents, n_parents) if n_parents else implied_parents(sparse, len(codes))
    )
    usable = np.nan_to_num(scores, nan=0.0)
    if n_parents:
        is_child = np.arange(n_latents) >= n_parents
        usable = np.where(is_child[:, None] == (above >= 0)[None], usable, 0.0)
    best = np.where(usable.max(axis=0) > 0.5, usable.argmax(axis=0), -1)
    rows, columns = linear_sum_assignment(np.maximum(usable - 0.5, 0), maximize=True)
    latent = np.full(len(above), -1)
    latent[columns] = np.where(usable[rows, columns] > 0.5, rows, -1)
    thresholds = np.zeros(len(above))
    groups: list[tuple[int, ...]] = []
    for concept, chosen in enumerate(best):
        counts = known[:, concept]
        truth = members[:, concept]
        if chosen < 0:
            groups.append(())
            continue
        thresholds[concept] = best_threshold(codes[counts, chosen], truth[counts])
        groups.append(split_group(sparse, truth, counts, int(chosen), usable[:, concept]))
    reached = np.where(best >= 0, usable[best, np.arange(len(above))], 0.5)
    return Matches(best, latent, reached, thresholds, tuple(groups), above, levels)


def aurocs(
    codes: Codes,
    members: Bool[np.ndarray, "row concept"],
    known: Bool[np.ndarray, "row concept"],
) -> Float[np.ndarray, "latent concept"]:
    """AUROC of every latent for every concept; ties count half; NaN where a class is empty.

    Only codes that are not 0 are sorted, so that the cost is that of the latents that fire.

    Example:
        >>> members = np.array([[True], [False], [False]])
        >>> codes = csc_array(np.array([[2.0], [1.0], [0.0]]))
        >>> float(aurocs(codes, members, np.ones_like(members))[0, 0])
        1.0
    """
    positive, negative = (members & known).astype(float), (~members & known).astype(float)
    n_positive, n_negative = positive.sum(axis=0), negative.sum(axis=0)
    n_latents = len(codes.indptr) - 1
    found = np.empty((n_latents, members.shape[1]))
    for latent in range(n_latents):
        rows, values = _column(codes, latent)
        _, group = np.unique(values, return_inverse=True)
        hits = np.zeros((int(group.max(initial=-1)) + 1, members.shape[1]))
        misses = np.zeros_like(hits)
        np.add.at(hits, group, positive[rows])
        np.add.at(misses, group, negative[rows])
        silent_hits = n_positive - hits.sum(axis=0)
        silent_misses = n_negative - misses.sum(axis=0)
        below = silent_misses + misses.cumsum(axis=0) - misses
        wins = (hits * (below + misses / 2)).sum(axis=0) + silent_hits * silent_misses / 2
        with np.errstate(invalid="ignore"):
            found[latent] = wins / (n_positive * n_negative)
    return found


def auroc(scores: Float[np.ndarray, " row"], truth: Bool[np.ndarray, " row"]) -> float:
    """AUROC of one score; NaN where all rows are of one class."""
    column = csc_array(scores[:, None])
    members = truth[:, None]
    return float(aurocs(column, members, np.ones_like(members))[0, 0])


def best_threshold(codes: Float[np.ndarray, " row"], truth: Bool[np.ndarray, " row"]) -> float:
    """The code above 0 from which on to say yes, so that F1 is largest; the largest of equals.

    Example:
        >>> best_threshold(np.array([3.0, 2.0, 1.0]), np.array([True, True, False]))
        2.0
    """
    order = np.argsort(-codes, kind="stable")
    values, hits = codes[order], truth[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(codes) + 1) + truth.sum())
    is_last = np.append(values[1:] != values[:-1], True) & (values > 0)
    places = np.flatnonzero(is_last)
    if not len(places):
        return np.inf
    return float(values[places[np.argmax(f1[places])]])


def split_group(
    codes: Codes,
    truth: Bool[np.ndarray, " row"],
    counts: Bool[np.ndarray, " row"],
    first: int,
    scores: Float[np.ndarray, " latent"],
) -> tuple[int, ...]:
    """Latents added one by one, each that which raises the F1 of "any of them fires" most.

    It ends where F1 rises by no more than `RISE`, or at `MOST` latents. Those with the 50 best
    scores are candidates.

    Args:
        codes: Of training rows.
        truth: Whether a row is of the concept.
        counts: Whether that is known.
        first: The latent to begin with.
        scores: By which candidates are chosen.
    """
    candidates = [int(latent) for latent in np.argsort(-scores, kind="stable")[:50]]
    fires = np.zeros((len(truth), len(candidates)), dtype=bool)
    for place, latent in enumerate(candidates):
        fires[_column(codes, latent)[0], place] = True
    fires, wanted = fires[counts], truth[counts]
    group = [candidates.index(first)]
    covered = fires[:, group[0]]
    reached = _f1(covered, wanted)
    while len(group) < MOST:
        trial = [_f1(covered | fires[:, place], wanted) for place in range(len(candidates))]
        chosen = int(np.argmax(trial))
        if trial[chosen] - reached <= RISE:
            break
        group.append(chosen)
        covered, reached = covered | fires[:, chosen], trial[chosen]
    return tuple(candidates[place] for place in group)


def latent_parents(n_latents: int, n_parents: int) -> Int[np.ndarray, " latent"]:
    """The parent of each latent of a hierarchical autoencoder: parents first, then their children.

    Example:
        >>> latent_parents(6, 2).tolist()
        [-1, -1, 0, 0, 1, 1]
    """
    n_children = n_latents // n_parents - 1
    return np.concatenate([np.full(n_parents, -1), np.repeat(np.arange(n_parents), n_children)])


def implied_parents(codes: Codes, n_rows: int) -> Int[np.ndarray, " latent"]:
    """Of each latent of a flat autoencoder, the one that fires more often and mostly along with it.

    That is the j with the largest P(j fires | i fires) - P(j fires) among those that fire more
    often than i, if P(j fires | i fires) is at least one half.
    """
    fires = csc_array((np.ones(codes.nnz), codes.indices, codes.indptr), shape=codes.shape)
    counts = np.asarray(fires.sum(axis=0)).ravel()
    together = (fires.T @ fires).toarray()
    with np.errstate(divide="ignore", invalid="ignore"):
        contained = together / counts[:, None]
    gain = contained - counts / n_rows
    gain[(counts[None] <= counts[:, None]) | ~(contained >= CONTAINED)] = -np.inf
    return np.where(np.isfinite(gain.max(axis=1)), gain.argmax(axis=1), -1)


def _column(codes: Codes, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in which a latent fires, and its codes there."""
    begin, end = codes.indptr[latent], codes.indptr[latent + 1]
    fires = codes.data[begin:end] > 0
    return codes.indices[begin:end][fires], codes.data[begin:end][fires]


def _f1(said: np.ndarray, wanted: np.ndarray) -> float:
    total = said.sum() + wanted.sum()
    return float(2 * (said & wanted).sum() / total) if total else 0.0
