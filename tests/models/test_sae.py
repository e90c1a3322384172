"""SAELens: the planted truth, the flat autoencoders, and ours as one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.testing import assert_close

if TYPE_CHECKING:
    from allostasis.models.hsae import HierarchicalSAE

D = 32  # of the tiny models


def trained_a_little(d_model: int = D) -> HierarchicalSAE:
    from allostasis.models.hsae import HierarchicalSAE

    sae = HierarchicalSAE(seed=0, d_model=d_model, m=12, c=3, s=4, k=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
        sae.scale.fill_(2.5)
    return sae


@pytest.mark.parametrize("is_hierarchical", [True, False])
def test_the_planted_hierarchy_is_one(is_hierarchical: bool) -> None:
    from allostasis.models.sae import planted_hierarchy

    truth = planted_hierarchy(seed=0, is_hierarchical=is_hierarchical)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, features = truth.sample_with_features(100_000)
    on = features > 0
    parents, children = on[:, :16], on[:, 16:].view(-1, 16, 4)
    assert_close(x, features @ truth.feature_dict.feature_vectors)
    # binomial: 1.6 million parents, 6.4 million children
    assert parents.float().mean().item() == pytest.approx(0.08, abs=0.001)
    assert children.float().mean().item() == pytest.approx(0.08 * 0.75 / 4, abs=0.0003)
    orphans, siblings = (children.any(-1) & ~parents).any(), (children.sum(-1) > 1).any()
    assert (not orphans and not siblings) == is_hierarchical
    assert_close(features[on].mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert_close(features[on].std(), torch.tensor(0.1), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_exported_form_gives_the_same_codes_in_a_fresh_process(tmp_path: Path) -> None:
    from allostasis.models.sae import export

    sae = trained_a_little()
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    export(sae, tmp_path / "sae", hook_name="blocks.1.hook_resid_post", model_name="tiny")
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys, torch, allostasis.models.sae; from sae_lens import SAE\n"
        "sae = SAE.load_from_disk(sys.argv[1] + '/sae')\n"
        "x = torch.load(sys.argv[1] + '/x.pt')\n"
        "torch.save((sae.encode(x), sae(x), type(sae).__name__), sys.argv[1] + '/y.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    codes, rebuilt, name = torch.load(tmp_path / "y.pt")
    assert name == "HSAE"
    wanted = sae.encode(x).dense()
    assert ((codes > 0) == (wanted > 0)).all()
    assert_close(codes, wanted, rtol=1e-5, atol=1e-5)
    assert_close(rebuilt, sae(x), rtol=1e-5, atol=1e-5)
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["m"], cfg["c"], cfg["k"]) == ("allostasis_hsae", 12, 3, 3)


def test_the_command_line_says_what_a_saved_sae_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from allostasis.models.sae import export, main

    export(trained_a_little(), tmp_path, hook_name="blocks.1.hook_resid_post", model_name="tiny")
    assert main(["load", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == [
        "allostasis_hsae 32 -> 48 latents m=12 c=3 k=3 k_child=1",
        "hook blocks.1.hook_resid_post of tiny",
    ]
    assert main(["load", str(tmp_path / "nowhere")]) == 1
    assert "holds no SAE" in capsys.readouterr().err


def test_it_is_registered_twice_without_complaint_and_refuses_what_breaks_it() -> None:
    from allostasis.models import hsae_sae_lens
    from allostasis.models.hsae_sae_lens import HSAEConfig

    hsae_sae_lens.register()
    exported = hsae_sae_lens.export(trained_a_little(), hook_name="somewhere")
    with pytest.raises(NotImplementedError, match="choose other latents"):
        exported.fold_W_dec_norm()
    with pytest.raises(ValueError, match="hook_name"):
        hsae_sae_lens.export(trained_a_little())
    with pytest.raises(ValueError, match="k_child=4 of c=3 children"):
        HSAEConfig(d_in=8, d_sae=16, m=4, c=3, k=2, k_child=4)


def test_scale_folding_by_the_library_keeps_the_codes() -> None:
    from allostasis.models import hsae_sae_lens

    exported = hsae_sae_lens.export(trained_a_little(), hook_name="somewhere")
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    codes, rebuilt = exported.encode(3.0 * x), exported(3.0 * x) / 3.0
    exported.fold_activation_norm_scaling_factor(3.0)
    assert_close(exported.encode(x), codes, rtol=1e-4, atol=1e-5)
    assert_close(exported(x), rebuilt, rtol=1e-4, atol=1e-5)


def test_saelens_trains_the_flat_form_itself() -> None:
    from allostasis.models.hsae_sae_lens import HSAETraining, HSAETrainingConfig, TrainStepInput

    torch.manual_seed(0)
    sae = HSAETraining(HSAETrainingConfig(d_in=8, d_sae=24, m=6, c=3, k=2))
    x = torch.randn(64, 8)
    optimiser, seen = torch.optim.Adam(sae.parameters(), lr=1e-2), []
    for step in range(60):
        output = sae.training_forward_pass(TrainStepInput(x, {}, None, step, False))
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        seen.append(output.losses["mse_loss"].item())
    assert seen[-1] < 0.5 * seen[0]
    assert set(output.losses) == {"mse_loss", "parents_loss"}


def test_two_children_of_a_parent_are_exported_too(tmp_path: Path) -> None:
    from allostasis.models.hsae import HierarchicalSAE
    from allostasis.models.sae import export, load

    sae = HierarchicalSAE(seed=0, d_model=D, m=12, c=3, s=4, k=3, k_child=2)
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    export(sae, tmp_path, hook_name="blocks.1.hook_resid_post")
    loaded, wanted = load(tmp_path), sae.encode(x).dense()
    assert (wanted[:, 12:].view(-1, 12, 3) > 0).sum(dim=-1).max() == 2
    assert_close(loaded.encode(x), wanted, rtol=1e-5, atol=1e-5)
    assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_flat_autoencoders_are_exported_as_they_were_scored(kind: str, tmp_path: Path) -> None:
    from allostasis.models.sae import FlatSAE, load, planted_hierarchy

    truth = planted_hierarchy(seed=0, n_parents=6, n_children=2, d_model=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = truth.sample(512)
    sae = FlatSAE(kind=kind, seed=0, d_model=16, d_sae=24, k=1.5)  # type: ignore[arg-type]
    sae.start_at(x.mean(0), 4 / x.norm(dim=-1).mean().item())
    optimiser, seen = torch.optim.Adam(sae.parameters(), lr=1e-2), []
    for step in range(150):
        losses, _ = sae.losses(x, None, step)
        optimiser.zero_grad()
        sum(losses.values()).backward()  # type: ignore[union-attr]
        optimiser.step()
        seen.append(losses["mse_loss"].item())
    assert seen[-1] < 0.5 * seen[0]
    sae.export(tmp_path, hook_name="planted")
    before = sae.encode(x).dense()
    loaded = load(tmp_path)
    assert_close(loaded.encode(x), before, rtol=1e-4, atol=1e-4)
    assert_close(loaded(x), sae(x), rtol=1e-4, atol=1e-4)
    assert_close(loaded.W_dec.norm(dim=-1), torch.ones(24), rtol=1e-4, atol=1e-4)
    # exporting changed nothing of what is trained
    assert_close(sae.encode(x).dense(), before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hook", ["unembed_input", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
)
def test_a_language_model_runs_with_it(hook: str, tmp_path: Path) -> None:
    """Every hook that a task can name is one that TransformerLens finds."""
    from allostasis.models import lens
    from allostasis.models.sae import SAETransformerBridge, export, load

    model = lens.pretrained(arch="llama")
    bridge = lens.bridge(model)
    bridge.__class__ = SAETransformerBridge
    bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}
    export(trained_a_little(), tmp_path, hook_name=hook, model_name="tiny")
    sae = load(tmp_path)
    ids = torch.arange(10)[None] + 5
    clean = bridge(ids)
    with_sae = bridge.run_with_saes(ids, saes=[sae])
    assert (with_sae - clean).abs().max() > 1e-3, "an SAE at an unknown hook would change nothing"
    with_error = bridge.run_with_saes(ids, saes=[sae], use_error_term=True)
    assert_close(with_error, clean, rtol=0, atol=1e-4)


def test_what_the_unembedding_reads_has_one_name_in_both_of_transformer_lens_s_models() -> None:
    from sae_lens import HookedSAETransformer  # noqa: TID251  # the other of the two

    from allostasis.models.lens import TRANSFORMER_LENS, UNEMBED_INPUT

    hooked = HookedSAETransformer({
        "n_layers": 1, "d_model": 8, "n_ctx": 6, "d_head": 4, "n_heads": 2, "d_vocab": 11,
        "d_mlp": 16, "act_fn": "silu", "normalization_type": "RMS", "device": "cpu", "seed": 0,
    })  # fmt: skip
    with torch.no_grad():
        hooked.ln_final.w.mul_(torch.linspace(0.5, 2, 8))
    logits, cache = hooked.run_with_cache(torch.arange(6)[None])
    read = cache[TRANSFORMER_LENS[UNEMBED_INPUT]]
    assert_close(read @ hooked.W_U + hooked.b_U, logits)
