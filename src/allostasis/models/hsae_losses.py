"""What a hierarchical SAE is trained on, term by term, and which weights each term can move."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from allostasis.models.hsae import HierarchicalSAE, Pass
from allostasis.models.hsae_kernels import Kernel, Lookup, decode_children, dot, mix, take

ENCODER = ("E", "b_E", "Pi_down", "Ec", "bc", "b")
MOVES: Mapping[str, tuple[str, ...]] = {
    "mse": (*ENCODER, "D", "Pi_up", "Dc"),
    "parents": ("E", "b_E", "b", "D"),
    "aux": (*ENCODER, "D", "Pi_up", "Dc"),
    "l1": ENCODER,
    "ortho": ("D",),
    "causal_ortho": ("D", "Pi_up", "Dc"),
}
"""Each loss by the name of its weight, and the tensors that get a gradient from it."""
NAMES = {name: name.removesuffix("_ortho") for name in MOVES}
"""What messages and records call them."""
ORTHO_ROWS = 1024
"""Most parents among which `ortho` looks at all pairs in one update."""
CAUSAL_ROWS = 128
"""Most parents whose children `causal` looks at in one update."""


class ConfigError(ValueError):
    """Settings under which a loss could do nothing."""


class Dead(NamedTuple):
    """Latents that have not fired for a while.

    Attributes:
        parents: Which parents.
        children: Which children, of parents that are alive.
        n_parents: How many there are.
        n_children: How many there are.
    """

    parents: Bool[Tensor, " parent"]
    children: Bool[Tensor, "parent child"]
    n_parents: int
    n_children: int


def check_stage(stage: str, weights: Mapping[str, float], frozen: Set[str]) -> None:
    """Refuse a stage in which an enabled loss can move nothing.

    Args:
        stage: `A` or `B`.
        weights: Of the losses; those above 0 are enabled.
        frozen: Tensors that the stage keeps.

    Raises:
        ConfigError: A loss depends on frozen tensors only.
    """
    for name, weight in weights.items():
        if weight > 0 and frozen >= set(MOVES[name]):
            raise ConfigError(refusal(stage, name, frozen))


def refusal(stage: str, name: str, frozen: Set[str]) -> str:
    """Why a stage is refused, and the two ways out."""
    moved = [tensor for tensor in MOVES[name] if tensor in frozen]
    free = [tensor for tensor in moved if tensor != "D"] or moved
    order = [tensor for tensor in MOVES["mse"] if tensor in frozen]
    return (
        f"stage {stage} enables '{NAMES[name]}' but no trainable parameter receives its gradient "
        f"(frozen: {', '.join(order)}); set stage_{stage.lower()}.{name}=0 or unfreeze "
        f"{' or '.join(free)}"
    )


def losses(
    sae: HierarchicalSAE,
    run: Pass,
    names: Set[str],
    *,
    dead: Dead,
    sigma: Float[Tensor, "d d"] | None,
    rows: Int64[Tensor, " row"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Every named loss, raw: not multiplied by its weight.

    Args:
        sae: The autoencoder.
        run: Its pass over a batch.
        names: Which losses; `mse` is always among them.
        dead: Latents that `aux` is for.
        sigma: Covariance of the unembedding, for `causal_ortho`; None is the identity.
        rows: Parents that the losses on the dictionary look at in this update; None is all.
    """
    found: dict[str, Tensor] = {"mse": _missed(run.of_parents + run.of_children, run.x0)}
    if "parents" in names:
        found["parents"] = _missed(run.of_parents, run.x0)
    if "aux" in names:
        found["aux"] = auxiliary(sae, run, dead)
    if "l1" in names:
        found["l1"] = run.found.z.sum(dim=1).mean() + run.found.v.sum(dim=(1, 2)).mean()
    chosen = slice(None) if rows is None else rows
    if "ortho" in names:
        found["ortho"] = ortho(sae.D[chosen])
    if "causal_ortho" in names:
        few = chosen if rows is None else rows[:CAUSAL_ROWS]
        found["causal_ortho"] = causal(sae.D[few], sae.Pi_up[few], sae.Dc[few], sigma)
    return found


