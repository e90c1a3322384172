"""The structured engine: the loss at '=' and every gradient of it, in few large products.

The query at '=' is the same for all pairs, so head h reads source s (a number in the first place,
a number in the second, or '=' itself) with a weight that needs three scores only. From the values
to the ReLU all is linear, and so is the way round the MLP. With the weights of a head summing to 1,

    [pre | skip] of a pair = constant + sum over h and its numbers s of  weight[s, h] table[s, h],
    table[s, h]            = (source[s] - '=') W_V[h] W_O[h] [W_in | W_U],
    logits                 = skip + relu(pre) W_out W_U,

where `pre` enters the neurons and `skip` is the part of the logits that goes past them. A pair's
row is a weighted sum of a few table rows, and of the four products that have one row a pair and
two wide sides, only the last is left. Nothing is approximated; autograd through
`ModularTransformer.streams` and the three-position forward are the oracles of the tests.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, embedding_bag

from allostasis.core.seeding import derive
from allostasis.models.modular_loss import Loss, log_softmax, pair_losses

Matmul = Literal["float32", "bfloat16"]
BLOCK = 1130  # pairs at a time where only logits are wanted: 3 MB of activations
LANES = 16  # table rows are padded to whole vectors of this many float32 numbers


class Objective(NamedTuple):
    """What a pair's logits cost: which loss, and what the logits are divided by first."""

    loss: Loss = "cross_entropy"
    temperature: float = 1.0


PLAIN = Objective()
"""Cross-entropy of the logits as they are."""


class Parameters(NamedTuple):
    """The model's parameters, or their gradients, by name."""

    W_E: Tensor
    W_pos: Tensor
    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    W_in: Tensor
    b_in: Tensor
    W_out: Tensor
    b_out: Tensor
    W_U: Tensor


def initial_parameters(seed: int, *, p: int, d_model: int, n_heads: int, d_mlp: int) -> Parameters:
    """Parameters of a seed, drawn on the CPU from its `init` randomness, in float32.

    In the order W_E, W_pos, W_Q, W_K, W_V, W_O, W_in, W_out, W_U: N(0, 1) / sqrt(d_model), and
    N(0, 1) / sqrt(p + 1) for W_U. Biases are zero.
    """
    generator = torch.Generator().manual_seed(derive(seed, "init"))
    d_head = d_model // n_heads

    def draw(*shape: int, fan: int = d_model) -> Tensor:
        normal = torch.randn(shape, generator=generator, dtype=torch.float32)
        return normal / math.sqrt(fan)

    return Parameters(
        W_E=draw(p + 1, d_model),
        W_pos=draw(3, d_model),
        W_Q=draw(n_heads, d_model, d_head),
        W_K=draw(n_heads, d_model, d_head),
        W_V=draw(n_heads, d_model, d_head),
        W_O=draw(n_heads, d_head, d_model),
        W_in=draw(d_model, d_mlp),
        b_in=torch.zeros(d_mlp),
        W_out=draw(d_mlp, d_model),
        b_out=torch.zeros(d_model),
        W_U=draw(d_model, p + 1, fan=p + 1),
    )


class Scatter:
    """Entries in the order of the rows they are added to, and where each row's begin.

    Args:
        target: For each entry, the row that it is added to.
        n_targets: How many rows there are.
    """

    def __init__(self, target: Int64[Tensor, " entry"], n_targets: int) -> None:
        self.order = target.argsort(stable=True)
        targets = torch.arange(n_targets, device=target.device)
        self.start = torch.searchsorted(target[self.order].contiguous(), targets)


