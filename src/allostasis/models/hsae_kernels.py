"""Forward passes of a hierarchical SAE: one function of the weights, computed in five ways.

`naive` gathers every active parent's matrices, token by token, and is the reference. `dense_masked`
computes all children and keeps a few. `hybrid` computes all projections in one matrix product and
the rest sparsely; `sampled` also computes the projections only where they are read. `grouped` puts
the tokens of each parent together, for dictionaries of few parents. A parent's own pre-activation
is a matrix product in all: without it nobody knows which parents are active.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from allostasis.models.hsae_grouped import Groups

Kernel = Literal["naive", "hybrid", "sampled", "grouped", "dense_masked"]


class Weights(NamedTuple):
    """The tensors of a hierarchical SAE that its kernels read.

    Attributes:
        E: Encoder rows of the parents.
        b_E: Their biases.
        D: Decoder rows of the parents.
        Pi_down: Each parent's projection into its subspace, as rows of a table.
        Pi_up: Its way back, as rows of a table.
        Ec: Encoder rows of the children, in their parent's subspace.
        bc: Their biases.
        Dc: Decoder rows of the children, in their parent's subspace.
    """

    E: Float[Tensor, "parent d"]
    b_E: Float[Tensor, " parent"]
    D: Float[Tensor, "parent d"]
    Pi_down: Float[Tensor, "parent s d"]
    Pi_up: Float[Tensor, "parent s d"]
    Ec: Float[Tensor, "parent child s"]
    bc: Float[Tensor, "parent child"]
    Dc: Float[Tensor, "parent child s"]


class Selected(NamedTuple):
    """Which latents a token turns on, by how much, and what it chose among.

    Attributes:
        parent: The K parents of the largest pre-activation.
        z: Their values, at least 0; 0 where fewer than K pre-activations are positive.
        child: Children chosen within each.
        v: Their values, at least 0, and 0 where the parent is off.
        hidden: Pre-activations of all parents, without gradient in the sparse kernels.
        scores: Pre-activations of the active parents' children.
        groups: Tokens by parent, where the kernel has put them together.
    """

    parent: Int64[Tensor, "token k"]
    z: Float[Tensor, "token k"]
    child: Int64[Tensor, "token k k_child"]
    v: Float[Tensor, "token k k_child"]
    hidden: Float[Tensor, "token parent"]
    scores: Float[Tensor, "token k child"]
    groups: Groups | None = None


def top_k(hidden: Float[Tensor, "token parent"], k: int) -> Int64[Tensor, "token k"]:
    """Indices of the k largest, of equal ones the lowest.

    A GPU's radix selection takes the lowest of equal ones by itself; a CPU's partial sort does not.
    """
    n = hidden.shape[-1]
    values, index = hidden.detach().topk(min(k + 1, n), dim=-1)
    if k < n and hidden.device.type == "cpu":
        # a tie within the k changes nothing, and neither does one of latents that are off
        tied = (values[:, k - 1] == values[:, k]) & (values[:, k] > 0)
        if tied.any():
            ranked = hidden.detach()[tied].sort(dim=-1, descending=True, stable=True)
            index[tied] = ranked.indices[:, : k + 1]
    return index[:, :k].contiguous()


def best_children(
    scores: Float[Tensor, "token k child"], k_child: int
) -> tuple[Float[Tensor, "token k k_child"], Int64[Tensor, "token k k_child"]]:
    """Pre-activations and numbers of each parent's best children, of equal ones the first."""
    if k_child == 1:
        best, child = scores.max(dim=-1, keepdim=True)
        return best, child
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    return ranked.values[..., :k_child], ranked.indices[..., :k_child]


class Lookup:
    """Rows of a table that each token reads, and, for gradients, the tokens that each row serves.

    Args:
        rows: Row numbers.
        n_rows: Rows of the table.
    """

    def __init__(self, rows: Int64[Tensor, "token n"], n_rows: int) -> None:
        self.rows, self.n_rows = rows, n_rows

    def blocks(self, size: int) -> Lookup:
        """The same for a table in which each row has become `size` rows."""
        within = torch.arange(size, device=self.rows.device)
        return Lookup((self.rows[..., None] * size + within).flatten(1), self.n_rows * size)

    @cached_property
    def _served(self) -> tuple[Tensor, Tensor]:
        """Places in `rows` ordered by row, and where in that order each row begins."""
        ordered, order = self.rows.flatten().sort(stable=True)
        every = torch.arange(self.n_rows, device=ordered.device)
        return order, torch.searchsorted(ordered, every)

    def dot(self, x: Tensor, table: Tensor) -> Tensor:
        """<x[t], table[rows[t, i]]>, a product of matrices computed where it is read only."""
        n_tokens, n = self.rows.shape
        token = torch.arange(n_tokens, device=self.rows.device)
        # the gradient of embedding_bag's weights is this product
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x.contiguous(), table, self.rows.flatten(), token * n, token.repeat_interleave(n), 0
        ).view(n_tokens, n)

    def mix(self, weights: Tensor, table: Tensor) -> Tensor:
        """sum_i weights[t, i] table[rows[t, i]]."""
        return F.embedding_bag(self.rows, table, mode="sum", per_sample_weights=weights)

    def spread(self, weights: Tensor, x: Tensor) -> Tensor:
        """The transpose of `mix`: each row's sum over its tokens of weight times x."""
        order, starts = self._served
        token, ordered = order // self.rows.shape[1], weights.flatten()[order]
        return F.embedding_bag(token, x, starts, mode="sum", per_sample_weights=ordered)

    def collect(self, values: Tensor) -> Tensor:
        """Each row's sum over the places that read it, of `values` [token, n, ...]."""
        order, starts = self._served
        flat = values.reshape(order.numel(), -1)
        return F.embedding_bag(order, flat, starts, mode="sum")


