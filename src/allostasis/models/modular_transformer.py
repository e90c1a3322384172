"""Grokking's model: one layer without norms, with a three-position and an exact short forward."""

import math
from typing import Annotated, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from annotated_types import Gt
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from allostasis.core.spaces import LayerWeights, Weights
from allostasis.models.lens import HookedRootModule, HookPoint
from allostasis.models.modular_loss import pair_losses
from allostasis.models.modular_replicas import TAU, Questions, grid_logits
from allostasis.models.modular_replicas import logits as logits_of_replicas
from allostasis.models.modular_step import (
    PLAIN,
    Matmul,
    Objective,
    PairIndex,
    Parameters,
    StructuredLoss,
    fold,
    initial_parameters,
    logits_of,
)

Engine = Literal["structured", "naive"]


@runtime_checkable
class Pairs(Protocol):
    """What the model asks of a batch of questions 'a op b ='."""

    @property
    def a(self) -> Int64[Tensor, " pair"]:
        """Left operand, 0 to p - 1."""
        ...

    @property
    def b(self) -> Int64[Tensor, " pair"]:
        """Right operand, 0 to p - 1."""
        ...

    @property
    def answer(self) -> Int64[Tensor, " pair"]:
        """The label, 0 to p - 1."""
        ...


class Streams(NamedTuple):
    """The residual stream at '=', between attention and MLP, and after the MLP."""

    resid_mid: Float[Tensor, "pair d_model"]
    resid_post: Float[Tensor, "pair d_model"]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z = HookPoint()


class _MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = _Attention(), _MLP()
        self.hook_resid_pre, self.hook_resid_mid = HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()
        self.hook_resid_post = HookPoint()


