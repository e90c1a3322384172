"""How each arm of the training begins, and how wide a flat autoencoder is to be its equal."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from allostasis.core.seeding import derive
from allostasis.core.spaces import CausalMetric, ResidVec
from allostasis.models.hsae import HierarchicalSAE
from allostasis.models.teacher import Teacher

Start = Literal["random", "teacher", "rotated", "random_projectors", "pca", "kmeans"]
TAUGHT = ("teacher", "rotated", "random_projectors")
"""Starts that need a teacher's vectors."""
Match = Literal["latents", "params", "flops"]


class Directions(NamedTuple):
    """Where the first atoms of a dictionary begin, in the stream's coordinates.

    Attributes:
        parents: One row a parent.
        children: Rows of its children, by parent.
        mask: Which of them there are.
    """

    parents: Float[Tensor, "parent d"]
    children: Float[Tensor, "parent child d"]
    mask: Bool[Tensor, "parent child"]


def of_teacher(teacher: Teacher, *, m: int, c: int, seed: int | None = None) -> Directions:
    """A teacher's vectors as directions of the stream; children lose their parent's part.

    A child's direction is to_resid(delta) less its part along to_resid(l_p) under u^T Sigma v.

    Args:
        teacher: Vectors of the unembedding.
        m: Parents that there is room for; those with the lowest synsets come first.
        c: Children that there is room for, of each.
        seed: If given, all are turned by one random rotation of the whitened coordinates: every
            inner product stays and the content goes.
    """
    metric = teacher.metric
    parents = metric.whiten_resid(metric.to_resid(teacher.parents))[:m]
    children = metric.whiten_resid(metric.to_resid(teacher.deltas))[:m, :c]
    if seed is not None:
        turn = rotation(parents.shape[-1], seed)
        parents, children = parents @ turn, children @ turn
    unit = parents / parents.norm(dim=-1, keepdim=True)
    along = torch.einsum("pcd,pd->pc", children, unit)
    children = children - along[..., None] * unit[:, None]
    back = metric.power(-0.5)  # of the stream's whitened coordinates
    return Directions(
        (parents @ back).float(), (children @ back).float(), teacher.mask[:m, :c].clone()
    )


def rotation(d: int, seed: int) -> Float[Tensor, "d d"]:
    """A random orthogonal matrix, uniform over all."""
    generator = torch.Generator().manual_seed(derive(seed, "control"))
    drawn = torch.randn(d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal().sign()


def rotated(start: Directions, seed: int) -> Directions:
    """Directions turned by one random rotation of the stream."""
    turn = rotation(start.parents.shape[-1], seed).to(start.parents)
    return Directions(start.parents @ turn, start.children @ turn, start.mask)


def of_pca(x: Float[Tensor, "row d"], *, m: int, c: int) -> Directions:
    """Principal components: the first m are parents, the next ones dealt out as children.

    Where there are fewer than m (1 + c), the children beyond them stay as they were drawn.
    """
    components = _components(x, m * (1 + c))
    parents, rest = components[:m], components[m:]
    children = x.new_zeros(len(parents), c, x.shape[1])
    mask = torch.zeros(len(parents), c, dtype=torch.bool)
    for place, row in enumerate(rest):
        children[place % m, place // m] = row
        mask[place % m, place // m] = True
    return Directions(parents, children, mask)


def of_kmeans(x: Float[Tensor, "row d"], *, m: int, c: int, seed: int) -> Directions:
    """Centroids of k-means as parents; the first components of each cluster as its children.

    Centroids less the mean of all rows, which an autoencoder's bias begins with: with the mean in
    them, where that is large, all parents would be one.
    """
    from sklearn.cluster import KMeans

    found = KMeans(m, random_state=derive(seed, "control") % 2**32).fit(x.numpy())
    parents = torch.from_numpy(found.cluster_centers_).to(x) - x.mean(dim=0)
    children = x.new_zeros(m, c, x.shape[1])
    mask = torch.zeros(m, c, dtype=torch.bool)
    for j in range(m):
        own = x[torch.from_numpy(found.labels_ == j)]
        local = _components(own, min(c, max(0, len(own) - 1)))
        children[j, : len(local)] = local
        mask[j, : len(local)] = True
    return Directions(parents, children, mask)


def _components(x: Float[Tensor, "row d"], n: int) -> Float[Tensor, "component d"]:
    """The n first principal components, or as many as there are dimensions."""
    centred = (x - x.mean(dim=0)).double()
    _, vectors = np.linalg.eigh((centred.T @ centred).numpy())
    return torch.from_numpy(vectors[:, ::-1][:, :n].T.copy()).to(x)


def cosines(
    sae: HierarchicalSAE, start: Directions, metric: CausalMetric | None
) -> tuple[float, float]:
    """Mean cosine of the first atoms with the directions that they began from, by level."""
    atoms = sae.atoms().detach().cpu().double()
    n, most = start.mask.shape
    rows = atoms[sae.m :].view(sae.m, sae.c, -1)[:n, :most]
    pairs = (
        (atoms[:n], start.parents.double()),
        (rows[start.mask], start.children[start.mask].double()),
    )
    found = []
    for now, then in pairs:
        if metric is not None:
            now, then = (metric.whiten_resid(ResidVec(side)) for side in (now, then))
        found.append(float(torch.cosine_similarity(now, then, dim=-1).mean()))
    return found[0], found[1]


def n_parameters(m: int, c: int, s: int, d: int) -> int:
    """Numbers that a hierarchical SAE stores."""
    return 2 * m * d + m + d + 2 * m * s * d + 2 * m * c * s + m * c


def flops(m: int, c: int, s: int, k: int, d: int, k_child: int = 1) -> int:
    """Multiplications and additions of a token's forward pass under the kernel `hybrid`."""
    return 2 * (m * d + m * s * d + k * (c * s + k_child * s + s * d + d))


def flat_width(
    how: Match,
    *,
    m: int,
    c: int,
    s: int,
    k: int,
    d: int,
    k_child: int = 1,
    l0: float | None = None,
) -> int:
    """Latents of a flat SAE that is a hierarchical one's equal.

    Args:
        how: `latents`, `params` (stored numbers: 2 n d + n + d), or `flops` of a forward pass
            (2 (n d + L0 d)).
        m: Parents of the hierarchical one.
        c: Its children of a parent.
        s: Width of its subspaces.
        k: Its active parents.
        d: Width of an activation.
        k_child: Its active children of an active parent.
        l0: Active latents of the flat one, for `flops`; by default as many as it has at most.
    """
    if how == "latents":
        return m * (1 + c)
    if how == "params":
        return round((n_parameters(m, c, s, d) - d) / (2 * d + 1))
    active = k * (1 + k_child) if l0 is None else l0
    return max(1, round(flops(m, c, s, k, d, k_child) / (2 * d) - active))