class PairIndex:
    """Which sources and table rows each pair reads, and which pairs each of them serves.

    Sources are the p numbers in the first place, the p in the second, and '='. The table has one
    row a source and head, and below them the constant, once for each a: equal rows, whose gradients
    are then summed in as many shares.
    """

    def __init__(
        self, a: Int64[Tensor, " pair"], b: Int64[Tensor, " pair"], *, p: int, n_heads: int
    ) -> None:
        self.n_sources, self.n_rows = 2 * p + 1, (2 * p + 1) * n_heads + p
        self.sources = torch.stack((a, b + p, torch.full_like(a, 2 * p)))
        self.reads = 2 * n_heads
        heads = torch.arange(n_heads, device=a.device)
        self.read = (self.sources[:2].T[:, :, None] * n_heads + heads).flatten(1)
        self.rows = torch.cat((self.read, (self.n_rows - p + a)[:, None]), dim=1)
        # glibc hands freed memory back to the system, and every step faults its pages in anew (a
        # third of the time), until a block of nearly 32 MiB was freed: from then on it keeps them
        torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")

    @cached_property
    def by_row(self) -> Scatter:
        """Entries of `rows` by the table row that they read."""
        return Scatter(self.rows.flatten(), self.n_rows)

    @cached_property
    def pair_by_row(self) -> Int64[Tensor, " entry"]:
        """The pairs of those entries."""
        return self.by_row.order // (self.reads + 1)

    @cached_property
    def by_source(self) -> Scatter:
        """Entries of the first two rows of `sources` by the source."""
        return Scatter(self.sources[:2].flatten(), self.n_sources)

    @cached_property
    def read_start(self) -> Int64[Tensor, " pair"]:
        """Where each pair's entries of `read` begin."""
        return torch.arange(len(self.read), device=self.read.device) * self.reads

    @cached_property
    def reader(self) -> Int64[Tensor, " entry"]:
        """The pair of each entry of `read`."""
        return torch.arange(len(self.read), device=self.read.device).repeat_interleave(self.reads)


class Folded(NamedTuple):
    """What the forward keeps of the algebra above for the backward."""

    equals: Float[Tensor, " d_model"]
    sources: Float[Tensor, "source d_model"]
    query: Float[Tensor, "head d_head"]
    key: Float[Tensor, "head d_model"]
    value: Float[Tensor, "head source d_head"]
    readers: Float[Tensor, "d_model width"]
    write: Float[Tensor, "head d_head width"]
    pattern: Float[Tensor, "3 pair head"]
    weights: Float[Tensor, "pair read"]
    table: Float[Tensor, "row width"]
    hidden_to_logits: Float[Tensor, "d_mlp d_vocab"]


def fold(theta: Parameters, index: PairIndex) -> Folded:
    """Tables, attention weights and folded matrices of a set of pairs."""
    n_heads, d_head, d_model = theta.W_O.shape
    d_mlp, (_, d_vocab) = len(theta.b_in), theta.W_U.shape
    p, n_pairs = len(theta.W_E) - 1, index.sources.shape[1]
    equals = theta.W_E[p] + theta.W_pos[2]
    numbers = theta.W_E[:p] + (theta.W_pos[:2] - equals)[:, None]
    sources = torch.cat((numbers.flatten(0, 1), equals[None]))

    query = torch.matmul(equals, theta.W_Q) / math.sqrt(d_head)
    key = torch.bmm(theta.W_K, query[:, :, None])[:, :, 0]
    score = sources @ key.T
    score[-1] = 0.0  # scores, like sources, are relative to those of '='
    pattern = embedding(index.sources, score).softmax(dim=0)
    weights = pattern.new_ones(n_pairs, 2 * n_heads + 1)
    weights[:, :-1].view(n_pairs, 2, n_heads).copy_(pattern[:2].transpose(0, 1))

    padding = -(d_mlp + d_vocab) % LANES
    readers = torch.cat((theta.W_in, theta.W_U, equals.new_zeros(d_model, padding)), dim=1)
    value = torch.matmul(sources, theta.W_V)
    write = (theta.W_O.flatten(0, 1) @ readers).view(n_heads, d_head, -1)
    table = equals.new_empty(index.n_rows, readers.shape[1])
    by_source = table[:-p].view(index.n_sources, n_heads, -1)
    torch.bmm(value, write, out=by_source.transpose(0, 1))
    constant = equals @ readers + by_source[-1].sum(dim=0)
    constant[:d_mlp] += theta.b_in
    constant[d_mlp : d_mlp + d_vocab] += theta.b_out @ theta.W_U
    table[-p:] = constant
    return Folded(
        equals, sources, query, key, value, readers, write, pattern, weights, table,
        theta.W_out @ theta.W_U,
    )  # fmt: skip


