"""One view of any decoder: embed, blocks by halves, final norm, unembed, head writes.

A decoder's own modules are called, with the arguments that the model itself gave them; no attention
is computed anew. What tells architectures apart is which of a block's modules plays which part.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class Parts:
    """Where an architecture keeps the modules of a block and of the model, as attribute paths.

    Attributes:
        blocks: The list of blocks.
        embed: Token embedding.
        final_norm: Norm before the unembedding.
        attn_norm: In a block: norm before attention.
        attn: In a block: attention.
        out: In the attention: the projection that mixes heads back into the stream.
        mlp_norm: In a block: norm before the MLP.
        mlp: In a block: the MLP.
        attn_post_norm: In a block: norm of the attention's output before it is added, if any.
        mlp_post_norm: In a block: norm of the MLP's output before it is added, if any.
        value: In the attention: the projection that makes value vectors.
        fused: How queries, keys and values share that projection: not at all, one behind the other,
            or head by head.
        down: In the MLP: the projection from its neurons back into the stream.
        gain_offset: What a norm's gain has beside its weight: 1 where gain is 1 + w.
    """

    blocks: str
    embed: str
    final_norm: str
    attn_norm: str
    attn: str
    out: str
    mlp_norm: str
    mlp: str = "mlp"
    attn_post_norm: str | None = None
    mlp_post_norm: str | None = None
    value: str = "v_proj"
    fused: Literal["", "stacked", "by_head"] = ""
    down: str = "down_proj"
    gain_offset: float = 0.0


_LLAMA = Parts(
    blocks="model.layers",
    embed="model.embed_tokens",
    final_norm="model.norm",
    attn_norm="input_layernorm",
    attn="self_attn",
    out="o_proj",
    mlp_norm="post_attention_layernorm",
)
_SANDWICH = Parts(
    blocks="model.layers",
    embed="model.embed_tokens",
    final_norm="model.norm",
    attn_norm="input_layernorm",
    attn="self_attn",
    out="o_proj",
    mlp_norm="pre_feedforward_layernorm",
    attn_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    gain_offset=1.0,
)
ARCHITECTURES: Mapping[str, Parts] = {
    "gpt2": Parts(
        blocks="transformer.h",
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        attn_norm="ln_1",
        attn="attn",
        out="c_proj",
        mlp_norm="ln_2",
        value="c_attn",
        fused="stacked",
        down="c_proj",
    ),
    "gpt_neox": Parts(
        blocks="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        attn_norm="input_layernorm",
        attn="attention",
        out="dense",
        mlp_norm="post_attention_layernorm",
        value="query_key_value",
        fused="by_head",
        down="dense_4h_to_h",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": Parts(
        blocks="model.layers",
        embed="model.embed_tokens",
        final_norm="model.norm",
        attn_norm="input_layernorm",
        attn="self_attn",
        out="o_proj",
        mlp_norm="post_attention_layernorm",
        gain_offset=1.0,
    ),
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
}
"""A new architecture is one entry here; nothing else in the package branches on a model's name."""

SUPPORTED = frozenset(ARCHITECTURES)
"""Values of `config.model_type` that a Decoder can view."""


