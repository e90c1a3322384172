"""Language models by name: found, loaded, named for what they are, their tokenizers measured."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from allostasis.models import weights
from allostasis.models.blocks import SUPPORTED, Decoder
from allostasis.models.conversion import check_complete, quiet, weights_sha256
from allostasis.models.weights import Source

log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager"]
PrependBos = bool | Literal["auto"]

LARGE = 1_000_000_000
"""Parameters from which on `auto` is bfloat16 on a GPU."""

BOS_BY_CONVENTION = {"gpt2", "gpt_neox", "mistral", "gemma", "gemma2", "gemma3_text"}
"""Model types that are run with a first token, whether or not their tokenizer adds it."""

BOS_OF_LLAMA = {"<s>", "<|begin_of_text|>"}
"""First tokens of Llama's own families; other models of its type follow their tokenizer."""

PROBE = "When Mary and John went to the store at 12:45, John's  dog\n\tgave \u00fcber 300 euros to"
"""A text with most of what tokenizers differ in."""


class LanguageModel(nn.Module):
    """A causal language model that is looked at, never trained, and what is known of it.

    Args:
        hf: The model of `transformers`; it is put in evaluation mode and needs no gradients.
        tokenizer: Its tokenizer.
        title: What a report calls it.
        identity: What tells its results from another model's, for run.json.
        facts: What `tokenizer_facts` measured.
    """

    def __init__(
        self,
        hf: nn.Module,
        tokenizer: Any,
        *,
        title: str,
        identity: dict[str, Any],
        facts: dict[str, Any],
    ) -> None:
        super().__init__()
        self.hf = hf.eval().requires_grad_(False)
        self.tokenizer, self.title, self.identity, self.facts = tokenizer, title, identity, facts
        self.decoder = Decoder(hf)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, after a BOS exactly if `identity["prepend_bos"]`.

        Example:
            >>> from allostasis.models.lens import pretrained
            >>> model = pretrained(arch="gpt2")
            >>> model.tokenizer.convert_ids_to_tokens(model.encode("When Mary"))
            ['<|endoftext|>', 'When', '▁Mary']
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [self.tokenizer.bos_token_id, *ids] if self.identity["prepend_bos"] else ids


@dataclass(frozen=True)
class _Loaded:
    hf: nn.Module
    tokenizer: Any
    weights_sha256: str
    tokenizer_sha256: str
    facts: dict[str, Any]


def load(
    source: Source,
    *,
    name: str,
    dtype: str,
    device: torch.device,
    attn_implementation: Attention,
    prepend_bos: PrependBos,
) -> LanguageModel:
    """Load weights that were found; once a process for each dtype, device and attention.

    Raises:
        ValueError: The architecture is not supported, or there is no BOS to prepend.
    """
    config = check_supported(source.folder)
    attention = attn_implementation
    if attention == "sdpa" and config.get("attn_logit_softcapping") is not None:
        log.warning("%s caps attention scores, which sdpa cannot: it runs with eager", name)
        attention = "eager"
    loaded = _loaded(source, source.fingerprint, dtype, device, attention)
    tokenizer = loaded.tokenizer
    has_bos = _prepends_bos(prepend_bos, config["model_type"], loaded.facts)
    if has_bos and tokenizer.bos_token_id is None:
        raise ValueError(f"model.prepend_bos=true: the tokenizer of {name} has no BOS token")
    short, suffix = name.rpartition("/")[2], ""
    if source.quantisation is not None:
        suffix = f" ({source.quantisation}, dequantised to {dtype})"
    elif dtype != "float32":
        suffix = f" ({dtype})"
    return LanguageModel(
        loaded.hf,
        tokenizer,
        title=f"{short}{suffix}",
        identity={
            "name": name,
            "source": source.kind,
            "revision": source.revision,
            "quantisation": source.quantisation,
            "dtype": dtype,
            "attn_implementation": attention,
            "prepend_bos": has_bos,
            "weights_sha256": loaded.weights_sha256,
            "tokenizer_sha256": loaded.tokenizer_sha256,
            "licence": source.licence,
            "file_sha256": source.file_sha256,
        },
        facts=loaded.facts,
    )


@lru_cache(maxsize=2)
def _loaded(
    source: Source, fingerprint: Any, dtype: str, device: torch.device, attention: Attention
) -> _Loaded:
    del fingerprint  # in the key of the cache: files that change are read again
    from transformers import AutoModelForCausalLM

    with quiet():
        found, info = cast(Any, AutoModelForCausalLM).from_pretrained(
            source.folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=None if source.may_be_pickled else True,
            weights_only=True,
            local_files_only=True,
            output_loading_info=True,
        )
    check_complete(info, source.folder)
    hf: nn.Module = found.eval().requires_grad_(False)
    tokenizer = _tokenizer(source.folder)
    return _Loaded(
        hf=hf.to(device),
        tokenizer=tokenizer,
        weights_sha256=source.weights_sha256 or weights_sha256(hf),
        tokenizer_sha256=_tokenizer_sha256(tokenizer),
        facts=tokenizer_facts(tokenizer),
    )


