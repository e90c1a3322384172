"""Tiny models with random weights, written to disk as any other: for tests, benchmarks, a try."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from allostasis.models.conversion import quiet

Arch = Literal[
    "gpt2", "gpt_neox", "llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"
]
ARCHS: tuple[Arch, ...] = get_args(Arch)

NAMES = """
    Adam Alice Amy Anna Brian Charles Claire Daniel David Edward Emily Emma George Helen Henry Jack
    James Jane John Julia Karen Laura Lisa Lucy Mark Mary Michael Paul Peter Rachel Robert Sarah
    Simon Susan Thomas William
"""
PLACES = "airport bank church garden hospital hotel library market museum park school station store"
OBJECTS = "ball basket book bottle card coat cup drink guitar hat key lamp letter map pen ring"
OTHERS = """
    After As In One The Then There When While a about and at came day decided evening found friends
    fun gave give had handed it lot lunch of offered showed talking the to walked went were with
    working , . ? ! : ; ' " - 0 1 2 3 4 5 6 7 8 9
"""
WORDS = tuple(f"{NAMES} {PLACES} {OBJECTS} {OTHERS}".split())
PROBES = """
    France Paris Germany Berlin Italy Rome Spain Madrid Japan Tokyo China Beijing Russia Moscow
    Egypt Cairo Greece Athens Ireland Dublin Poland Warsaw Peru Lima Cuba Havana Sweden Stockholm
    Norway Oslo Portugal Lisbon
    January February March April May June July August September October November December
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen
    hot cold big small tall short fast slow rich poor young old happy sad hard soft dark light full
    empty open closed good bad high low wet dry clean dirty strong weak heavy alive dead narrow wide
    easy sharp dull long late sunny warm
    dog puppy cat kitten cow calf elephant lion cub bear tiger wolf pup seal sheep lamb goat kid hen
    chick bird horse foal donkey panda
    red blue green yellow black white brown orange purple pink
    banana lemon corn grass frog snow milk coal crow blood tomato carrot sky pumpkin
    cows rabbits carrots monkeys bananas bears honey birds seeds dogs bones cats fish lions meat
    horses hay pigs goats leaves mice cheese
    wug dax blick fep zorp mib tove glorp snark quib plim vorn
    door window shop gate water soup tea stove glass bottle bag bus road towel shirt kitchen plate
    car man family town box stone chair room street plant animal tree river bridge bed test question
    game task knife blade rope story house ship train boat child song girl team
    A Adding Each Either Every Everybody First Following How If Imagine It Now Since So Somebody
    Suppose Therefore They This We What You add always are baby be belongs both bought bring brought
    but by call called capital capitals change city colour comes count did do does each eat every
    feed for get gives go goes got government has have if in is know known knows land live means
    must name not novel now on only opposite or own owns people person picks right rule said says
    see sits so something start still strange sum swapped take takes that then there things think
    together took total trip turned up usual usually very was what when where which who without
    word world you after this while
"""
"""Words of the probe corpora: as many as let each of their cells be asked."""

_END = "<|endoftext|>"
_FIRST: dict[Arch, str | None] = {
    "gpt2": _END, "gpt_neox": _END, "llama": "<s>", "mistral": "<s>", "gemma": "<bos>",
    "gemma2": "<bos>", "gemma3_text": "<bos>", "qwen2": None, "qwen3": None,
}  # fmt: skip
_WINDOW = 6  # short enough that layers with and without it see different things


def tiny_checkpoint(
    folder: Path,
    arch: Arch,
    *,
    seed: int = 0,
    n_layers: int = 3,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    d_model: int = 32,
) -> Path:
    """Write config, safetensors and tokenizer of a model with random weights.

    No weight has a value under which a mistake would not show: norms have gains and biases of their
    own, attention is far from uniform, and what is grouped, windowed or capped in an architecture
    is so here.

    Args:
        folder: Made if it is missing.
        arch: A `model_type` of transformers.
        seed: Of the weights.
        n_layers: Blocks.
        n_heads: Query heads.
        n_kv_heads: Key and value heads, where the architecture has such groups.
        d_model: Width of the residual stream.

    Returns:
        The folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = word_tokenizer(arch, words=(*WORDS, *PROBES.split()))
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_model": d_model}
    config = AutoConfig.for_model(
        arch,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_settings(arch, **sizes),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, torch.Generator().manual_seed(seed))
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(arch: Arch, *, words: Sequence[str] = WORDS) -> Any:
    """A tokenizer of whole words, digits and punctuation marks; all else is unknown.

    A word after a space and the same word without are two tokens. The first and last tokens are
    the architecture's own, and added where its published tokenizers add them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    first, last = _FIRST[arch], "</s>" if _FIRST[arch] == "<s>" else _END
    special = tuple(dict.fromkeys(token for token in (first, last, "<pad>", "<unk>") if token))
    each = tuple(dict.fromkeys(words))
    pieces = (*special, *each, *(f"▁{word}" for word in each), "▁")
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace("▁", "never"),
        pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Digits(individual_digits=True),
    ])
    tokenizer.decoder = decoders.Metaspace("▁", "never")
    if first is not None and first != _END:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, pieces.index(first))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=first,
        eos_token=last,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="right",
    )


def _settings(
    arch: Arch, *, n_layers: int, n_heads: int, n_kv_heads: int, d_model: int
) -> dict[str, Any]:
    """An architecture's sizes under the names that its config has for them."""
    if arch == "gpt2":
        return {"n_layer": n_layers, "n_head": n_heads, "n_embd": d_model, "n_positions": 64}
    settings: dict[str, Any] = {
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "hidden_size": d_model,
        "intermediate_size": 3 * d_model,
        "max_position_embeddings": 64,
    }
    if arch == "gpt_neox":
        return settings
    settings["num_key_value_heads"] = n_kv_heads
    if arch == "mistral":
        settings["sliding_window"] = _WINDOW
    if arch in ("gemma", "gemma2", "gemma3_text", "qwen3"):
        settings["head_dim"] = 2 * d_model // n_heads  # not d_model / n_heads, as in these
    if arch in ("gemma2", "gemma3_text"):
        settings["query_pre_attn_scalar"] = 2 * d_model // n_heads
        settings["sliding_window"] = _WINDOW
        kinds = ("sliding_attention", "full_attention")
        settings["layer_types"] = [kinds[layer % 2] for layer in range(n_layers)]
    if arch == "gemma2":
        settings |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0}
    return settings


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight; a matrix has entries of standard deviation 1.5 / sqrt(inputs)."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight += 0.3 * noise  # from 1 for most gains; from 0 for biases and gains 1 + w
        elif id(weight) in embeddings:
            weight.copy_(0.4 * noise)  # logits of a tied unembedding stay within what others have
        else:  # [out, in], but GPT-2's [in, out]
            n_inputs = weight.shape[1 if id(weight) in linear else 0]
            weight.copy_(1.5 * noise / n_inputs**0.5)
