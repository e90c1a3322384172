"""Concepts as whitened vectors of the unembedding: estimates, nulls, disjoint tests.

A concept's vector has a length: its members project to about 1 in units of its square. So nothing
here normalises a vector before a difference is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.core.spaces import ledoit_wolf

Estimator = Literal["lda", "mean"]
N_FOLDS = 6  # three and three, which share no lemma
N_BACKGROUND = 50_000  # tokens that members are told from


def lda_vector(members: Float[Tensor, "token width"]) -> Float[Tensor, " width"]:
    """The concept of some tokens: (u^T mu) u with u along C^-1 mu, C their shrunk covariance.

    Where tokens are fewer than dimensions, by Woodbury's identity.

    Args:
        members: Whitened rows, at least two.

    Returns:
        A vector l with |l|^2 = l . mu.

    Source:
        Park, Choe, Jiang & Veitch (2024), The geometry of categorical and hierarchical concepts in
        large language models.

    Example:
        >>> along = lda_vector(torch.tensor([[2.0, 1.0], [2.0, -1.0], [2.0, 0.0]]).double())
        >>> along.round(decimals=6)
        tensor([2., 0.], dtype=torch.float64)
    """
    n, width = members.shape
    mean = members.mean(dim=0)
    centred = members - mean
    gram = centred.T @ centred if n >= width else centred @ centred.T
    rho = ledoit_wolf(centred, gram)
    usual = gram.trace() / (n * width)
    if not usual > 0:
        return mean  # all members are alike
    shrunk = gram * ((1 - rho) / n)
    shrunk.diagonal().add_(rho * usual)
    if n >= width:
        direction = torch.cholesky_solve(mean[:, None], torch.linalg.cholesky(shrunk))[:, 0]
    else:
        solved = torch.linalg.solve(shrunk, centred @ mean)
        direction = mean - (1 - rho) / n * (centred.T @ solved)
    unit = direction / direction.norm()
    return (unit @ mean) * unit


def vector(members: Float[Tensor, "token width"], estimator: Estimator) -> Float[Tensor, " width"]:
    """The concept of some tokens, by an estimator."""
    return lda_vector(members) if estimator == "lda" else members.mean(dim=0)


def cosine(left: Float[Tensor, "*n width"], right: Float[Tensor, "*n width"]) -> Tensor:
    """Cosine of vectors in whitened coordinates."""
    return torch.nn.functional.cosine_similarity(left, right, dim=-1)


def published_unit(child: Tensor, parent: Tensor) -> Tensor:
    """Angle in degrees of parent and difference, both vectors normalised before it is taken.

    It is 90 + theta/2 with theta the angle of child and parent, so that it is never below 90,
    whatever the vectors are.

    Example:
        >>> angle = published_unit(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
        >>> round(angle.item(), 4)
        112.5
    """
    c, p = (v / v.norm(dim=-1, keepdim=True) for v in (child, parent))
    return torch.rad2deg(torch.arccos(cosine(c - p, p).clamp(-1, 1)))


# ---------------------------------------------------------------- what isotropic noise gives
def null_independent(share: float, n_child: int, n_parent: int) -> float:
    """Cosine of child less parent with parent on noise, each from its own draw of its tokens.

    Args:
        share: Of a concept's tokens, drawn for the child and for the parent apart.
        n_child: Tokens of the child, all of which are the parent's.
        n_parent: Tokens of the parent.

    Example:
        >>> round(null_independent(0.7, 20, 100), 3), round(null_independent(0.7, 30, 100), 3)
        (-0.14, -0.175)
    """
    a, r = 1 / share, n_child / n_parent
    return -(a - 1) / float(np.sqrt(a * (a / r + a - 2)))


def null_disjoint(n_child: int, n_rest: int) -> float:
    """The same where the parent's tokens are those that are not the child's.

    Example:
        >>> round(null_disjoint(40, 160), 3)
        -0.447
    """
    return -float(np.sqrt(n_child / (n_child + n_rest)))


def null_random_parent(child: np.ndarray, parent: np.ndarray) -> np.ndarray:
    """The same with a parent that is orthogonal to the child, by the lengths of both vectors.

    Example:
        >>> null_random_parent(np.array([1.0]), np.array([1.0])).round(3)
        array([-0.707])
    """
    return -parent / np.hypot(child, parent)


# ---------------------------------------------------------------- held-out members
@dataclass(frozen=True)
class Existence:
    """How far held-out members lie along their concept's vector.

    Attributes:
        projection: Median over members of <g, l> / |l|^2; 1 where they lie at its tip.
        dprime: (mean of members - mean of others) / root mean of both variances.
        auroc: Probability that a member lies further along than another token.
        n: Members.
    """

    projection: float
    dprime: float
    auroc: float
    n: int


def existence(inside: np.ndarray, outside: np.ndarray) -> Existence:
    """Tell held-out members of a concept from other tokens of the vocabulary, by its vector.

    Args:
        inside: <g, l> / |l|^2 of held-out members.
        outside: Of other tokens.
    """
    spread = np.sqrt((inside.var(ddof=1) + outside.var(ddof=1)) / 2)
    ranks = np.searchsorted(np.sort(outside), inside) / len(outside)
    return Existence(
        float(np.median(inside)),
        float((inside.mean() - outside.mean()) / spread),
        float(ranks.mean()),
        len(inside),
    )


# ---------------------------------------------------------------- estimates that share no lemma
@dataclass(frozen=True)
class Lemmas:
    """A concept as sums of rows over each lemma's tokens, the units that are split and resampled.

    Attributes:
        keys: Of the lemmas; two concepts have a key in common exactly if they share the lemma.
        sums: Of whitened rows.
        counts: Tokens.
    """

    keys: np.ndarray
    sums: Float[Tensor, "lemma width"]
    counts: Float[Tensor, " lemma"]

    def square(self) -> float:
        """Squared length of the mean, from pairs of unlike lemmas: unbiased, 0 under noise."""
        return float(self.resampled_squares(torch.ones(1, len(self.keys), dtype=torch.float64))[0])

    def resampled_squares(self, weights: Float[Tensor, "draw lemma"]) -> Float[Tensor, " draw"]:
        """`square` with so many copies of each lemma; a lemma is never paired with its copy."""
        own = self.sums.square().sum(dim=1)
        total = (weights @ self.sums).square().sum(dim=1) - weights.square() @ own
        pairs = (weights @ self.counts).square() - weights.square() @ self.counts.square()
        return total / pairs

    def inner(self, other: Lemmas) -> float:
        """Inner product of two means, from pairs of unlike lemmas: unbiased, 0 under noise."""
        _, own, others = np.intersect1d(self.keys, other.keys, return_indices=True)
        total = self.sums.sum(dim=0) @ other.sums.sum(dim=0)
        pairs = self.counts.sum() * other.counts.sum()
        alike = (self.sums[own] * other.sums[others]).sum()
        return float((total - alike) / (pairs - self.counts[own] @ other.counts[others]))

    def lower_bound(self, rng: np.random.Generator, *, n_boot: int, level: float = 0.95) -> float:
        """Lower end of the percentile interval of `square`, resampling lemmas.

        On noise it is too low rather than too high: a degenerate statistic's resamples spread more
        than the statistic does.
        """
        n = len(self.keys)
        draws = rng.multinomial(n, np.full(n, 1 / n), size=n_boot)
        squares = self.resampled_squares(torch.from_numpy(draws).double())
        return float(torch.quantile(squares, (1 - level) / 2))


@dataclass(frozen=True)
class Disjoint:
    """A child and a parent from estimates that share no lemma, as inner products.

    Attributes:
        num: <c - p, p>, unbiased.
        pp: <p, p>, unbiased.
        dd: <c - p, c - p>, unbiased.
        num_squared: <c - p, p>^2, unbiased: the product of two values that share no lemma.
    """

    num: float
    pp: float
    dd: float
    num_squared: float


def disjoint(
    child: Lemmas, parent: Lemmas, rng: np.random.Generator, *, n_partitions: int = 20
) -> Disjoint:
    """Split lemmas into six folds, and take every product across two of three folds.

    The parent keeps the child's share in every fold. With C and P the means of three folds,
    <c, p> is the mean of C_i . P_j over i != j, and <p, p>, <c, c> likewise; the other three folds
    give the same again from other lemmas.

    Args:
        child: Its lemmas.
        parent: Its lemmas; those that are the child's are in the same fold for both.
        rng: Draws the partitions.
        n_partitions: To average over.

    Raises:
        ValueError: There are fewer than six lemmas of the child, or of the parent without it.
    """
    keys = np.concatenate([child.keys, np.setdiff1d(parent.keys, child.keys)])
    n_child = len(child.keys)
    if min(n_child, len(keys) - n_child) < N_FOLDS:
        raise ValueError(
            f"{n_child} lemmas of a child and {len(keys) - n_child} of its parent's others: six "
            "folds need six of each"
        )
    at = {key: place for place, key in enumerate(keys)}
    of_parent = np.array([at[key] for key in parent.keys])
    folds = np.concatenate(
        [_folds(n, n_partitions, rng) for n in (n_child, len(keys) - n_child)], axis=1
    )
    means = [_means(child, folds[:, :n_child]), _means(parent, folds[:, of_parent])]
    halves = [slice(0, 3), slice(3, 6)]
    cc, cp, pp = (
        torch.stack([_across(means[a][:, half], means[b][:, half]) for half in halves])
        for a, b in ((0, 0), (0, 1), (1, 1))
    )
    num = cp - pp
    return Disjoint(
        num=float(num.mean()),
        pp=float(pp.mean()),
        dd=float((cc - 2 * cp + pp).mean()),
        num_squared=float((num[0] * num[1]).mean()),
    )


def largest_slant(parent: Lemmas, children: Sequence[Lemmas]) -> float | None:
    """Largest |cos(p, c_i - c_j)| of two children, from inner products of unlike lemmas.

    Being a maximum of estimates, it is above 0 where all cosines are 0; the same of a control is
    what it is to be held against.

    Returns:
        In [0, oo), for an estimate's cosine may pass 1; None where the parent's squared length, or
        that of every difference, is estimated at 0 or below.
    """
    pp, along = parent.square(), [child.inner(parent) for child in children]
    found = []
    for i, j in combinations(range(len(children)), 2):
        one, other = children[i], children[j]
        dd = one.square() - 2 * one.inner(other) + other.square()
        if pp > 0 and dd > 0:
            found.append(abs(along[i] - along[j]) / math.sqrt(pp * dd))
    return max(found, default=None)


def _folds(n: int, n_partitions: int, rng: np.random.Generator) -> np.ndarray:
    """Folds of equal size, drawn anew in each row."""
    return rng.permuted(np.tile(np.arange(n) % N_FOLDS, (n_partitions, 1)), axis=1)


def _means(concept: Lemmas, folds: np.ndarray) -> Float[Tensor, "partition fold width"]:
    """Mean row of each fold."""
    belongs = torch.from_numpy(folds[:, None] == np.arange(N_FOLDS)[:, None]).double()
    return (belongs @ concept.sums) / (belongs @ concept.counts)[..., None]


def _across(left: Tensor, right: Tensor) -> Float[Tensor, " partition"]:
    """Mean inner product of unlike folds."""
    products = left @ right.mT
    n = products.shape[-1]
    diagonal = products.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return (products.sum(dim=(-2, -1)) - diagonal) / (n * (n - 1))


# ---------------------------------------------------------------- children of one parent
@dataclass(frozen=True)
class Levels:
    """Whether all children of a parent lie at the same level along its vector.

    Attributes:
        eta: Between-child share of the variance of held-out lemmas' projections.
        eta_null: Its mean where labels are permuted.
        furthest: Largest distance of a child's mean projection from 1.
        p: Share of permutations with as large a share; never 0.
    """

    eta: float
    eta_null: float
    furthest: float
    p: float


def levels(
    projections: np.ndarray, labels: np.ndarray, rng: np.random.Generator, *, n_perm: int
) -> Levels:
    """Between-child share of variance, against permutations of the labels.

    Args:
        projections: One a held-out lemma, in units of the parent's squared length.
        labels: Its child, from 0 without gaps.
        rng: Draws the permutations.
        n_perm: How many.
    """
    counts = np.bincount(labels)
    centred = projections - projections.mean()
    orders = np.concatenate([labels[None], rng.permuted(np.tile(labels, (n_perm, 1)), axis=1)])
    sums = np.stack([(centred * (orders == child)).sum(axis=1) for child in range(len(counts))])
    shares = (sums**2 / counts[:, None]).sum(axis=0) / (centred**2).sum()
    means = np.bincount(labels, projections) / counts
    return Levels(
        float(shares[0]),
        float(shares[1:].mean()),
        float(np.abs(means - 1).max()),
        float((1 + (shares[1:] >= shares[0]).sum()) / (n_perm + 1)),
    )


@dataclass(frozen=True)
class Simplex:
    """The children of one parent as corners.

    Attributes:
        smallest: Least singular value of the differences from the first child.
        effective_rank: exp of the entropy of the squared singular values of children less parent.
        own_weight: Mean barycentric weight of held-out tokens on their own child.
        accuracy: Share of held-out tokens whose largest weight is on their own child.
        accuracy_null: Mean of it where labels are permuted.
    """

    smallest: float
    effective_rank: float
    own_weight: float
    accuracy: float
    accuracy_null: float


def simplex(
    corners: Float[Tensor, "child width"],
    parent: Float[Tensor, " width"],
    held_out: Float[Tensor, "token width"],
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    n_perm: int,
) -> Simplex:
    """Barycentric coordinates of held-out tokens on the affine hull of a parent's children."""
    edges = corners[1:] - corners[0]
    weights = torch.linalg.lstsq(edges.T, (held_out - corners[0]).T).solution.T
    weights = torch.cat([1 - weights.sum(dim=1, keepdim=True), weights], dim=1).numpy()
    nearest = weights.argmax(axis=1)
    permuted = rng.permuted(np.tile(labels, (n_perm, 1)), axis=1)
    values = torch.linalg.svdvals(corners - parent).square()
    shares = values / values.sum()
    return Simplex(
        float(torch.linalg.svdvals(edges)[-1]),
        float(torch.exp(-torch.xlogy(shares, shares).sum())),
        float(weights[np.arange(len(labels)), labels].mean()),
        float((nearest == labels).mean()),
        float((permuted == nearest).mean()),
    )


def derangement(
    children: Sequence[int],
    parents: Sequence[int],
    roots: Mapping[int, int],
    rng: np.random.Generator,
) -> dict[int, int]:
    """For each child a parent that lies below another root.

    Args:
        children: Concepts.
        parents: From which parents are drawn.
        roots: The topmost concept above each.
        rng: Draws.

    Raises:
        ValueError: All parents lie below one root.
    """
    found: dict[int, int] = {}
    for child in children:
        others = [parent for parent in parents if roots[parent] != roots[child]]
        if not others:
            raise ValueError("all concepts lie below one root: there is no parent of another")
        found[child] = others[int(rng.integers(len(others)))]
    return found