class ModularTransformer(HookedRootModule):
    """One-layer causal transformer for [a, b, =], read at '='.

    No norms, no attention biases, ReLU, learned positions, an untied unembedding without bias onto
    p + 1 outputs. Weights start as `modular_step.initial_parameters` draws them.

    `forward` computes all three positions with TransformerLens's hook points. `loss` and `logits`
    take the structured way by default, which computes only what '=' reads and has no hook points.

    Args:
        seed: The run's seed.
        p: The modulus. Tokens 0 to p - 1 are numbers, p is '='.
        d_model: Width of the residual stream.
        n_heads: Heads, each of width d_model / n_heads.
        d_mlp: Neurons.

    Attributes:
        sphere: Whether the final residual and the columns of W_U are normalised, the logits being
            `TAU` times their cosine: amplitude is out of play. May be set.
        uniform_attention: Whether each head reads what it sees with equal weights: routing is out
            of play. May be set.

    Raises:
        ValueError: The heads do not divide d_model.

    Source:
        Nanda et al. (2023), Progress measures for grokking via mechanistic interpretability, ICLR.

    Example:
        >>> model = ModularTransformer(seed=0)
        >>> sum(parameter.numel() for parameter in model.parameters())
        226816
        >>> model(torch.tensor([[3, 4, 113]])).shape
        torch.Size([1, 3, 114])
    """

    normalised_sites: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        seed: int,
        p: Annotated[int, Gt(2)] = 113,
        d_model: Annotated[int, Gt(0)] = 128,
        n_heads: Annotated[int, Gt(0)] = 4,
        d_mlp: Annotated[int, Gt(0)] = 512,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(
                f"d_model={d_model} cannot be shared among n_heads={n_heads} heads evenly; "
                f"make d_model a multiple of n_heads"
            )
        self.p, self.d_model, self.n_heads, self.d_mlp = p, d_model, n_heads, d_mlp
        self.d_head = d_model // n_heads
        self.sphere = self.uniform_attention = False
        drawn = initial_parameters(seed, p=p, d_model=d_model, n_heads=n_heads, d_mlp=d_mlp)
        self.W_E, self.W_pos = nn.Parameter(drawn.W_E), nn.Parameter(drawn.W_pos)
        self.W_Q, self.W_K = nn.Parameter(drawn.W_Q), nn.Parameter(drawn.W_K)
        self.W_V, self.W_O = nn.Parameter(drawn.W_V), nn.Parameter(drawn.W_O)
        self.W_in, self.b_in = nn.Parameter(drawn.W_in), nn.Parameter(drawn.b_in)
        self.W_out, self.b_out = nn.Parameter(drawn.W_out), nn.Parameter(drawn.b_out)
        self.W_U = nn.Parameter(drawn.W_U)

        self._trained_on: tuple[Pairs, PairIndex] | None = None
        self._grid: PairIndex | None = None
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.blocks = nn.ModuleList([_Block()])
        self.setup()

    def forward(self, tokens: Int64[Tensor, "pair 3"]) -> Float[Tensor, "pair 3 d_vocab"]:
        """Logits at every position, computed as TransformerLens does, with its hook points."""
        block = self.blocks[0]
        assert isinstance(block, _Block)
        attn, mlp = block.attn, block.mlp
        embed = self.hook_embed(self.W_E[tokens])
        position = self.hook_pos_embed(self.W_pos.expand_as(embed))
        resid_pre = block.hook_resid_pre(embed + position)

        q = attn.hook_q(torch.einsum("nsd,hdk->nshk", resid_pre, self.W_Q))
        k = attn.hook_k(torch.einsum("nsd,hdk->nshk", resid_pre, self.W_K))
        v = attn.hook_v(torch.einsum("nsd,hdk->nshk", resid_pre, self.W_V))
        scores = torch.einsum("nqhk,nshk->nhqs", q, k) / math.sqrt(self.d_head)
        future = torch.ones(3, 3, dtype=torch.bool, device=scores.device).triu(1)
        scores = attn.hook_attn_scores(scores.masked_fill(future, -torch.inf))
        if self.uniform_attention:
            scores = (scores.masked_fill(future, 0.0) * 0).masked_fill(future, -torch.inf)
        pattern = attn.hook_pattern(scores.softmax(dim=-1))
        z = attn.hook_z(torch.einsum("nhqs,nshk->nqhk", pattern, v))
        attn_out = block.hook_attn_out(torch.einsum("nqhk,hkd->nqd", z, self.W_O))

        resid_mid = block.hook_resid_mid(resid_pre + attn_out)
        pre = mlp.hook_pre(resid_mid @ self.W_in + self.b_in)
        mlp_out = block.hook_mlp_out(mlp.hook_post(pre.relu()) @ self.W_out + self.b_out)
        resid_post = block.hook_resid_post(resid_mid + mlp_out)
        if not self.sphere:
            return resid_post @ self.W_U
        columns = self.W_U / self.W_U.norm(dim=0)
        return TAU * (resid_post / resid_post.norm(dim=-1, keepdim=True)) @ columns

    def streams(self, a: Int64[Tensor, " pair"], b: Int64[Tensor, " pair"]) -> Streams:
        """The residual stream at '=', without computing the other two positions.

        The query at '=' is the same for all pairs, so each head's scores and values are tables of
        p rows for a, p rows for b and one for '='; a pair mixes three rows with three weights.
        """
        numbers, equals = self.W_E[: self.p], self.W_E[self.p] + self.W_pos[2]
        sources = torch.cat((numbers + self.W_pos[0], numbers + self.W_pos[1], equals[None]))
        q = torch.einsum("d,hdk->hk", equals, self.W_Q) / math.sqrt(self.d_head)
        score = sources @ torch.einsum("hdk,hk->dh", self.W_K, q)
        value = torch.einsum("td,hdk->thk", sources, self.W_V)
        read = torch.stack((a, b + self.p, torch.full_like(a, 2 * self.p)))
        pattern = score[read].softmax(dim=0)
        z = (pattern[..., None] * value[read]).sum(dim=0)

        resid_mid = equals + z.flatten(1) @ self.W_O.flatten(0, 1)
        mlp_out = (resid_mid @ self.W_in + self.b_in).relu() @ self.W_out + self.b_out
        return Streams(resid_mid, resid_mid + mlp_out)

    def loss(
        self,
        pairs: Pairs,
        *,
        engine: Engine = "structured",
        matmul: Matmul = "float32",
        objective: Objective = PLAIN,
    ) -> Float64[Tensor, ""]:
        """Mean loss at '=' over all p + 1 outputs, ready for `backward`.

        Args:
            pairs: The batch. The structured engine keeps an index of the last one it was given,
                so its tensors must not change afterwards.
            engine: `structured` computes '=' only; `naive` all positions, through the hook points.
            matmul: How the structured engine's three largest products treat float32 factors:
                as they are, or rounded to bfloat16, with sums in float32 in both cases.
            objective: What a pair's logits cost; cross-entropy in nats if nothing else is said.

        Raises:
            ValueError: A hook is attached, which the structured engine would never call, or
                `matmul` is set for the naive one or for a model that is not plain.
        """
        if matmul != "float32" and (engine == "naive" or not self.is_plain):
            what = "engine=naive" if engine == "naive" else "sphere or uniform_attention"
            raise ValueError(f"matmul={matmul} has no effect with {what}; take matmul=float32")
        if engine == "naive":
            equals = torch.full_like(pairs.a, self.p)
            logits = self(torch.stack((pairs.a, pairs.b, equals), dim=1))[:, -1]
            return _mean_loss(logits, pairs.answer, objective)
        self._refuse_hooks()
        if not torch.is_grad_enabled():
            return _mean_loss(self.logits(pairs), pairs.answer, objective)
        if not self.is_plain:
            fields = (field[None] for field in (pairs.a, pairs.b, pairs.answer))
            questions = Questions.of(*fields, p=self.p, dtype=self.W_E.dtype)
            logits = logits_of_replicas(
                self._as_replica(), questions, sphere=self.sphere, is_uniform=self.uniform_attention
            )
            return _mean_loss(logits[0], pairs.answer, objective)
        if self._trained_on is None or self._trained_on[0] is not pairs:
            self._trained_on = pairs, self._index(pairs.a, pairs.b)
        index, answer = self._trained_on[1], pairs.answer[:, None]
        return StructuredLoss.apply(index, answer, matmul, objective, *self._parameters_in_order())

    @torch.no_grad()
    def logits(self, pairs: Pairs) -> Float[Tensor, "pair d_vocab"]:
        """Logits at '=' by the structured engine, without gradients."""
        if not self.is_plain:
            return self.grid_logits()[pairs.a, pairs.b]
        return self._logits(self._index(pairs.a, pairs.b))

    @torch.no_grad()
    def grid_logits(self) -> Float[Tensor, "p p d_vocab"]:
        """Logits at '=' for every pair, by a and b, without gradients."""
        if not self.is_plain:
            self._refuse_hooks()
            return grid_logits(
                self._as_replica(), sphere=self.sphere, is_uniform=self.uniform_attention
            )[0]
        if self._grid is None or self._grid.sources.device != self.W_E.device:
            numbers = torch.arange(self.p, device=self.W_E.device)
            self._grid = self._index(*torch.cartesian_prod(numbers, numbers).T)
        return self._logits(self._grid).unflatten(0, (self.p, self.p))

    def _logits(self, index: PairIndex) -> Tensor:
        self._refuse_hooks()
        return logits_of(fold(self._parameters_in_order(), index), index)

    @property
    def is_plain(self) -> bool:
        """Whether neither amplitude nor routing is out of play."""
        return not (self.sphere or self.uniform_attention)

    def _as_replica(self) -> Parameters:
        return Parameters(*(tensor[None] for tensor in self._parameters_in_order()))

    def _index(self, a: Tensor, b: Tensor) -> PairIndex:
        return PairIndex(a, b, p=self.p, n_heads=self.n_heads)

    def _parameters_in_order(self) -> Parameters:
        return Parameters(*(getattr(self, name) for name in Parameters._fields))

    def _refuse_hooks(self) -> None:
        hooked = [name for name, point in self.hook_dict.items() if point.has_hooks()]
        if hooked:
            raise ValueError(
                f"hooks at {', '.join(hooked)} would never be called: the structured engine has no "
                f"hook points; take engine=naive, or remove the hooks"
            )

    def weights(self) -> Weights:
        """The parameters themselves, not copies, as metrics see them."""
        return Weights(
            layers=(LayerWeights(W_Q=self.W_Q, W_K=self.W_K, W_V=self.W_V, W_O=self.W_O),),
            W_U=self.W_U,
            final_gain=None,
            named=dict(self.named_parameters()),
            groups={
                "embed": ("W_E", "W_pos"),
                "qk": ("W_Q", "W_K"),
                "ov": ("W_V", "W_O"),
                "mlp": ("W_in", "b_in", "W_out", "b_out"),
                "unembed": ("W_U",),
            },
        )


def _mean_loss(logits: Tensor, answer: Tensor, objective: Objective) -> Float64[Tensor, ""]:
    if objective == PLAIN:
        return cross_entropy(logits, answer)
    return pair_losses(
        logits, answer, loss=objective.loss, temperature=objective.temperature
    ).mean()


def cross_entropy(
    logits: Float[Tensor, "pair d_vocab"], answer: Int64[Tensor, " pair"]
) -> Float64[Tensor, ""]:
    """Mean cross-entropy with the log-softmax in float64, in nats.

    In float32 a confident pair's loss underflows to 0, and with it its gradient.
    """
    return nn.functional.cross_entropy(logits.double(), answer)