def forward(folded: Folded, index: PairIndex, matmul: Matmul) -> tuple[Tensor, Tensor, Tensor]:
    """Each pair's row: hidden activations, logits, padding; and the first two as views of it."""
    d_mlp, d_vocab = folded.hidden_to_logits.shape
    rows = embedding_bag(index.rows, folded.table, mode="sum", per_sample_weights=folded.weights)
    hidden, logits = rows[:, :d_mlp].relu_(), rows[:, d_mlp : d_mlp + d_vocab]
    with products_in(matmul):
        torch.addmm(logits, hidden, folded.hidden_to_logits, out=logits)
    return rows, hidden, logits


def logits_of(folded: Folded, index: PairIndex) -> Float[Tensor, "pair d_vocab"]:
    """Each pair's logits alone, in blocks of pairs whose hidden activations stay in the cache."""
    d_mlp, d_vocab = folded.hidden_to_logits.shape
    logits = folded.table.new_empty(len(index.rows), d_vocab)
    for block in range(0, len(logits), BLOCK):
        part = slice(block, block + BLOCK)
        rows = embedding_bag(
            index.rows[part], folded.table, mode="sum", per_sample_weights=folded.weights[part]
        )
        past, hidden = rows[:, d_mlp : d_mlp + d_vocab], rows[:, :d_mlp].relu_()
        torch.addmm(past, hidden, folded.hidden_to_logits, out=logits[part])
    return logits


class StructuredLoss(torch.autograd.Function):
    """Mean loss at '='; the gradients are computed along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        index: PairIndex,
        answer: Int64[Tensor, "pair 1"],
        matmul: Matmul,
        objective: Objective,
        *parameters: Tensor,
    ) -> Float64[Tensor, ""]:
        """The loss; `ctx` takes the gradients of its sum over pairs."""
        theta = Parameters(*parameters)
        folded = fold(theta, index)
        rows, hidden, logits = forward(folded, index, matmul)
        loss, grad_logits = _cost(logits, answer, objective)
        logits.copy_(grad_logits)
        with products_in(matmul):
            grad_hidden_to_logits = (logits.T @ hidden).T
            grad_hidden = logits @ folded.hidden_to_logits.T
        torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=hidden)
        ctx.n_pairs = len(answer)
        ctx.gradients = backward(theta, folded, index, rows, grad_hidden_to_logits)
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradients, scaled by that of the loss."""
        scale = grad_outputs[0] / ctx.n_pairs
        return None, None, None, None, *(gradient * scale for gradient in ctx.gradients)


