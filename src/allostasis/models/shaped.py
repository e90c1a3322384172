"""Random weights in the shape of a published model: what a speed is measured on without weights."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from allostasis.models.conversion import quiet
from allostasis.models.tiny import word_tokenizer
from allostasis.models.zoo import LanguageModel, tokenizer_facts

Shape = Literal["gpt2-shaped-random", "smollm2-shaped-random"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

_SETTINGS: dict[Shape, tuple[Literal["gpt2", "llama"], dict[str, Any]]] = {
    "gpt2-shaped-random": ("gpt2", {}),  # transformers' defaults are GPT-2 small's
    "smollm2-shaped-random": (
        "llama",
        {
            "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
            "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
            "tie_word_embeddings": True, "max_position_embeddings": 8192,
        },
    ),
}  # fmt: skip


def shaped(shape: Shape, *, device: torch.device | str = "cpu", seed: int = 0) -> LanguageModel:
    """A model whose weights are as transformers draws them; it says nothing, at the usual cost.

    Args:
        shape: Whose sizes.
        device: Where it runs.
        seed: Of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    arch, settings = _SETTINGS[shape]
    tokenizer = word_tokenizer(arch)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(arch, **settings)
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return LanguageModel(
        hf.to(device),
        tokenizer,
        title=shape,
        identity={"name": shape, "prepend_bos": False, "weights_sha256": f"{shape} {seed}"},
        facts=tokenizer_facts(tokenizer),
    )