class _Take(torch.autograd.Function):
    """table[rows], with a gradient that is summed in one order, on any device."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, lookup: Lookup) -> Tensor:
        ctx.lookup, ctx.shape = lookup, table.shape
        return table[lookup.rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        return ctx.lookup.collect(grads[0]).view(ctx.shape), None


class _Mix(torch.autograd.Function):
    """sum_i weights[t, i] table[rows[t, i]]."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, table: Tensor, lookup: Lookup) -> Tensor:
        ctx.save_for_backward(weights, table)
        ctx.lookup = lookup
        return lookup.mix(weights, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        weights, table = ctx.saved_tensors
        lookup, grad = ctx.lookup, grads[0].contiguous()
        of_weights = lookup.dot(grad, table) if ctx.needs_input_grad[0] else None
        of_table = lookup.spread(weights, grad) if ctx.needs_input_grad[1] else None
        return of_weights, of_table, None


class _Dot(torch.autograd.Function):
    """<x[t], table[rows[t, i]]>; as one dense product of which a few entries are read, if told.

    `product` is that dense product where it has been computed already.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, table: Tensor, lookup: Lookup, dense: bool, product: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.lookup, ctx.dense, ctx.dtype = lookup, dense, x.dtype
        if product is None and dense:
            product = F.linear(x, table)  # in bfloat16 under autocast
        if product is None:
            return lookup.dot(x, table)
        ctx.dtype = product.dtype
        return product.gather(1, lookup.rows).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        x, table = ctx.saved_tensors
        lookup: Lookup = ctx.lookup
        grad = grads[0].contiguous()
        of_x = lookup.mix(grad, table) if ctx.needs_input_grad[0] else None
        of_table = None
        if ctx.needs_input_grad[1] and ctx.dense:
            wide = grad.new_zeros(len(x), lookup.n_rows, dtype=ctx.dtype)
            wide.scatter_(1, lookup.rows, grad.to(ctx.dtype))
            of_table = (wide.T @ x.to(ctx.dtype)).to(table.dtype)
        elif ctx.needs_input_grad[1]:
            of_table = lookup.spread(grad, x)
        return of_x, of_table, None, None, None


def take(table: Float[Tensor, "row ..."], lookup: Lookup) -> Float[Tensor, "token n ..."]:
    """Rows of a table, with a deterministic gradient."""
    return _Take.apply(table, lookup)


def mix(
    weights: Float[Tensor, "token n"], table: Float[Tensor, "row d"], lookup: Lookup
) -> Float[Tensor, "token d"]:
    """Weighted sum of the rows that each token reads."""
    return _Mix.apply(weights, table, lookup)


def dot(
    x: Float[Tensor, "token d"],
    table: Float[Tensor, "row d"],
    lookup: Lookup,
    *,
    dense: bool,
    product: Tensor | None = None,
) -> Float[Tensor, "token n"]:
    """Each token's products with the rows it reads.

    Args:
        x: Tokens.
        table: Rows.
        lookup: Which.
        dense: Whether products and the table's gradient are computed as matrix products.
        product: x table^T, where it is known already.
    """
    return _Dot.apply(x, table, lookup, dense, product)


def encode(
    x0: Float[Tensor, "token d"], w: Weights, *, k: int, k_child: int, kernel: Kernel
) -> Selected:
    """Select parents and, within each, children.

    h = E x0 + b_E; parents are the k largest of ReLU(h); a_j = Ec_j Pi_down_j x0 + bc_j; children
    are the k_child largest of a_j, with values ReLU(a_j) where the parent is on.

    Args:
        x0: Centred and scaled activations.
        w: Weights.
        k: Active parents of a token.
        k_child: Active children of a parent.
        kernel: How it is computed.
    """
    m, s, _ = w.Pi_down.shape
    groups = None
    if kernel in ("naive", "grouped", "dense_masked"):
        hidden = F.linear(x0, w.E, w.b_E).to(x0.dtype)
        parent = top_k(hidden, k)
        z = hidden.gather(1, parent).relu()
        if kernel == "naive":
            low = torch.einsum("td,tksd->tks", x0, w.Pi_down[parent])
            scores = torch.einsum("tks,tkcs->tkc", low, w.Ec[parent]) + w.bc[parent]
        elif kernel == "grouped":
            groups = Groups(parent, m)
            each = groups.arrange(x0[:, None].expand(-1, k, -1))
            if w.Ec.shape[1] <= s:  # fewer children than directions: their own rows are cheaper
                of_children = groups.matmul(each, (w.Ec @ w.Pi_down).mT)
            else:
                of_children = groups.matmul(groups.matmul(each, w.Pi_down.mT), w.Ec.mT)
            scores = groups.restore(of_children)
            scores = scores + take(w.bc, Lookup(parent, m))
        else:
            low = F.linear(x0, w.Pi_down.flatten(0, 1)).to(x0.dtype).view(len(x0), m, s)
            every = torch.einsum("tms,mcs->tmc", low, w.Ec) + w.bc
            scores = every.gather(1, parent[..., None].expand(-1, -1, every.shape[-1]))
    else:
        dense = kernel == "hybrid"
        with torch.no_grad():
            product = F.linear(x0, w.E)
            hidden = product.to(x0.dtype) + w.b_E
            parent = top_k(hidden, k)
        rows = Lookup(parent, m)
        z = dot(x0, w.E, rows, dense=dense, product=product) + take(w.b_E[:, None], rows)[..., 0]
        z = z.relu()
        low = dot(x0, w.Pi_down.flatten(0, 1), rows.blocks(s), dense=dense)
        scores = torch.einsum("tks,tkcs->tkc", low.view(*parent.shape, s), take(w.Ec, rows))
        scores = scores + take(w.bc, rows)
    best, child = best_children(scores, k_child)
    v = best.relu() * (z > 0)[..., None]
    return Selected(parent, z, child, v, hidden, scores, groups)


def decode(
    found: Selected, w: Weights, *, kernel: Kernel
) -> tuple[Float[Tensor, "token d"], Float[Tensor, "token d"]]:
    """What parents and what children add to the reconstruction.

    sum_j z_j D_j and sum_j sum_k v_jk Pi_up_j Dc_jk, both over what is active.
    """
    parent, z = found.parent, found.z
    if kernel == "naive":
        of_parents = torch.einsum("tk,tkd->td", z, w.D[parent])
    elif kernel in ("grouped", "dense_masked"):
        of_parents = torch.zeros_like(found.hidden).scatter(1, parent, z) @ w.D
    else:
        of_parents = mix(z, w.D, Lookup(parent, len(w.D)))
    return of_parents, decode_children(found, found.child, found.v, w, kernel=kernel)


def decode_children(
    found: Selected,
    child: Int64[Tensor, "token k k_child"],
    v: Float[Tensor, "token k k_child"],
    w: Weights,
    *,
    kernel: Kernel,
) -> Float[Tensor, "token d"]:
    """sum_j sum_k v_jk Pi_up_j Dc_jk over given children of the parents that were selected.

    Args:
        found: Of each token.
        child: Children of each of its parents.
        v: Their values, of any sign.
        w: Weights.
        kernel: How it is computed.
    """
    m, c, s = w.Dc.shape
    parent = found.parent
    if kernel == "naive":
        chosen = w.Dc[parent].gather(2, child[..., None].expand(*child.shape, s))
        low = (v[..., None] * chosen).sum(dim=2)
        return torch.einsum("tks,tksd->td", low, w.Pi_up[parent])
    if kernel == "grouped":
        groups = found.groups or Groups(parent, m)
        of = v.new_zeros(*parent.shape, c).scatter(2, child, v)
        of = groups.arrange(of)
        if c <= s:
            rows = groups.matmul(of, w.Dc @ w.Pi_up)
        else:
            rows = groups.matmul(groups.matmul(of, w.Dc), w.Pi_up)
        restored = groups.restore(rows)
        return restored.sum(dim=1) if groups.k > 1 else restored.squeeze(1)
    latent = (parent[..., None] * c + child).flatten(1)
    if kernel == "dense_masked":
        of = v.new_zeros(len(v), m * c).scatter(1, latent, v.flatten(1)).view(-1, m, c)
        low = torch.einsum("tmc,mcs->tms", of, w.Dc).flatten(1)
        return low @ w.Pi_up.flatten(0, 1)
    chosen = take(w.Dc.flatten(0, 1), Lookup(latent, m * c)).view(*child.shape, s)
    low = (v[..., None] * chosen).sum(dim=2)
    return mix(low.flatten(1), w.Pi_up.flatten(0, 1), Lookup(parent, m).blocks(s))
