"""The one door to TransformerLens, and the door that configs come through to a language model."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from allostasis.core import devices
from allostasis.models import tiny, zoo
from allostasis.models.weights import Source
from allostasis.models.zoo import Attention, Dtype, LanguageModel, PrependBos

if TYPE_CHECKING:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["HookPoint", "HookedRootModule", "bridge", "pretrained"]


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