@dataclass(frozen=True)
class Call:
    """With which arguments the model called one layer's attention, beside its input.

    Attributes:
        args: Positional arguments after the input.
        kwargs: Keyword arguments, without the input.
        n_rows: Rows of the batch that the arguments were made for.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    n_rows: int

    def rows(self, index: Int[Tensor, " row"]) -> Call:
        """The arguments of a batch that holds row `index[i]` of this one at i."""
        args = tuple(_take(value, index, self.n_rows) for value in self.args)
        kwargs = {name: _take(value, index, self.n_rows) for name, value in self.kwargs.items()}
        return Call(args, kwargs, len(index))

    @classmethod
    def joined(cls, pieces: Sequence[Call]) -> Call:
        """The arguments of a batch that was called in pieces."""
        first, n_rows = pieces[0], sum(piece.n_rows for piece in pieces)
        every = zip(*(piece.args for piece in pieces), strict=True)
        args = tuple(_join(entries, pieces) for entries in every)
        kwargs = {k: _join([p.kwargs[k] for p in pieces], pieces) for k in first.kwargs}
        return cls(args, kwargs, n_rows)


def _join(values: Sequence[Any], pieces: Sequence[Call]) -> Any:
    first = values[0]
    if isinstance(first, tuple):
        return tuple(_join(entries, pieces) for entries in zip(*values, strict=True))
    has_rows = isinstance(first, Tensor) and first.ndim
    if has_rows and all(v.shape[0] == p.n_rows for v, p in zip(values, pieces, strict=True)):
        return torch.cat([*values])
    return first


def _take(value: Any, index: Tensor, n_rows: int) -> Any:
    """Pick rows of what has one a prompt; what is shared by all rows has one row or none."""
    if isinstance(value, tuple):
        return tuple(_take(entry, index, n_rows) for entry in value)
    if isinstance(value, Tensor) and value.ndim and n_rows > 1 and value.shape[0] == n_rows:
        return value[index]
    return value


STREAMS = ("resid_pre", "z", "attn_out", "attn_write", "mlp_write", "pattern", "value")
"""What a Capture holds of each layer, one row a prompt."""


@dataclass(frozen=True)
class Capture:
    """One forward pass, layer by layer. A write is what is added to the residual stream.

    Attributes:
        resid_pre: The stream before each block, and after the last.
        z: Each layer's heads side by side, before W_O.
        attn_out: The attention's output, before a norm that may follow it.
        attn_write: What the attention adds.
        mlp_write: What the MLP adds.
        pattern: Attention patterns, if they were recorded.
        value: Value vectors, one a query head, if they were recorded.
        calls: With which arguments each attention was called.
    """

    resid_pre: list[Float[Tensor, "row position d_model"]] = field(default_factory=list)
    z: list[Float[Tensor, "row position head d_head"]] = field(default_factory=list)
    attn_out: list[Float[Tensor, "row position d_model"]] = field(default_factory=list)
    attn_write: list[Float[Tensor, "row position d_model"]] = field(default_factory=list)
    mlp_write: list[Float[Tensor, "row position d_model"]] = field(default_factory=list)
    pattern: list[Float[Tensor, "row head query key"]] = field(default_factory=list)
    value: list[Float[Tensor, "row head key d_head"]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def joined(cls, pieces: Sequence[Capture]) -> Capture:
        """Passes over pieces of one batch, as one over the whole."""
        if len(pieces) == 1:
            return pieces[0]
        every = zip(*(piece.calls for piece in pieces), strict=True)
        whole = cls(calls=[Call.joined(calls) for calls in every])
        for name in STREAMS:
            layers = zip(*(getattr(piece, name) for piece in pieces), strict=True)
            getattr(whole, name).extend(torch.cat(layer) for layer in layers)
        return whole

    def only(self, names: Collection[str]) -> Capture:
        """The same without streams that nobody asks for; calls stay."""
        lean = Capture(calls=self.calls)
        for name in names:
            getattr(lean, name).extend(getattr(self, name))
        return lean

    def mixed(self, weights: Float[Tensor, "out row"]) -> Capture:
        """Weighted sums over rows, place by place; they have no calls."""
        blend = Capture()
        for name in STREAMS:
            getattr(blend, name).extend(
                torch.tensordot(weights.to(layer), layer, dims=1) for layer in getattr(self, name)
            )
        return blend


RECORDING = "allostasis_recording"
_recorder: ContextVar[Capture] = ContextVar("recorder")


def _recorded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The model's own eager attention, whose pattern and values are kept."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out, pattern = eager(module, query, key, value, mask, **kwargs)
    found = _recorder.get()
    found.pattern.append(pattern)
    found.value.append(value.repeat_interleave(query.shape[1] // value.shape[1], dim=1))
    return out, pattern


class Decoder:
    """A causal language model of `transformers`, as blocks that can be run one half at a time.

    The residual stream of a block is

        mid  = pre + A(attn(N1(pre))),   post = mid + M(mlp(N2(mid)))

    with A and M the identity but for norms after a sublayer (Gemma 2 and 3), and N2(pre) in place
    of N2(mid) where both halves read the same stream (GPT-NeoX).

    Args:
        model: The model, in evaluation mode. It is called, never changed.

    Raises:
        ValueError: The architecture is none of `SUPPORTED`.
    """

    def __init__(self, model: nn.Module) -> None:
        config = cast(Any, model).config
        if config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"model type '{config.model_type}' is not supported; supported are "
                f"{', '.join(sorted(SUPPORTED))}. Another one needs an entry of about 20 lines in "
                f"ARCHITECTURES of allostasis/models/blocks.py."
            )
        self.model, self.config = cast(Any, model), config
        self.parts = ARCHITECTURES[config.model_type]
        self.blocks = list(model.get_submodule(self.parts.blocks).children())
        self.n_layers: int = config.num_hidden_layers
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_model: int = config.hidden_size
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.n_vocab: int = self.W_U.shape[1]
        self.is_parallel = bool(getattr(config, "use_parallel_residual", False))
        self.has_post_norms = self.parts.attn_post_norm is not None
        self.is_centred = isinstance(self._final_norm, nn.LayerNorm)

    # ------------------------------------------------------------------ facts

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_U.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.W_U.dtype

    @property
    def _final_norm(self) -> Any:
        return self.model.get_submodule(self.parts.final_norm)

    @property
    def _unembed(self) -> Any:
        return self.model.get_output_embeddings()

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:  # noqa: N802
        """The unembedding; column v is token v's."""
        return self._unembed.weight.T

    @property
    def unembed_bias(self) -> Float[Tensor, " vocab"] | None:
        """Bias of the unembedding, where there is one."""
        return self._unembed.bias

    @property
    def final_gain(self) -> Float[Tensor, " d_model"]:
        """Gain of the final norm."""
        return self._final_norm.weight + self.parts.gain_offset

    @property
    def final_bias(self) -> Float[Tensor, " d_model"] | None:
        """Bias of the final norm, where there is one."""
        return getattr(self._final_norm, "bias", None)

    @property
    def final_eps(self) -> float:
        """What the final norm adds to the variance."""
        norm = self._final_norm
        return float(getattr(norm, "variance_epsilon", None) or norm.eps)

    def out_projection(self, layer: int) -> Any:
        """The module that mixes a layer's heads back into the stream; it reads z side by side."""
        return getattr(self._attn(layer), self.parts.out)

    def _attn(self, layer: int) -> Any:
        return getattr(self.blocks[layer], self.parts.attn)

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:  # noqa: N802
        """A layer's output weights, by head; a view of the model's own."""
        out = self.out_projection(layer)
        weight = out.weight.T if isinstance(out, nn.Linear) else out.weight  # Conv1D: [in, out]
        return weight.view(self.n_heads, self.d_head, self.d_model)

    def out_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Bias of the output projection: part of the attention's output, of no head's write."""
        return self.out_projection(layer).bias

    def W_V(self, layer: int) -> Float[Tensor, "head d_model d_head"]:  # noqa: N802
        """A layer's value weights, one a query head: heads of a group have the same."""
        module = self._value(layer)
        weight = module.weight.T if isinstance(module, nn.Linear) else module.weight
        return self._values_of(weight).movedim(-2, 0)

    def value_bias(self, layer: int) -> Float[Tensor, "head d_head"] | None:
        """Bias of a layer's value vectors, one a query head, where there is one."""
        bias = self._value(layer).bias
        return None if bias is None else self._values_of(bias)

    def _value(self, layer: int) -> Any:
        return getattr(self._attn(layer), self.parts.value)

    def _values_of(self, out: Float[Tensor, "*rest output"]) -> Float[Tensor, "*rest head d_head"]:
        """Of what a projection gives, the value vectors, by query head."""
        if self.parts.fused == "by_head":
            return out.unflatten(-1, (self.n_heads, 3, self.d_head))[..., 2, :]
        if self.parts.fused == "stacked":
            out = out.chunk(3, dim=-1)[2]
        by_group = out.unflatten(-1, (-1, self.d_head))
        return by_group.repeat_interleave(self.n_heads // by_group.shape[-2], dim=-2)

    # ------------------------------------------------------------------ running it

    def embed(self, ids: Int[Tensor, "*row"]) -> Float[Tensor, "*row d_model"]:
        """Token embeddings, scaled as the model scales them, without what it adds for position."""
        return self.model.get_input_embeddings()(ids)

    def attn_norm(
        self, layer: int, resid: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "*row d_model"]:
        """The norm through which a layer's attention reads the stream."""
        return getattr(self.blocks[layer], self.parts.attn_norm)(resid)

    def attention(
        self, layer: int, resid: Float[Tensor, "row position d_model"], call: Call
    ) -> Float[Tensor, "row position d_model"]:
        """The attention's output for a stream, before any norm that follows it."""
        normed = self.attn_norm(layer, resid)
        return self._attn(layer)(normed, *call.args, **call.kwargs)[0]

    def attn_write(
        self, layer: int, attn_out: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "*row d_model"]:
        """What an attention's output adds to the stream."""
        norm = self.parts.attn_post_norm
        return attn_out if norm is None else getattr(self.blocks[layer], norm)(attn_out)

    def post_norm_gain(
        self, layer: int, attn_out: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "*row d_model"] | None:
        """By what a norm after attention multiplies its input, feature by feature.

        None where no norm follows. The norm divides by sqrt(mean square + eps), so that at this
        scale it is linear.
        """
        gain = self.attn_post_gain(layer)
        if gain is None:
            return None
        eps = getattr(self.blocks[layer], self.parts.attn_post_norm or "").eps
        mean_square = attn_out.float().square().mean(dim=-1, keepdim=True)
        return gain.float() * (mean_square + eps).rsqrt()

    def attn_post_gain(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """Gain of a norm after attention, without its scale; None where no norm follows."""
        if self.parts.attn_post_norm is None:
            return None
        norm = getattr(self.blocks[layer], self.parts.attn_post_norm)
        return norm.weight + self.parts.gain_offset

    def mlp_write(
        self, layer: int, resid: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "*row d_model"]:
        """What the MLP adds: of `resid_mid`, or of `resid_pre` where `is_parallel`."""
        block, norm = self.blocks[layer], self.parts.mlp_post_norm
        out = getattr(block, self.parts.mlp)(getattr(block, self.parts.mlp_norm)(resid))
        return out if norm is None else getattr(block, norm)(out)

    def mlp_post(
        self, layer: int, resid: Float[Tensor, "*row d_model"]
    ) -> Float[Tensor, "*row neuron"]:
        """Neurons of the MLP that reads this stream: what its last projection reads."""
        block, seen = self.blocks[layer], []

        def down_in(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])

        handle = self._down(layer).register_forward_pre_hook(down_in)
        try:
            getattr(block, self.parts.mlp)(getattr(block, self.parts.mlp_norm)(resid))
        finally:
            handle.remove()
        return seen[0]

    def mlp_write_of(
        self, layer: int, neurons: Float[Tensor, "*row neuron"]
    ) -> Float[Tensor, "*row d_model"]:
        """What the MLP adds where its neurons are these."""
        out, norm = self._down(layer)(neurons), self.parts.mlp_post_norm
        return out if norm is None else getattr(self.blocks[layer], norm)(out)

    def _down(self, layer: int) -> Any:
        return getattr(getattr(self.blocks[layer], self.parts.mlp), self.parts.down)

    def W_down(self, layer: int) -> Float[Tensor, "neuron d_model"]:  # noqa: N802
        """By neuron, what it adds to the MLP's output; a view of the model's own."""
        down = self._down(layer)
        return down.weight.T if isinstance(down, nn.Linear) else down.weight

    def after_attention(
        self,
        layer: int,
        resid: Float[Tensor, "*row d_model"],
        attn_out: Float[Tensor, "*row d_model"],
    ) -> Float[Tensor, "*row d_model"]:
        """The stream after a block, from the stream before it and the attention's output."""
        write = self.attn_write(layer, attn_out)
        if self.is_parallel:
            return self.mlp_write(layer, resid) + write + resid
        mid = write + resid
        return mid + self.mlp_write(layer, mid)

    def final_norm(self, resid: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_model"]:
        """The model's last norm."""
        return self._final_norm(resid)

    def unembed(self, normed: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocab"]:
        """Logits, before a cap that the model may put on them."""
        return self._unembed(normed)

    def head_writes(
        self, layer: int, z: Float[Tensor, "*row head d_head"]
    ) -> Float[Tensor, "*row head d_model"]:
        """What each head contributes to the attention's output, before any norm that follows.

        With the projection's bias they sum to `attn_out`. Where `has_post_norms` the stream gets
        the norm of that sum, and no head a share of its own.
        """
        return torch.einsum("...hk,hkd->...hd", z, self.W_O(layer))

    @torch.no_grad()
    def capture(
        self,
        ids: Int[Tensor, "row position"],
        *,
        attention_mask: Int[Tensor, "row position"]
        | Float[Tensor, "1 1 position position"]
        | None = None,
        position_ids: Int[Tensor, "row position"] | None = None,
    ) -> Capture:
        """Run the model once, as it stands, and keep what a suffix can start from.

        Args:
            ids: Token ids.
            attention_mask: 0 at padding; or, by query and key, what is added to every row's scores;
                None where no row is padded.
            position_ids: None counts from 0 in every row.
        """
        found = Capture()
        with ExitStack() as hooks:
            for layer, block in enumerate(self.blocks):
                hooks.enter_context(self._watching(layer, block, found, len(ids)))
            arguments = {"attention_mask": attention_mask, "position_ids": position_ids}
            given = {name: value for name, value in arguments.items() if value is not None}
            # logits are read at chosen positions only; one is the least that can be asked for
            self.model(ids, use_cache=False, logits_to_keep=1, **given)
        return found

    @contextmanager
    def recording(self, found: Capture) -> Iterator[None]:
        """Write pattern and values of every attention that runs inside to a Capture.

        Attention is then computed by the model's own eager function.
        """
        before = self.config._attn_implementation
        AttentionInterface.register(RECORDING, _recorded_attention)
        AttentionMaskInterface.register(RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        token = _recorder.set(found)
        self.model.set_attn_implementation(RECORDING)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)
            _recorder.reset(token)

    @contextmanager
    def _watching(
        self, layer: int, block: nn.Module, found: Capture, n_rows: int
    ) -> Iterator[None]:
        def attn_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            found.calls.append(Call(args[1:], rest, n_rows))

        def out_in(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.z.append(args[0].unflatten(-1, (self.n_heads, self.d_head)))

        def out_out(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            del args
            found.attn_out.append(output)

        def block_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.resid_pre.append(args[0] if args else kwargs["hidden_states"])

        last_attn = getattr(block, self.parts.attn_post_norm or self.parts.attn)
        last_mlp = getattr(block, self.parts.mlp_post_norm or self.parts.mlp)

        def attn_out(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del args
            found.attn_write.append(output[0] if isinstance(output, tuple) else output)

        def mlp_out(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            del args
            found.mlp_write.append(output)

        def block_out(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            del args
            found.resid_pre.append(output[0] if isinstance(output, tuple) else output)

        handles = [
            block.register_forward_pre_hook(block_in, with_kwargs=True),
            self._attn(layer).register_forward_pre_hook(attn_in, with_kwargs=True),
            self.out_projection(layer).register_forward_pre_hook(out_in),
            self.out_projection(layer).register_forward_hook(out_out),
            last_attn.register_forward_hook(attn_out),
            last_mlp.register_forward_hook(mlp_out),
        ]
        if layer == self.n_layers - 1:
            handles.append(block.register_forward_hook(block_out))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
