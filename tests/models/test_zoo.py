import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from allostasis.core.config import conf_dir, config_hash, register
from allostasis.models import packages, zoo
from allostasis.models.blocks import SUPPORTED
from allostasis.models.conversion import weights_sha256
from allostasis.models.lens import pretrained
from allostasis.models.tiny import ARCHS, tiny_checkpoint
from allostasis.tasks.ioi import IOI

TEXT = "When Mary and John went to the store, John gave a drink to"
Checkpoint = Callable[[str], Path]


def logits(hf: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return hf(torch.tensor([ids, ids[::-1]]), use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHS)
def test_logits_equal_huggingface(checkpoint: Checkpoint, arch: str, attention: Any) -> None:
    folder = checkpoint(arch)
    ours = pretrained(source=str(folder), attn_implementation=attention)
    used = ours.identity["attn_implementation"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=used).eval()
    ids = ours.encode(TEXT)
    assert_close(logits(ours.hf, ids), logits(theirs, ids), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_logits_of_smollm2_equal_huggingface(smollm2: Any, smollm2_gguf: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, attn_implementation="sdpa"
    ).eval()
    ids = smollm2.encode(TEXT)
    ours = logits(smollm2.hf, ids)
    assert_close(ours, logits(theirs, ids), rtol=0, atol=1e-5)
    assert smollm2.tokenizer.decode(ours[0, -1].argmax()) == " Mary"
    assert smollm2.identity["weights_sha256"] == weights_sha256(smollm2.hf)
    assert smollm2.title == "SmolLM2-135M-Instruct (Q4_1, dequantised to float32)"


def test_every_supported_architecture_has_a_tiny_model() -> None:
    assert set(ARCHS) == SUPPORTED


@pytest.mark.parametrize("arch", ARCHS)
def test_a_tiny_model_knows_every_word_of_the_indirect_object_task(arch: Any) -> None:
    model = pretrained(arch=arch)
    prompts = IOI(seed=0, n_examples=40, n_discovery=40).build(model.encode, model.tokenizer)
    ids = {token for prompt in prompts.evaluation for token in prompt.ids}
    assert model.tokenizer.unk_token_id not in ids
    assert len({prompt.io for prompt in prompts.evaluation}) >= 20


@pytest.mark.parametrize("arch", ARCHS)
def test_no_weight_of_a_tiny_model_could_hide_a_mistake(arch: Any) -> None:
    for name, weight in pretrained(arch=arch).hf.named_parameters():
        if name.endswith("bias"):
            assert (weight != 0).all(), name
        elif weight.ndim == 1:
            assert weight.std() > 0.1, name


def test_a_seed_decides_the_weights_of_a_tiny_model(tmp_path: Path) -> None:
    hashes = [
        pretrained(source=str(tiny_checkpoint(tmp_path / str(i), "llama", seed=seed)))
        .identity["weights_sha256"]
        for i, seed in enumerate((0, 0, 1))
    ]  # fmt: skip
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("gpt2", True), ("gpt_neox", True), ("llama", True), ("mistral", True), ("gemma", True),
     ("gemma2", True), ("gemma3_text", True), ("qwen2", False), ("qwen3", False)],
)  # fmt: skip
def test_bos_is_prepended_as_the_architecture_was_trained(arch: Any, expected: bool) -> None:
    model = pretrained(arch=arch)
    ids = model.encode(TEXT)
    assert model.identity["prepend_bos"] is expected
    assert (ids[0] == model.tokenizer.bos_token_id) is expected
    assert model.tokenizer.decode(ids[expected:]) == TEXT


def test_bos_is_in_the_run_identity() -> None:
    without = pretrained(arch="gpt2", prepend_bos=False)
    by_default = pretrained(arch="gpt2")
    assert by_default.encode(TEXT) == [0, *without.encode(TEXT)]
    assert [m.identity["prepend_bos"] for m in (without, by_default)] == [False, True]
    same = {key for key, value in without.identity.items() if value == by_default.identity[key]}
    assert set(without.identity) - same == {"prepend_bos"}
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        words = ["exp=ioi", "model=tiny", "model.prepend_bos="]
        asked = ("auto", "true", "false")
        configs = [compose("config", [*words[:2], words[2] + value]) for value in asked]
    assert len({config_hash(config) for config in configs}) == 3


def test_a_bos_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prepend_bos=true: the tokenizer of tiny qwen2 has no"):
        pretrained(arch="qwen2", prepend_bos=True)


def test_tokenizer_facts_of_smollm2_are_those_of_its_files(smollm2: Any) -> None:
    facts = smollm2.facts
    assert (facts["bos_token"], facts["adds_bos"]) == ("<|im_start|>", False)
    assert not smollm2.identity["prepend_bos"]
    assert (facts["n_tokens"], facts["word_start"]) == (49_152, "Ġ")
    assert facts["mary_is_one_token"]
    assert facts["is_additive"]
    assert not facts["adds_space"]
    assert facts["max_digits_per_token"] == 1


