"""The one door to TransformerLens, and the door that configs come through to a language model."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from allostasis.core import devices
from allostasis.models import tiny, zoo
from allostasis.models.weights import Source
from allostasis.models.zoo import Attention, Dtype, LanguageModel, PrependBos

if TYPE_CHECKING:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["HookPoint", "HookedRootModule", "adding", "bridge", "pretrained", "unembed_input"]

UNEMBED_INPUT = "unembed_input"
"""What the unembedding reads, after the final norm and its weight."""

TRANSFORMER_LENS = {UNEMBED_INPUT: "unembed.hook_in"}
"""TransformerLens's own names of hooks that go by another one here.

Both `TransformerBridge` and `HookedTransformer` have it. Where the norm's weight was folded into
the unembedding, it is another vector than what is read here.
"""

EXACT = 1e-4
"""By how much logits may differ from the unembedding of what was captured, in float32."""


def __getattr__(name: str) -> Any:
    # TransformerLens takes seconds to import, which a run of a language model can do without
    if name in ("HookPoint", "HookedRootModule"):
        from transformer_lens import HookedRootModule
        from transformer_lens.hook_points import HookPoint

        globals().update(HookPoint=HookPoint, HookedRootModule=HookedRootModule)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def pretrained(
    *,
    name: str | None = None,
    source: str | None = None,
    revision: str | None = None,
    dtype: Dtype = "auto",
    device: str = "cpu",
    attn_implementation: Attention = "sdpa",
    prepend_bos: PrependBos = "auto",
    arch: tiny.Arch | None = None,
) -> LanguageModel:
    """A language model by the name it has on the hub, by its folder, or a tiny one.

    Weights are looked for in `source`, the conversion cache, an installed package and the hub, in
    this order. A process that asks twice for the same gets the same weights.

    Args:
        name: `owner/name` on the hub; with a `source`, what reports call it.
        source: A folder with config, safetensors and tokenizer, or a GGUF file.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights; `auto` is float32, but bfloat16 for more than 10^9 parameters on a
            GPU.
        device: `cpu`, `cuda`, `cuda:<index>`, `mps`, or `auto` for the best of them.
        attn_implementation: `sdpa` is faster, `eager` gives attention patterns.
        prepend_bos: Whether prompts begin with the BOS token; `auto` is as the model was trained.
        arch: Of a tiny model with random weights, made on the spot; no name or source then.

    Raises:
        FileNotFoundError: No weights anywhere; says where they were looked for and what to do.
        ValueError: The weights are not what they should be, or the model is not supported.
    """
    place = devices.resolve(device).torch
    dtype_of = zoo.choose_dtype(dtype, place)

    def load(found: Source, called: str, precision: str) -> LanguageModel:
        return zoo.load(
            found,
            name=called,
            dtype=precision,
            device=place,
            attn_implementation=attn_implementation,
            prepend_bos=prepend_bos,
        )

    if arch is not None:
        if name is not None or source is not None:
            raise ValueError(
                "model.arch makes a tiny model; it takes no model.name or model.source"
            )
        with tempfile.TemporaryDirectory() as folder:
            found = tiny.tiny_checkpoint(Path(folder), arch)
            return load(Source(found, "made on the spot"), f"tiny {arch}", dtype_of(0))
    found, precision = zoo.find(name, source=source, revision=revision, dtype_of=dtype_of)
    return load(found, name or Path(source or "").resolve().name.removesuffix(".gguf"), precision)


def bridge(model: LanguageModel) -> TransformerBridge:
    """The model as TransformerLens sees it, with TransformerLens's hook points.

    Nothing is folded or centred. The model itself is left as it is: the bridge has modules of its
    own, over the same weights.
    """
    from transformer_lens.model_bridge import TransformerBridge

    kept = {id(tensor): tensor for tensor in (*model.hf.parameters(), *model.hf.buffers())}
    hf = cast(Any, copy.deepcopy(model.hf, kept))
    tokenizer = copy.deepcopy(model.tokenizer)
    # it would read the tokenizer again from where it lay, only to have it add a BOS
    tokenizer.init_kwargs["add_bos_token"] = True
    return TransformerBridge.boot_transformers(
        model.identity["name"],
        hf_model=hf,
        tokenizer=tokenizer,
        device=model.decoder.device,
        dtype=cast(torch.dtype, model.decoder.dtype),
    )


@torch.no_grad()
def unembed_input(
    model: LanguageModel,
    ids: Int[Tensor, "row position"],
    *,
    attention_mask: Int[Tensor, "row position"] | None = None,
) -> Float[Tensor, "row position d_model"]:
    """What the unembedding reads, in any architecture: logits are W_U^T of it, and a bias.

    Args:
        model: The model.
        ids: Token ids.
        attention_mask: 0 at padding; None where no row is padded.

    Raises:
        RuntimeError: The model's logits are not the unembedding of it, before a cap.
    """
    decoder, seen = model.decoder, []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    handle = decoder.model.get_output_embeddings().register_forward_pre_hook(keep)
    given = {} if attention_mask is None else {"attention_mask": attention_mask}
    try:
        logits = decoder.model(ids, use_cache=False, **given).logits
    finally:
        handle.remove()
    if len(seen) != 1:
        raise RuntimeError(f"the unembedding was called {len(seen)} times in one pass, not once")
    read = seen[0]
    expected = read[0].float() @ decoder.W_U.float()
    if decoder.unembed_bias is not None:
        expected = expected + decoder.unembed_bias.float()
    cap = softcap(model)
    if cap is not None:
        expected = cap * torch.tanh(expected / cap)
    off = float((expected - logits[0].float()).abs().max())
    step = torch.finfo(decoder.dtype).eps / torch.finfo(torch.float32).eps
    allowed = EXACT * step * max(1.0, float(expected.abs().max()) / 10)
    if off > allowed:
        raise RuntimeError(
            f"the logits of {model.title} differ by {off:.1e} from the unembedding of what it "
            f"reads (allowed {allowed:.1e}): something acts between the two that lens.py does not "
            "know"
        )
    return read


def softcap(model: LanguageModel) -> float | None:
    """The value that a model's logits are squeezed below by a tanh, if they are."""
    found = getattr(model.decoder.config, "final_logit_softcapping", None)
    return None if found is None else float(found)