def _missed(rebuilt: Float[Tensor, "token d"], x0: Float[Tensor, "token d"]) -> Tensor:
    """Squared error, summed over d and averaged over tokens."""
    return functional.mse_loss(rebuilt, x0, reduction="sum") / len(x0)


def ortho(D: Float[Tensor, "row d"]) -> Float[Tensor, ""]:
    """Mean squared cosine of two parents' atoms: sum_{i != j} cos^2(D_i, D_j) / (m^2 - m)."""
    unit = D / D.norm(dim=-1, keepdim=True)
    n = len(unit)
    return ((unit @ unit.T).square().sum() - n) / max(1, n * n - n)


def causal(
    D: Float[Tensor, "row d"],
    Pi_up: Float[Tensor, "row s d"],
    Dc: Float[Tensor, "row child s"],
    sigma: Float[Tensor, "d d"] | None,
) -> Float[Tensor, ""]:
    """Mean squared cosine of a parent's atom and its children's, under u^T Sigma v.

    A child's atom is the difference from its parent already, so that nothing is subtracted. Zero
    where every child is orthogonal to its parent; no scale of either matters.
    """
    D_sigma = D if sigma is None else D @ sigma
    if Dc.shape[1] <= Pi_up.shape[1]:  # whichever rows are fewer meet Sigma
        atoms = Dc @ Pi_up
        inner = (atoms @ D_sigma[..., None])[..., 0]
        fixed = atoms.detach()
        fixed_sigma = fixed if sigma is None else fixed @ sigma
        # a Sigma a^T, whose gradient 2 a Sigma is known: Sigma is symmetric
        of_child = (fixed_sigma * (2 * atoms - fixed)).sum(dim=-1)
    else:
        up_sigma = Pi_up if sigma is None else Pi_up @ sigma
        inner = torch.einsum("msd,md,mcs->mc", Pi_up, D_sigma, Dc)
        of_child = torch.einsum("mcs,mst,mct->mc", Dc, up_sigma @ Pi_up.mT, Dc)
    of_parent = (D_sigma * D).sum(dim=-1, keepdim=True)
    return (inner.square() / (of_child * of_parent)).mean()


def auxiliary(sae: HierarchicalSAE, run: Pass, dead: Dead) -> Float[Tensor, ""]:
    """How badly dead latents alone reconstruct what the living ones miss, as a share of its size.

    The dead parents of the min(d / 2, n) largest pre-activations, and of each active parent the
    dead child of the largest, without ReLU: one that is never positive would get no gradient. The
    residual itself gets none. 0 where nothing is dead.
    """
    if not dead.n_parents and not dead.n_children:
        return run.x0.new_zeros(())
    missed, kernel = run.residual.detach(), sae.kernel_for(len(run.x0))
    parts = [_of_dead_parents(sae, run, dead, kernel)] if dead.n_parents else []
    if dead.n_children:
        parent, is_on = run.found.parent, run.found.z > 0
        is_dead = dead.children[parent] & is_on[..., None]
        best, child = run.found.scores.masked_fill(~is_dead, -torch.inf).max(dim=-1, keepdim=True)
        v = torch.where(is_dead.any(dim=-1, keepdim=True), best, 0.0)
        parts.append(decode_children(run.found, child, v, sae.weights, kernel=kernel))
    size = _missed(missed.mean(dim=0).expand_as(missed), missed)
    return _missed(sum(parts[1:], parts[0]), missed) / size


def _of_dead_parents(
    sae: HierarchicalSAE, run: Pass, dead: Dead, kernel: Kernel
) -> Float[Tensor, "token d"]:
    k_aux = min(sae.d_model // 2, dead.n_parents)
    if kernel == "grouped" and k_aux == dead.n_parents:  # few parents, and all that are dead
        return (run.found.hidden * dead.parents) @ sae.D
    hidden = run.found.hidden.detach().masked_fill(~dead.parents, -torch.inf)
    rows = Lookup(hidden.topk(k_aux, dim=-1).indices, sae.m)
    z = dot(run.x0, sae.E, rows, dense=False) + take(sae.b_E[:, None], rows)[..., 0]
    return mix(z, sae.D, rows)