@pytest.mark.parametrize(("arch", "adds_bos"), [("gpt2", False), ("llama", True)])
def test_tokenizer_facts_are_measured(arch: Any, adds_bos: bool) -> None:
    facts = pretrained(arch=arch).facts
    assert facts["adds_bos"] is adds_bos
    assert not facts["adds_eos"]
    assert (facts["pad_token"], facts["padding_side"]) == ("<pad>", "right")
    assert (facts["word_start"], facts["max_digits_per_token"]) == ("▁", 1)


def test_a_tokenizer_reads_text_as_its_file_describes(checkpoint: Checkpoint) -> None:
    # transformers builds Qwen2's tokenizer anew, as pieces of bytes, from any vocabulary
    model = pretrained(source=str(checkpoint("qwen2")))
    ids = model.encode("When Mary")
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["When", "▁Mary"]
    assert model.tokenizer.eos_token == "<|endoftext|>"


def test_weights_hash_is_of_names_shapes_dtypes_and_bytes() -> None:
    def model(**tensors: torch.Tensor) -> torch.nn.Module:
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        return module

    a, b = torch.arange(6.0), torch.ones(2)
    reference = weights_sha256(model(a=a, b=b))
    assert weights_sha256(model(b=b.clone(), a=a.clone())) == reference
    changed = a.clone()
    changed[3] += 2**-20
    others = [
        model(a=changed, b=b), model(a=a.reshape(2, 3), b=b), model(c=a, b=b),
        model(a=a.double(), b=b), model(a=a.to(torch.bfloat16), b=b), model(a=a),
    ]  # fmt: skip
    assert len({reference, *map(weights_sha256, others)}) == 7


def test_the_same_weights_are_loaded_once_until_they_change(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    first, again = pretrained(source=str(folder)), pretrained(source=str(folder), prepend_bos=False)
    assert first.hf is again.hf
    assert pretrained(source=str(folder), dtype="bfloat16").hf is not first.hf
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed = pretrained(source=str(folder))
    assert changed.identity["weights_sha256"] != first.identity["weights_sha256"]


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not whole: 1 of .*layers\.1\.mlp\.up_proj\.weight"):
        pretrained(source=str(folder))


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is not whole"):
        pretrained(source=str(folder))


def test_unlisted_name_loads(tmp_path: Path, checkpoint: Checkpoint) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = tmp_path / "hub" / "models--someone--a-new-model"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(commit)
    (store / "snapshots").mkdir()
    (store / "snapshots" / commit).symlink_to(checkpoint("mistral"))
    model = pretrained(name="someone/a-new-model")
    assert model.title == "a-new-model"
    assert (model.identity["source"], model.identity["revision"]) == ("hub", commit)


def test_unsupported_type_error_text(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    (folder / "model.safetensors").touch()
    with pytest.raises(ValueError, match="mamba") as error:
        pretrained(source=str(folder))
    assert str(error.value) == (
        f"{folder} holds a model of type 'mamba', which is not supported; supported are gemma, "
        "gemma2, gemma3_text, gpt2, gpt_neox, llama, mistral, qwen2, qwen3. Another one needs an "
        "entry of about 20 lines in ARCHITECTURES of allostasis/models/blocks.py."
    )


def test_weights_that_are_stored_quantised_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised by 'gptq'.*or a GGUF file"):
        pretrained(source=str(folder))


def test_scores_that_are_capped_are_never_computed_without_the_cap(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = pretrained(arch="gemma2", attn_implementation="sdpa")
    assert model.identity["attn_implementation"] == "eager"
    assert "tiny gemma2 caps attention scores, which sdpa cannot" in caplog.text


@pytest.mark.parametrize(
    ("asked", "device", "n", "expected"),
    [("auto", "cpu", 7 * 10**9, "float32"), ("auto", "cuda", 7 * 10**9, "bfloat16"),
     ("auto", "cuda", 10**8, "float32"), ("float16", "cpu", 10**8, "float16")],
)  # fmt: skip
def test_dtype_auto_halves_large_models_on_a_gpu_only(
    asked: Any, device: str, n: int, expected: str
) -> None:
    assert zoo.choose_dtype(asked, torch.device(device))(n) == expected


def test_parameters_are_counted_by_headers(checkpoint: Checkpoint) -> None:
    model = pretrained(source=str(checkpoint("qwen3")))
    assert zoo.n_parameters(checkpoint("qwen3")) == sum(p.numel() for p in model.hf.parameters())


def test_loading_from_disk_asks_nobody(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    def refuse(*args: Any, **_: Any) -> None:
        raise AssertionError(f"asked {args}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert pretrained(source=str(checkpoint("gemma"))).identity["source"] == "folder"


CONFIGS = {path.stem: OmegaConf.load(path) for path in (conf_dir() / "model").glob("*.yaml")}
LENS = sorted(k for k, v in CONFIGS.items() if v["_target_"] == "allostasis.models.lens.pretrained")


@pytest.mark.parametrize("model", LENS)
def test_a_model_config_names_what_it_loads_and_leaves_the_rest_to_the_code(model: str) -> None:
    config = CONFIGS[model]
    assert set(config) - {"_target_"} <= {"name", "source", "arch", "device"}
    assert OmegaConf.to_container(config)["device"] == "${device}"
    packaged = packages.PACKAGED.get(config.get("name") or "")
    assert packaged is None or packaged.key == model