@contextmanager
def adding(
    model: LanguageModel, hook: str, vector: Float[Tensor, "*batch d_model"]
) -> Iterator[None]:
    """Add a vector at a hook, at every position, in all passes inside.

    Args:
        model: The model.
        hook: `unembed_input`, or `blocks.{layer}.hook_resid_post`.
        vector: What is added; a batch of them is broadcast over rows and positions.

    Raises:
        ValueError: There is no such hook.
        RuntimeError: No pass went through it.
    """
    decoder, calls = model.decoder, 0
    shift = vector.to(device=decoder.device, dtype=decoder.dtype)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        return (args[0] + shift, *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal calls
        del args
        calls += 1
        is_tuple = isinstance(output, tuple)
        return (output[0] + shift, *output[1:]) if is_tuple else output + shift

    if hook == UNEMBED_INPUT:
        handle = decoder.model.get_output_embeddings().register_forward_pre_hook(before)
    else:
        handle = decoder.blocks[_layer(hook, decoder.n_layers)].register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise RuntimeError(f"nothing was added at {hook}: no pass of the model went through it")


def _layer(hook: str, n_layers: int) -> int:
    known = {f"blocks.{layer}.hook_resid_post": layer for layer in range(n_layers)}
    if hook not in known:
        raise ValueError(
            f"there is no hook '{hook}' to add at; there are {UNEMBED_INPUT} and "
            f"blocks.0.hook_resid_post to blocks.{n_layers - 1}.hook_resid_post"
        )
    return known[hook]
