"""Children of a hierarchical SAE with the tokens of each parent together.

Tokens that activate a parent lie side by side, so that what they ask of its matrices is one product
of matrices a parent. That pays where many tokens share a parent; where few do, products are small
and many.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable


class Groups:
    """Places (token, i) in the order of the parents that stand there.

    Args:
        parent: Active parents of each token.
        m: Parents of the dictionary.
    """

    def __init__(self, parent: Int64[Tensor, "token k"], m: int) -> None:
        flat = parent.flatten()
        self.k = parent.shape[1]
        self.order = flat.argsort(stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(len(flat), device=flat.device)
        self.sizes: list[int] = flat.bincount(minlength=m).tolist()

    def arrange(self, rows: Float[Tensor, "token k d"]) -> Float[Tensor, "place d"]:
        """Rows of tokens in the order of their parents."""
        return _Permute.apply(rows.flatten(0, 1), self.order, self.place)

    def restore(self, rows: Float[Tensor, "place d"]) -> Float[Tensor, "token k d"]:
        """The way back."""
        return _Permute.apply(rows, self.place, self.order).unflatten(0, (-1, self.k))

    def matmul(
        self, x: Float[Tensor, "place inner"], matrices: Float[Tensor, "parent inner outer"]
    ) -> Float[Tensor, "place outer"]:
        """Each place's row times its parent's matrix."""
        return _Matmul.apply(x, matrices, self)


class _Permute(torch.autograd.Function):
    """rows[order], whose gradient is a look-up too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)  # many times as fast as rows[order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        return grads[0].index_select(0, ctx.inverse), None, None


class _Matmul(torch.autograd.Function):
    """Each parent's rows times its matrix, one parent after another."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, matrices)
        ctx.groups = groups
        out = x.new_empty(len(x), matrices.shape[2])
        sizes = groups.sizes
        for rows, matrix, to in zip(
            x.split(sizes), matrices.unbind(), out.split(sizes), strict=True
        ):
            torch.mm(rows, matrix, out=to)
        return out

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        x, matrices = ctx.saved_tensors
        of_x, of_matrices = torch.empty_like(x), torch.empty_like(matrices)
        sizes = ctx.groups.sizes
        of_rows = grads[0].contiguous().split(sizes)
        for grad, matrix, to in zip(of_rows, matrices.mT.unbind(), of_x.split(sizes), strict=True):
            torch.mm(grad, matrix, out=to)
        for rows, grad, to in zip(x.split(sizes), of_rows, of_matrices.unbind(), strict=True):
            torch.mm(rows.T, grad, out=to)
        return of_x, of_matrices, None