def check_supported(folder: Path) -> dict[str, Any]:
    """The config of a model that a Decoder can view, known before any weight is read.

    Raises:
        ValueError: No Decoder can view such a model, or its weights are stored quantised.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in SUPPORTED:
        raise ValueError(
            f"{folder} holds a model of type '{config.get('model_type')}', which is not supported; "
            f"supported are {', '.join(sorted(SUPPORTED))}. Another one needs an entry of about 20 "
            f"lines in ARCHITECTURES of allostasis/models/blocks.py."
        )
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise ValueError(
            f"{folder} holds weights quantised by '{method}', which no head's output can be read "
            f"from. Take a checkpoint in full precision, or a GGUF file, which is made dense."
        )
    return config


def _tokenizer(folder: Path) -> Any:
    """The tokenizer that a folder's tokenizer.json describes.

    Some classes of transformers build a tokenizer of their own from its vocabulary; one that reads
    text in another way is not used.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    described = folder / "tokenizer.json"
    if not described.is_file():
        return tokenizer
    ids = Tokenizer.from_file(str(described)).encode(PROBE, add_special_tokens=False).ids
    if tokenizer.encode(PROBE, add_special_tokens=False) == ids:
        return tokenizer
    special = {key: token for key, token in tokenizer.special_tokens_map.items() if token}
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, **special)


def choose_dtype(dtype: Dtype, device: torch.device) -> Callable[[int], str]:
    """What `dtype=` means for a model of so many parameters.

    `auto` is float32, but bfloat16 for more than 10^9 parameters on a GPU.
    """

    def of(n_parameters: int) -> str:
        if dtype != "auto":
            return dtype
        return "bfloat16" if device.type != "cpu" and n_parameters > LARGE else "float32"

    return of


def n_parameters(folder: Path) -> int:
    """Parameters in a folder's safetensors, by their headers; of pickles, as if two bytes each.

    Raises:
        ValueError: A file is cut short.
    """
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not whole, or no safetensors file: {error}") from error
        total += sum(torch.Size(shape).numel() for shape in shapes)
    return total or sum(path.stat().st_size // 2 for path in folder.glob("*.bin"))


def _prepends_bos(asked: PrependBos, model_type: str, facts: dict[str, Any]) -> bool:
    """`auto`: as the model was trained, not as its tokenizer happens to be set."""
    if asked != "auto":
        return asked
    if facts["bos_token_id"] is None:
        return False
    is_llama = model_type == "llama" and facts["bos_token"] in BOS_OF_LLAMA
    return facts["adds_bos"] or model_type in BOS_BY_CONVENTION or is_llama


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does, measured on it.

    Returns:
        `adds_bos`, `adds_eos`: whether it puts them there unasked. `bos_token`, `eos_token`,
        `pad_token` with `_id`; `padding_side`. `word_start`: what marks a word after a space.
        `mary_is_one_token`: whether `" Mary"` is. `adds_space`: whether a text's first word is
        encoded as if a space stood before it. `is_additive`: whether encode(a) + encode(b) is
        encode(a + b) where b starts with a space. `max_digits_per_token`. `n_tokens`.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    full, bare = tokenizer.encode("Mary"), encode("Mary")
    word = tokenizer.convert_ids_to_tokens(encode(" Mary"))
    texts = ("When Mary", " and John", " went to the store,", " John gave a drink to")
    ids = [encode(text) for text in texts]
    whole = [encode("".join(texts[: end + 1])) for end in range(len(texts))]
    digits = [tokenizer.decode([token]) for token in encode("84730296")]
    facts: dict[str, Any] = {"class": type(tokenizer).__name__, "n_tokens": len(tokenizer)}
    for kind in ("bos", "eos", "pad", "unk"):
        facts[f"{kind}_token"] = getattr(tokenizer, f"{kind}_token")
        facts[f"{kind}_token_id"] = getattr(tokenizer, f"{kind}_token_id")
    return facts | {
        "adds_bos": full[:1] == [tokenizer.bos_token_id] != bare[:1],
        "adds_eos": full[-1:] == [tokenizer.eos_token_id] != bare[-1:],
        "padding_side": tokenizer.padding_side,
        "word_start": word[0].removesuffix("Mary") if word[0].endswith("Mary") else None,
        "mary_is_one_token": len(word) == 1,
        "adds_space": bare == encode(" Mary"),
        "is_additive": all(sum(ids[: end + 1], []) == whole[end] for end in range(len(texts))),
        "max_digits_per_token": max(sum(c.isdigit() for c in text) for text in digits),
    }


def _tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of all that a tokenizer is, or of its vocabulary where it cannot be written out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab()))
    return hashlib.sha256(text.encode()).hexdigest()


def find(
    name: str | None, *, source: str | None, revision: str | None, dtype_of: Callable[[int], str]
) -> tuple[Source, str]:
    """Where a model's weights are, and the dtype to load them in; see `weights.find`."""
    found = weights.find(name, source=source, revision=revision, dtype_of=dtype_of)
    check_supported(found.folder)
    return found, dtype_of(n_parameters(found.folder))


def find_tokenizer(
    name: str | None, *, source: str | None = None, revision: str | None = None
) -> tuple[Any, str]:
    """A model's tokenizer alone, and its SHA-256; found where the model would be, see `find`."""
    dtype_of = choose_dtype("auto", torch.device("cpu"))
    found = weights.find(name, source=source, revision=revision, dtype_of=dtype_of)
    tokenizer = _tokenizer(found.folder)
    return tokenizer, _tokenizer_sha256(tokenizer)