def backward(
    theta: Parameters,
    folded: Folded,
    index: PairIndex,
    grad_rows: Float[Tensor, "pair width"],
    grad_hidden_to_logits: Float[Tensor, "d_mlp d_vocab"],
) -> Parameters:
    """Gradients of the parameters from those of each pair's row: `fold`, read from its end."""
    n_heads, d_head, _ = theta.W_O.shape
    d_mlp, (_, d_vocab) = len(theta.b_in), theta.W_U.shape
    p, n_pairs = len(theta.W_E) - 1, len(grad_rows)
    weights = folded.weights.flatten().index_select(0, index.by_row.order)
    grad_table = embedding_bag(
        index.pair_by_row, grad_rows, index.by_row.start, mode="sum", per_sample_weights=weights
    )
    grad_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_rows, folded.table, index.read.flatten(), index.read_start, index.reader, 0
    )

    # attention: scores, keys, queries
    flow = folded.pattern[:2] * grad_weights.view(n_pairs, 2, n_heads).transpose(0, 1)
    flow -= folded.pattern[:2] * flow.sum(dim=0)
    grad_score = embedding_bag(
        index.by_source.order, flow.view(-1, n_heads), index.by_source.start, mode="sum"
    )
    grad_key = grad_score.T @ folded.sources
    grad_sources = grad_score @ folded.key
    grad_query = torch.bmm(grad_key[:, None], theta.W_K)[:, 0] / math.sqrt(d_head)
    grad_equals = torch.bmm(theta.W_Q, grad_query[:, :, None]).sum(dim=0)[:, 0]

    # tables: the constant is also what '=' writes, through every head with weight 1
    grad_constant = grad_table[-p:].sum(dim=0)
    grad_by_source = grad_table[:-p].view(index.n_sources, n_heads, -1).transpose(0, 1)
    grad_by_source[:, -1] = grad_constant
    grad_value = torch.bmm(grad_by_source, folded.write.mT)
    grad_write = torch.bmm(folded.value.mT, grad_by_source).flatten(0, 1)
    grad_sources += torch.bmm(grad_value, theta.W_V.mT).sum(dim=0)
    grad_equals += folded.readers @ grad_constant
    grad_readers = torch.addmm(
        torch.outer(folded.equals, grad_constant), theta.W_O.flatten(0, 1).T, grad_write
    )
    grad_direct = grad_constant[d_mlp : d_mlp + d_vocab]
    grad_W_U = torch.addmm(
        grad_readers[:, d_mlp : d_mlp + d_vocab], theta.W_out.T, grad_hidden_to_logits
    )

    # sources: a number's embedding plus its position's, less those of '='
    grad_numbers = grad_sources[:-1].view(2, p, -1)
    grad_places = grad_numbers.sum(dim=1)
    grad_equals += grad_sources[-1] - grad_places.sum(dim=0)
    return Parameters(
        W_E=torch.cat((grad_numbers.sum(dim=0), grad_equals[None])),
        W_pos=torch.cat((grad_places, grad_equals[None])),
        W_Q=folded.equals[:, None] * grad_query[:, None],
        W_K=grad_key[:, :, None] * folded.query[:, None],
        W_V=torch.matmul(folded.sources.T, grad_value),
        W_O=(grad_write @ folded.readers.T).view_as(theta.W_O),
        W_in=grad_readers[:, :d_mlp],
        b_in=grad_constant[:d_mlp],
        W_out=grad_hidden_to_logits @ theta.W_U.T,
        b_out=theta.W_U @ grad_direct,
        W_U=grad_W_U.addr_(theta.b_out, grad_direct),
    )


def _cost(
    logits: Float[Tensor, "pair d_vocab"], answer: Int64[Tensor, "pair 1"], objective: Objective
) -> tuple[Tensor, Tensor]:
    """The mean loss, and the gradient of the sum over pairs with respect to the logits."""
    if objective == PLAIN:
        log_prob = log_softmax(logits)
        loss = -log_prob.gather(1, answer).mean()
        grad_logits = log_prob.exp_()
        grad_logits.scatter_add_(1, answer, grad_logits.new_full((1, 1), -1.0).expand_as(answer))
        return loss, grad_logits
    temperature = None if objective.temperature == 1 else objective.temperature
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        each = pair_losses(leaf, answer[:, 0], loss=objective.loss, temperature=temperature)
        (grad_logits,) = torch.autograd.grad(each.sum(), leaf)
    return each.detach().mean(), grad_logits


@contextmanager
def products_in(matmul: Matmul) -> Iterator[None]:
    """Let float32 products round their factors to bfloat16 inside the block, or not at all."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if matmul == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
