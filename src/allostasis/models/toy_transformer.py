"""A small causal transformer with TransformerLens's hook names and its norms where one wants."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from allostasis.core.seeding import derive
from allostasis.core.spaces import LayerWeights, Site, Weights
from allostasis.models.lens import HookedRootModule, HookPoint

Norm = Literal["pre", "post", "rms", "none"]
EPS = 1e-5
POSITIONS = 3.0
"""How much larger W_pos begins than W_E; with 1 and with 8 the control learned more slowly at seed
100 of the interleaved patterns."""


class LayerNorm(nn.Module):
    """LN(x) = (x - mean) / sqrt(var + eps) * w + b."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.hook_normalized = HookPoint()

    def forward(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalise each token; the hook sees it before gain and bias."""
        if self.hook_normalized.has_hooks():
            plain = functional.layer_norm(resid, resid.shape[-1:], eps=EPS)
            return self.hook_normalized(plain) * self.w + self.b
        return functional.layer_norm(resid, resid.shape[-1:], self.w, self.b, EPS)


class RMSNorm(nn.Module):
    """RMS(x) = x / sqrt(mean x^2 + eps) * w."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.hook_normalized = HookPoint()

    def forward(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalise each token; the hook sees it before the gain."""
        if self.hook_normalized.has_hooks():
            plain = functional.rms_norm(resid, resid.shape[-1:], eps=EPS)
            return self.hook_normalized(plain) * self.w
        return functional.rms_norm(resid, resid.shape[-1:], self.w, EPS)


NORMS = {"pre": LayerNorm, "post": LayerNorm, "rms": RMSNorm}


class Attention(nn.Module):
    """Causal attention whose weights have a head axis, so that heads can be frozen alone."""

    def __init__(self, d_model: int, n_heads: int, draw: _Draw, *, causal: bool) -> None:
        super().__init__()
        d_head = d_model // n_heads
        self.W_Q = draw(n_heads, d_model, d_head, fan=d_model)
        self.W_K = draw(n_heads, d_model, d_head, fan=d_model)
        self.W_V = draw(n_heads, d_model, d_head, fan=d_model)
        self.W_O = draw(n_heads, d_head, d_model, fan=d_model)
        self.b_Q, self.b_K, self.b_V = (
            nn.Parameter(torch.zeros(n_heads, d_head)) for _ in range(3)
        )
        self.b_O = nn.Parameter(torch.zeros(d_model))
        self.causal = causal
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z = HookPoint()

    def forward(
        self, normed: Float[Tensor, "sequence position d_model"]
    ) -> Float[Tensor, "sequence position d_model"]:
        """What the heads write, with their shared bias."""
        q, k, v = (
            hook(_project(normed, weight) + bias)
            for hook, weight, bias in (
                (self.hook_q, self.W_Q, self.b_Q),
                (self.hook_k, self.W_K, self.b_K),
                (self.hook_v, self.W_V, self.b_V),
            )
        )
        if self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks():
            z = self._mix(q, k, v)
        else:  # the same in one call that never forms the pattern
            heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
            mixed = functional.scaled_dot_product_attention(*heads, is_causal=self.causal)
            z = mixed.transpose(1, 2)
        return self.hook_z(z).flatten(2) @ self.W_O.flatten(0, 1) + self.b_O

    def _mix(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "sequence position head d"]:
        scores = torch.einsum("bqhk,bshk->bhqs", q, k) / math.sqrt(q.shape[-1])
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        pattern = self.hook_pattern(self.hook_attn_scores(scores).softmax(dim=-1))
        return torch.einsum("bhqs,bshk->bqhk", pattern, v)


def _project(
    normed: Float[Tensor, "sequence position d_model"], weight: Float[Tensor, "head d_model d_head"]
) -> Float[Tensor, "sequence position head d_head"]:
    heads, d_model, _ = weight.shape
    flat = normed @ weight.transpose(0, 1).reshape(d_model, -1)
    return flat.unflatten(-1, (heads, -1))


class MLP(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, d_model: int, d_ff: int, draw: _Draw) -> None:
        super().__init__()
        self.W_in, self.b_in = draw(d_model, d_ff, fan=d_model), nn.Parameter(torch.zeros(d_ff))
        self.W_out, self.b_out = draw(d_ff, d_model, fan=d_ff), nn.Parameter(torch.zeros(d_model))
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, normed: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the neurons write."""
        neurons = self.hook_post(self.hook_pre(normed @ self.W_in + self.b_in).relu())
        return neurons @ self.W_out + self.b_out


class Block(nn.Module):
    """Attention, then MLP, each added to the stream, with norms before, after or nowhere."""

    def __init__(
        self, d_model: int, n_heads: int, d_ff: int, norm: Norm, draw: _Draw, *, causal: bool
    ) -> None:
        super().__init__()
        self.is_post = norm == "post"
        self.attn = Attention(d_model, n_heads, draw, causal=causal)
        self.mlp = MLP(d_model, d_ff, draw)
        self.ln1 = nn.Identity() if norm == "none" else NORMS[norm](d_model)
        self.ln2 = nn.Identity() if norm == "none" else NORMS[norm](d_model)
        self.hook_resid_pre, self.hook_resid_mid = HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()
        self.hook_resid_post = HookPoint()
        if self.is_post:
            self.hook_attn_sum, self.hook_mlp_sum = HookPoint(), HookPoint()

    def forward(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The stream behind the block."""
        resid = self.hook_resid_pre(resid)
        if self.is_post:
            total = self.hook_attn_sum(resid + self.hook_attn_out(self.attn(resid)))
            resid = self.hook_resid_mid(self.ln1(total))
            total = self.hook_mlp_sum(resid + self.hook_mlp_out(self.mlp(resid)))
            return self.hook_resid_post(self.ln2(total))
        resid = self.hook_resid_mid(resid + self.hook_attn_out(self.attn(self.ln1(resid))))
        return self.hook_resid_post(resid + self.hook_mlp_out(self.mlp(self.ln2(resid))))


class _Draw:
    """Draws weights one after another from the seed's `init` randomness: N(0, 1) / sqrt(fan)."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(derive(seed, "init"))

    def __call__(self, *shape: int, fan: int | float) -> nn.Parameter:
        normal = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        return nn.Parameter(normal / math.sqrt(fan))


class ToyTransformer(HookedRootModule):
    """A causal transformer of one or a few layers, read at every position.

    ReLU, learned absolute positions, an untied unembedding without bias. Weights are drawn on the
    CPU from the seed's `init` randomness in float32: N(0, 1) / sqrt(d_model) for W_E, three times
    that for W_pos, N(0, 1) / sqrt(fan in) for the others; biases are zero and gains one.

    Args:
        seed: The run's seed.
        vocab_size: Tokens, read and said.
        seq_len: Longest sequence.
        d_model: Width of the residual stream.
        n_layers: Blocks.
        n_heads: Heads a block, each of width d_model / n_heads.
        d_ff: Neurons a block; null is d_model.
        norm: `pre`: x + f(LN x); `post`: LN(x + f(x)); `rms`: as pre, with RMSNorm; `none`.
        final_norm: Whether a norm stands before the unembedding; null: wherever there are norms.
        causal: Whether a position sees only itself and those before; a model that sees its
            targets is there for tests alone.

    Raises:
        ValueError: The heads do not divide d_model, or a final norm is asked for without norms.

    Source:
        Vaswani et al. (2017), Attention is all you need; hook names: TransformerLens.

    Example:
        >>> model = ToyTransformer(seed=0, vocab_size=64, seq_len=16, d_model=32)
        >>> model(torch.zeros(2, 16, dtype=torch.int64)).shape
        torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        *,
        seed: int,
        vocab_size: Annotated[int, Ge(2)],
        seq_len: Annotated[int, Gt(0)],
        d_model: Annotated[int, Gt(0)] = 128,
        n_layers: Annotated[int, Gt(0)] = 1,
        n_heads: Annotated[int, Gt(0)] = 4,
        d_ff: Annotated[int, Gt(0)] | None = None,
        norm: Norm = "pre",
        final_norm: bool | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(
                f"d_model={d_model} cannot be shared among n_heads={n_heads} heads evenly; "
                f"make d_model a multiple of n_heads"
            )
        if final_norm and norm == "none":
            raise ValueError("final_norm=true needs a kind of norm; norm=none has none")
        self.vocab_size, self.seq_len, self.d_model = vocab_size, seq_len, d_model
        self.n_layers, self.n_heads, self.norm = n_layers, n_heads, norm
        has_final = norm != "none" if final_norm is None else final_norm
        draw = _Draw(seed)
        self.W_E = draw(vocab_size, d_model, fan=d_model)
        self.W_pos = draw(seq_len, d_model, fan=d_model / POSITIONS**2)
        width = d_model if d_ff is None else d_ff
        self.blocks = nn.ModuleList([
            Block(d_model, n_heads, width, norm, draw, causal=causal) for _ in range(n_layers)
        ])
        self.ln_final = NORMS[norm](d_model) if has_final else None
        self.W_U = draw(d_model, vocab_size, fan=d_model)
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.setup()

    def encode(
        self, tokens: Int64[Tensor, "sequence position"]
    ) -> Float[Tensor, "sequence position d_model"]:
        """What the unembedding reads: the stream behind the last block and the final norm.

        Raises:
            ValueError: The sequences are longer than the positions learned.
        """
        n_positions = tokens.shape[1]
        if n_positions > self.seq_len:
            raise ValueError(
                f"sequences of {n_positions} tokens, but the model knows {self.seq_len} positions; "
                "cut them, or set model.seq_len"
            )
        embed = self.hook_embed(functional.embedding(tokens, self.W_E))
        resid = embed + self.hook_pos_embed(self.W_pos[:n_positions].expand_as(embed))
        for block in self.blocks:
            resid = block(resid)
        return resid if self.ln_final is None else self.ln_final(resid)

    def forward(
        self, tokens: Int64[Tensor, "sequence position"]
    ) -> Float[Tensor, "sequence position vocab"]:
        """Logits at every position."""
        return self.encode(tokens) @ self.W_U

    # ------------------------------------------------------------------ sites

    def sites(self) -> dict[str, Site]:
        """Every place in the residual stream, by hook name, with what stands before and after."""
        found: dict[str, Site] = {}
        is_post, ends_in_norm = self.norm == "post", self.ln_final is not None
        for layer in range(self.n_layers):
            is_last = layer == self.n_layers - 1

            def add(part: str, *, before: bool, readers: bool = False, unembed: bool = False,
                    layer: int = layer) -> None:  # fmt: skip
                name = f"blocks.{layer}.hook_{part}"
                found[name] = Site(name, before, readers, unembed)

            add("resid_pre", before=is_post and layer > 0)
            if is_post:
                add("attn_sum", before=False, readers=True)
                add("mlp_sum", before=False, readers=True)
            add("resid_mid", before=is_post)
            add(
                "resid_post",
                before=is_post,
                readers=is_last and ends_in_norm,
                unembed=is_last and not ends_in_norm,
            )
        return found

    @property
    def normalised_sites(self) -> frozenset[str]:
        """Hook points whose value has just left a norm."""
        return frozenset(name for name, site in self.sites().items() if site.norm_before)

    # ------------------------------------------------------------------ weights

    def weights(self) -> Weights:
        """The parameters themselves, not copies, as metrics see them."""
        layers = []
        for block in self.blocks:
            assert isinstance(block, Block)
            attn = block.attn
            before = None if block.is_post else block.ln1
            gain = before.w if isinstance(before, LayerNorm | RMSNorm) else None
            layers.append(LayerWeights(attn.W_Q, attn.W_K, attn.W_V, attn.W_O, gain))
        named: dict[str, Tensor] = dict(self.named_parameters())
        groups = {group: [] for group in ("embed", "qk", "ov", "mlp", "norm", "unembed")}
        for name in named:
            groups[_group(name)].append(name)
        return Weights(
            layers=tuple(layers),
            W_U=self.W_U,
            final_gain=None if self.ln_final is None else self.ln_final.w,
            named=named,
            groups={group: tuple(names) for group, names in groups.items()},
        )


def _group(name: str) -> str:
    last = name.rpartition(".")[2]
    if last in {"W_E", "W_pos"}:
        return "embed"
    if last == "W_U":
        return "unembed"
    if ".attn." in name:
        return "qk" if last[-1] in "QK" else "ov"
    return "mlp" if ".mlp." in name else "norm"
