"""The structured forward of many models at once: every tensor has a leading axis of replicas.

The same algebra as `modular_step`, as batched products whose gradients autograd takes: a replica's
numbers are tables over the p operands, and a pair's row is looked up in them. No product, sum or
lookup crosses replicas, and no shape depends on a replica's data, so that what a replica computes
depends on neither its slot nor its neighbours.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from allostasis.models.modular_step import LANES, Parameters

TAU = 10.0
"""Scale of the logits of a model on the sphere."""


class Layout:
    """Where each parameter of a model lies in one flat row.

    Args:
        like: Parameters of one model.
    """

    def __init__(self, like: Parameters) -> None:
        self.shapes = [tensor.shape for tensor in like]
        self.sizes = [tensor.numel() for tensor in like]
        self.size = sum(self.sizes)

    def views(self, flat: Float[Tensor, "replica size"]) -> Parameters:
        """The rows as parameters with a leading axis; they share the rows' memory."""
        parts = flat.split(self.sizes, dim=1)
        return Parameters(
            *(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True))
        )

    def flat(self, models: Sequence[Parameters]) -> Float[Tensor, "replica size"]:
        """Models as rows."""
        return torch.stack([torch.cat([tensor.flatten() for tensor in one]) for one in models])


class Questions(NamedTuple):
    """The pairs of each replica, ready to be looked up."""

    a: Int64[Tensor, "replica pair"]
    b: Int64[Tensor, "replica pair"]
    answer: Int64[Tensor, "replica pair"]
    of_a: Float[Tensor, "replica p pair"]
    of_b: Float[Tensor, "replica p pair"]

    @classmethod
    def of(
        cls,
        a: Int64[Tensor, "replica pair"],
        b: Int64[Tensor, "replica pair"],
        answer: Int64[Tensor, "replica pair"],
        *,
        p: int,
        dtype: torch.dtype,
    ) -> "Questions":
        """The pairs, and which of them read each operand."""
        numbers = torch.arange(p, device=a.device)[:, None]
        return cls(
            a, b, answer, (a[:, None] == numbers).to(dtype), (b[:, None] == numbers).to(dtype)
        )


class _LookUp(torch.autograd.Function):
    """Rows of a table; the gradient is summed as a product, in one fixed order on every device."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor, readers: Tensor) -> Tensor:
        ctx.save_for_backward(readers)
        return _rows(table, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (readers,) = ctx.saved_tensors
        return torch.bmm(readers, grads[0].contiguous()), None, None


def _rows(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(1, index[:, :, None].expand(-1, -1, table.shape[2]))


class _Side(NamedTuple):
    """What the operands of one place give to a pair, by number, relative to what '=' gives."""

    value: Float[Tensor, "replica p head_by_d_head"]
    score: Float[Tensor, "replica p head"]


class _Tables(NamedTuple):
    """Both places, and '=' itself."""

    left: _Side
    right: _Side
    equals: Float[Tensor, "replica 1 d_model"]
    value_equals: Float[Tensor, "replica 1 head_by_d_head"]


def _tables(theta: Parameters) -> _Tables:
    n_replicas, n_heads, d_model, d_head = theta.W_V.shape
    equals = theta.W_E[:, -1:] + theta.W_pos[:, 2:]
    query = torch.matmul(equals[:, None], theta.W_Q) / math.sqrt(d_head)  # replica head 1 d_head
    key = torch.matmul(theta.W_K, query.mT)[..., 0].mT  # replica d_model head
    values = theta.W_V.transpose(1, 2).reshape(n_replicas, d_model, n_heads * d_head)
    left, right = (
        _Side(torch.bmm(numbers, values), torch.bmm(numbers, key))
        for numbers in (
            theta.W_E[:, :-1] + (theta.W_pos[:, place, None] - equals) for place in (0, 1)
        )
    )
    return _Tables(left, right, equals, torch.bmm(equals, values))


def _mixed(
    tables: _Tables, left: _Side, right: _Side, *, is_uniform: bool
) -> Float[Tensor, "replica pair head_by_d_head"]:
    """Each head's mix of the three values that a pair reads."""
    scores = torch.stack((left.score, right.score))
    n_replicas, n_pairs, n_heads = left.score.shape
    if is_uniform:
        weights = scores * 0 + 1 / 3  # so that queries and keys have a gradient, of 0
    else:
        weights = torch.cat((scores, torch.zeros_like(scores[:1]))).softmax(dim=0)
    mixed = tables.value_equals.unflatten(2, (n_heads, -1))
    for side, weight in zip((left, right), weights, strict=False):  # that of '=' is what is left
        value = side.value.view(n_replicas, n_pairs, n_heads, -1)
        mixed = torch.addcmul(mixed, value, weight[..., None])
    return mixed.flatten(2)


def logits(
    theta: Parameters, questions: Questions, *, sphere: bool = False, is_uniform: bool = False
) -> Float[Tensor, "replica pair d_vocab"]:
    """Logits at '=' of each replica's pairs.

    Args:
        theta: Parameters with a leading axis of replicas.
        questions: The pairs.
        sphere: Whether the final residual and the columns of W_U are normalised, the logits being
            `TAU` times their cosine.
        is_uniform: Whether each head reads a, b and '=' with weight 1/3 whatever they are.
    """
    tables = _tables(theta)
    left = _Side(*(_LookUp.apply(t, questions.a, questions.of_a) for t in tables.left))
    right = _Side(*(_LookUp.apply(t, questions.b, questions.of_b) for t in tables.right))
    mixed = _mixed(tables, left, right, is_uniform=is_uniform)
    return _read_out(theta, tables, mixed, sphere=sphere)


@torch.no_grad()
def grid_logits(
    theta: Parameters, *, sphere: bool = False, is_uniform: bool = False
) -> Float[Tensor, "replica p p d_vocab"]:
    """Logits at '=' of every pair, by a and b, without gradients."""
    tables, p = _tables(theta), theta.W_E.shape[1] - 1
    left = _Side(*(table.repeat_interleave(p, dim=1) for table in tables.left))
    right = _Side(*(table.repeat(1, p, 1) for table in tables.right))
    mixed = _mixed(tables, left, right, is_uniform=is_uniform)
    return _read_out(theta, tables, mixed, sphere=sphere).unflatten(1, (p, p))


def _read_out(theta: Parameters, tables: _Tables, mixed: Tensor, *, sphere: bool) -> Tensor:
    write, d_vocab = theta.W_O.flatten(1, 2), theta.W_U.shape[2]
    into = torch.bmm(tables.equals, theta.W_in) + theta.b_in[:, None]
    hidden = torch.baddbmm(into, mixed, torch.bmm(write, theta.W_in)).relu_()
    if not sphere:
        # whole vectors a row: a GPU loads rows of 114 numbers one by one
        columns = pad(theta.W_U, (0, -d_vocab % LANES))
        past = torch.bmm(tables.equals + theta.b_out[:, None], columns)
        padded = torch.baddbmm(past, mixed, torch.bmm(write, columns))
        return padded.baddbmm_(hidden, torch.bmm(theta.W_out, columns))[..., :d_vocab]
    resid = torch.baddbmm(tables.equals + theta.b_out[:, None], mixed, write)
    resid = torch.baddbmm(resid, hidden, theta.W_out)
    columns = theta.W_U / theta.W_U.norm(dim=1, keepdim=True)
    return TAU * torch.bmm(resid / resid.norm(dim=2, keepdim=True), columns)
