import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from allostasis.models import lens
from allostasis.models.tiny import ARCHS

TEXT = "When Mary and John went to the store, John gave a drink to"


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found = model(torch.tensor([ids, ids[::-1]]))
    return getattr(found, "logits", found)


@pytest.mark.parametrize("arch", ARCHS)
def test_bridge_logits_equal(arch: Any) -> None:
    model = lens.pretrained(arch=arch, attn_implementation="eager")
    ids = model.encode(TEXT)
    # GPT-2's one product for queries, keys and values becomes three, which round in another order
    assert_close(logits(lens.bridge(model), ids), logits(model.hf, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3_text"])
def test_a_bridge_leaves_the_model_and_its_tokenizer_as_they_are(arch: Any) -> None:
    model = lens.pretrained(arch=arch)
    ids = model.encode(TEXT)
    modules = [(name, type(module)) for name, module in model.hf.named_modules()]
    before, special = logits(model.hf, ids), dict(model.tokenizer.special_tokens_map)
    bridge = lens.bridge(model)
    zeroed = {"fwd_hooks": [("blocks.1.attn.hook_z", lambda z, **_: 0 * z)]}
    assert not torch.equal(bridge.run_with_hooks(torch.tensor([ids]), **zeroed)[0], before[0])
    assert [(name, type(module)) for name, module in model.hf.named_modules()] == modules
    assert torch.equal(logits(model.hf, ids), before)
    assert model.tokenizer.special_tokens_map == special
    assert model.encode(TEXT) == ids


def test_a_bridge_has_no_weights_of_its_own() -> None:
    model = lens.pretrained(arch="llama")
    theirs = {p.untyped_storage().data_ptr() for p in lens.bridge(model).parameters() if p.any()}
    assert theirs <= {p.untyped_storage().data_ptr() for p in model.hf.parameters()}


def test_a_head_that_a_bridge_zeroes_is_the_slice_of_z_before_the_output_projection() -> None:
    model = lens.pretrained(arch="llama", attn_implementation="eager")  # 4 heads in 2 groups
    ids = torch.tensor([model.encode(TEXT)])

    def zero(z: torch.Tensor, hook: Any) -> torch.Tensor:
        del hook
        z = z.clone()
        z[:, :, 2] = 0
        return z

    bridged = lens.bridge(model).run_with_hooks(ids, fwd_hooks=[("blocks.1.attn.hook_z", zero)])

    def zero_slice(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        z = args[0].clone()
        z[..., 16:24] = 0
        return (z,)

    projection = model.hf.get_submodule("model.layers.1.self_attn.o_proj")
    handle = projection.register_forward_pre_hook(zero_slice)
    expected = model.hf(ids).logits
    handle.remove()
    assert_close(bridged, expected, rtol=0, atol=1e-5)
    assert (expected - model.hf(ids).logits).abs().max() > 1e-2


def test_a_model_without_a_name_or_a_folder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"give model\.source=<folder> or model\.name=<owner/na"):
        lens.pretrained()


def test_an_architecture_and_a_name_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"model\.arch makes a tiny model"):
        lens.pretrained(arch="gpt2", name="someone/something")


@pytest.mark.slow
def test_a_language_model_is_loaded_without_transformer_lens() -> None:
    code = (
        "import sys; from allostasis.models.lens import pretrained; pretrained(arch='gpt2');"
        "assert 'transformer_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_lens_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'HookedTransformer'"):
        _ = lens.HookedTransformer
