"""A hierarchical sparse autoencoder: parents, and in each active one a few of its children."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int64
from torch import Tensor, nn

from allostasis.core.seeding import derive
from allostasis.models import hsae_kernels as kernels
from allostasis.models.hsae_kernels import Selected, Weights

KernelChoice = Literal["auto", "naive", "hybrid", "sampled", "grouped", "dense_masked"]
GROUPED_FROM = 64
"""Places of a batch per parent from which `auto` puts a parent's tokens together, on a CPU: where
`benchmarks/hsae_step.py` has measured that it pays."""
MAX_FLAT = 2**30
"""Most entries of a flat decoder."""


class UnsupportedExport(ValueError):
    """A hierarchical SAE whose flat form would be too large."""


def check_flat(d_sae: int, d_model: int) -> None:
    """Refuse what has no flat form that could be written.

    Args:
        d_sae: Latents, parents and children.
        d_model: Width of an activation.

    Raises:
        UnsupportedExport: The decoder would have more than 2^30 entries.
    """
    if d_sae * d_model > MAX_FLAT:
        raise UnsupportedExport(
            f"{d_sae} latents x {d_model} are more than 2^30 entries of a decoder, which could not "
            "be exported; take fewer parents or children"
        )


@dataclass(frozen=True, eq=False)
class Codes:
    """What a hierarchical SAE says of some tokens, never spread out over its dictionary.

    Attributes:
        parent: The K parents of the largest pre-activation, by falling value.
        z: Their values, at least 0; 0 is off.
        child: Children of each that were chosen.
        v: Their values, at least 0, and 0 where their parent is off.
        m: Parents of the dictionary.
        c: Children of a parent.
    """

    parent: Int64[Tensor, "token k"]
    z: Float[Tensor, "token k"]
    child: Int64[Tensor, "token k k_child"]
    v: Float[Tensor, "token k k_child"]
    m: int
    c: int

    def latents(self) -> tuple[Int64[Tensor, "token n"], Float[Tensor, "token n"]]:
        """Flat index and value of every selected latent: parents first, then children j-major."""
        child = self.m + self.parent[..., None] * self.c + self.child
        index = torch.cat([self.parent, child.flatten(1)], dim=1)
        return index, torch.cat([self.z, self.v.flatten(1)], dim=1)

    def dense(self) -> Float[Tensor, "token latent"]:
        """All latents: the parents, then the children j-major."""
        index, value = self.latents()
        return value.new_zeros(len(value), self.m * (1 + self.c)).scatter(1, index, value)


class Pass(NamedTuple):
    """One forward pass in the SAE's own units, in which x0 = scale x - b.

    Attributes:
        x0: What is coded.
        found: The codes and what they were chosen from.
        of_parents: What the active parents add to b.
        of_children: What their children add.
    """

    x0: Float[Tensor, "token d"]
    found: Selected
    of_parents: Float[Tensor, "token d"]
    of_children: Float[Tensor, "token d"]

    @property
    def residual(self) -> Float[Tensor, "token d"]:
        """What the reconstruction misses."""
        return self.x0 - self.of_parents - self.of_children


class HierarchicalSAE(nn.Module):
    """Two levels of latents: TopK over parents, and within each active parent its best children.

    x0 = scale x - b; z = TopK_K(ReLU(E x0 + b_E)); a_j = Ec_j Pi_down_j x0 + bc_j for active j;
    x^ = b + sum_j z_j D_j + sum_j ReLU(a_jk) Pi_up_j Dc_jk, over the k_child largest a_jk of each
    active j. The child sees x0, not what the parents leave. Tables are stored by rows, so `Pi_up`
    and `Dc` are the transposes of the matrices of that name in the formula.

    Latents are numbered as in the flat form: parents 0 to m - 1, then child k of parent j as
    m + j c + k.

    Args:
        seed: The run's seed.
        d_model: Width of an activation.
        m: Parents.
        c: Children of a parent.
        s: Width of a parent's subspace; from min(c, d_model) on it constrains no rank.
        k: Active parents of a token.
        k_child: Active children of an active parent.
        kernel: How it is computed; `auto` is `hybrid` on a GPU; elsewhere `grouped` where a parent
            is active in 64 tokens of a batch on average, and `sampled` where in fewer.

    Raises:
        ValueError: More active parents or children than there are.

    Example:
        >>> sae = HierarchicalSAE(seed=0, d_model=8, m=6, c=3, s=2, k=2)
        >>> sae.encode(torch.randn(5, 8)).dense().shape
        torch.Size([5, 24])
    """

    scale: Tensor

    def __init__(
        self,
        *,
        seed: int,
        d_model: Annotated[int, Gt(0)],
        m: Annotated[int, Gt(0)],
        c: Annotated[int, Gt(0)],
        s: Annotated[int, Gt(0)],
        k: Annotated[int, Gt(0)],
        k_child: Annotated[int, Ge(1)] = 1,
        kernel: KernelChoice = "auto",
    ) -> None:
        super().__init__()
        if k > m or k_child > c:
            raise ValueError(f"{k=} of {m=} parents, {k_child=} of {c=} children: too many")
        self.d_model, self.m, self.c, self.s = d_model, m, c, s
        self.k, self.k_child = k, k_child
        self.kernel: KernelChoice = kernel
        generator = torch.Generator().manual_seed(derive(seed, "init"))

        def unit(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator)
            return drawn / drawn.norm(dim=-1, keepdim=True)

        D, Dc, down = unit(m, d_model), unit(m, c, s), unit(m, s, d_model)
        if s <= d_model:
            down = torch.linalg.qr(down.mT).Q.mT.contiguous()  # rows orthonormal
        self.D, self.E = nn.Parameter(D), nn.Parameter(D.clone())
        self.b_E, self.b = nn.Parameter(torch.zeros(m)), nn.Parameter(torch.zeros(d_model))
        self.Pi_down, self.Pi_up = nn.Parameter(down), nn.Parameter(down.clone())
        self.Dc, self.Ec = nn.Parameter(Dc), nn.Parameter(Dc.clone())
        self.bc = nn.Parameter(torch.zeros(m, c))
        self.register_buffer("scale", torch.ones(()))

    @property
    def d_sae(self) -> int:
        """Latents of both levels."""
        return self.m * (1 + self.c)

    @property
    def hook_dict(self) -> dict[str, Any]:
        """Hook points: none, for what it computes is asked of it directly."""
        return {}

    @property
    def weights(self) -> Weights:
        """The tensors that kernels read."""
        return Weights(*(getattr(self, name) for name in Weights._fields))

    def kernel_for(self, n_tokens: int) -> kernels.Kernel:
        """How a batch of so many tokens is computed."""
        if self.kernel != "auto":
            return self.kernel
        if self.D.is_cuda:
            return "hybrid"
        return "grouped" if n_tokens * self.k >= GROUPED_FROM * self.m else "sampled"

    # ------------------------------------------------------------------ forward

    def run(self, x: Float[Tensor, "token d"]) -> Pass:
        """A forward pass with everything that losses ask for."""
        x0, w = self.scale * x - self.b, self.weights
        kernel = self.kernel_for(len(x))
        found = kernels.encode(x0, w, k=self.k, k_child=self.k_child, kernel=kernel)
        of_parents, of_children = kernels.decode(found, w, kernel=kernel)
        return Pass(x0, found, of_parents, of_children)

    def encode(self, x: Float[Tensor, "token d"]) -> Codes:
        """Codes of activations as they are, not centred or scaled."""
        found = kernels.encode(
            self.scale * x - self.b,
            self.weights,
            k=self.k,
            k_child=self.k_child,
            kernel=self.kernel_for(len(x)),
        )
        return self.codes(found)

    def codes(self, found: Selected) -> Codes:
        """What was selected, with the dictionary's shape."""
        return Codes(found.parent, found.z, found.child, found.v, self.m, self.c)

    def _decoded(self, codes: Codes) -> tuple[Tensor, Tensor]:
        none = codes.z.new_zeros(len(codes.z), self.m)
        found = Selected(codes.parent, codes.z, codes.child, codes.v, none, none)
        return kernels.decode(found, self.weights, kernel=self.kernel_for(len(codes.z)))

    def decode(self, codes: Codes) -> Float[Tensor, "token d"]:
        """The activations that codes stand for."""
        of_parents, of_children = self._decoded(codes)
        return (self.b + of_parents + of_children) / self.scale

    def decode_parents(self, codes: Codes) -> Float[Tensor, "token d"]:
        """What the parents alone say of the activations."""
        return (self.b + self._decoded(codes)[0]) / self.scale

    def forward(self, x: Float[Tensor, "token d"]) -> Float[Tensor, "token d"]:
        """Reconstruction of activations, in their own units."""
        return self.decode(self.encode(x))

    # ------------------------------------------------------------------ the dictionary

    def atoms(self) -> Float[Tensor, "latent d"]:
        """Decoder rows of all latents, parents first: D_j, then Pi_up_j Dc_jk."""
        children = torch.einsum("mcs,msd->mcd", self.Dc, self.Pi_up)
        return torch.cat([self.D, children.flatten(0, 1)])

    @torch.no_grad()
    def flat_weights(self) -> dict[str, Tensor]:
        """The same function as a flat SAE with grouped TopK, of raw activations.

        e_jk = Pi_down_j^T Ec_jk and d_jk = Pi_up_j Dc_jk. The scale is folded in: x0 = scale
        (x - b / scale).

        Returns:
            `W_enc` [d, latent], `b_enc` [latent], `W_dec` [latent, d], `b_dec` [d].

        Raises:
            UnsupportedExport: The decoder would have more than 2^30 entries.
        """
        check_flat(self.d_sae, self.d_model)
        scale = self.scale
        children = torch.einsum("mcs,msd->mcd", self.Ec, self.Pi_down).flatten(0, 1)
        return {
            "W_enc": (torch.cat([self.E, children]) * scale).T.contiguous(),
            "b_enc": torch.cat([self.b_E, self.bc.flatten()]),
            "W_dec": self.atoms() / scale,
            "b_dec": self.b / scale,
        }

    @torch.no_grad()
    def child_norms(self) -> Float[Tensor, "parent child"]:
        """||d_jk||, without the d_jk: the square is Dc_jk^T (Pi_up_j^T Pi_up_j) Dc_jk."""
        gram = self.Pi_up @ self.Pi_up.mT
        return torch.einsum("mcs,mst,mct->mc", self.Dc, gram, self.Dc).clamp_min(0).sqrt()

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove from gradients what would only lengthen or shorten an atom.

        An atom d_jk is scaled by scaling Dc_jk, so that is where its radial part lies.
        """
        for rows in (self.D, self.Dc):
            if rows.grad is not None:
                along = (rows.grad * rows).sum(-1, keepdim=True) / rows.square().sum(
                    -1, keepdim=True
                )
                rows.grad -= along * rows

    @torch.no_grad()
    def renormalise(self) -> None:
        """Give every atom unit norm again, and its encoder what it lost.

        Only where atom and encoder are trainable, so that what is frozen keeps its bits. The
        function stays the same wherever the same latents are chosen; which of two nearly equal
        ones is, may change, for TopK and argmax compare pre-activations.
        """
        if self.D.requires_grad and self.E.requires_grad:
            norm = self.D.norm(dim=-1)
            self.D /= norm[:, None]
            self.E *= norm[:, None]
            self.b_E *= norm
        if self.Dc.requires_grad and self.Ec.requires_grad:
            norm = self.child_norms()
            self.Dc /= norm[..., None]
            self.Ec *= norm[..., None]
            self.bc *= norm

    @torch.no_grad()
    def start_at(self, mean: Float[Tensor, " d"], scale: float) -> None:
        """Take the scale of the data, and begin with their mean as b."""
        self.scale.fill_(scale)
        self.b.copy_(scale * mean)

    @torch.no_grad()
    def plant(
        self,
        parents: Float[Tensor, "concept d"],
        children: Float[Tensor, "concept most d"],
        mask: torch.Tensor,
        *,
        is_turned: bool = True,
    ) -> int:
        """Make given directions the first atoms; the others stay as they were drawn.

        Children are put into the span of their parent's subspace, whose first directions become
        theirs: with s at least the number of planted children each is met exactly.

        Args:
            parents: Directions of parents 0, 1, ...; unit norm is made of any length.
            children: Directions of their children.
            mask: Which of them there are.
            is_turned: Whether subspaces are turned towards their children. If not, they stay as
                they were drawn, and a child begins with what its parent's subspace holds of it.

        Returns:
            Slots without a given direction, over both levels.

        Raises:
            ValueError: More directions than there are slots.
        """
        n, most = mask.shape
        if n > self.m or int(mask.sum(1).max()) > self.c:
            raise ValueError(
                f"{n} parents with up to {int(mask.sum(1).max())} children do not fit in "
                f"m={self.m} parents of c={self.c} children"
            )
        given = parents / parents.norm(dim=-1, keepdim=True)
        self.D[:n].copy_(given)
        self.E[:n].copy_(given)
        for j in range(n):
            wanted = children[j][mask[j]].to(self.D)
            wanted = wanted / wanted.norm(dim=-1, keepdim=True)
            if is_turned:
                self._turn(j, wanted)
            low = wanted @ self.Pi_up[j].mT
            low = low / low.norm(dim=-1, keepdim=True)
            self.Dc[j, : len(wanted)].copy_(low)
            self.Ec[j, : len(wanted)].copy_(low)
        return self.d_sae - n - int(mask.sum())

    def _turn(self, j: int, wanted: Float[Tensor, "child d"]) -> None:
        """Turn parent j's subspace so that it holds the wanted directions."""
        basis = self.Pi_up[j].detach()
        together = torch.cat([wanted, basis]).mT.double()
        rows = min(self.s, self.d_model)
        turned = torch.linalg.qr(together).Q.mT[:rows].to(basis)
        basis = torch.cat([turned, basis[rows:]])
        self.Pi_up[j].copy_(basis)
        self.Pi_down[j].copy_(basis)
