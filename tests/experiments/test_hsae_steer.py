"""Features toggled with the rest of the row kept; steering at equal gain, exact where it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close


@pytest.fixture(scope="module")
def model() -> Any:
    from allostasis.models.lens import pretrained

    return pretrained(arch="llama")


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random hierarchical autoencoder of the tiny model, through SAELens's own folder."""
    from allostasis.models import sae
    from allostasis.models.hsae import HierarchicalSAE

    made = HierarchicalSAE(seed=0, d_model=model.decoder.d_model, m=6, c=3, s=3, k=2)
    folder = tmp_path_factory.mktemp("run") / "sae"
    sae.export(made, folder, hook_name="unembed_input")
    return sae.load(folder)


@pytest.fixture(scope="module")
def prompts(model: Any) -> Any:
    from allostasis.tasks.ioi import IOI

    task = IOI(seed=0, n_examples=12, n_discovery=12, n_reference=8)
    return task.build(model.encode, model.tokenizer)


# ---- features


def test_feature_toggle_identity(model: Any, saved: Any, prompts: Any) -> None:
    from allostasis.experiments.hsae.features import Features
    from allostasis.experiments.hsae.sources import codes_of

    features = Features(model, saved, seed=0)
    read = features.read(prompts.evaluation)
    codes = codes_of(saved, read.resid)
    assert (codes > 0).any()
    for feature in range(codes.shape[1]):
        same = features.set_to(read.resid, codes, feature, codes[:, feature])
        assert_close(same, read.resid, rtol=0, atol=1e-6)
        silent = codes[:, feature] == 0
        for kind in ("double", "parent_only"):
            changed = features.toggled(read.resid, codes, feature, kind)
            assert torch.equal(changed[silent], read.resid[silent])
        gone = features.toggled(read.resid, codes, feature, "zero")
        assert torch.equal(gone[silent], read.resid[silent])  # a silent parent has no child


def test_a_parent_takes_its_child_along_and_parent_only_leaves_it(
    model: Any, saved: Any, prompts: Any
) -> None:
    from allostasis.experiments.hsae.features import Features
    from allostasis.experiments.hsae.sources import codes_of

    features = Features(model, saved, seed=0)
    resid = features.read(prompts.evaluation).resid
    codes = codes_of(saved, resid)
    error = resid - saved.decode(codes).detach()
    for parent in range(6):
        children = slice(6 + 3 * parent, 6 + 3 * parent + 3)
        without = codes.clone()
        without[:, parent] = 0
        alone = features.toggled(resid, codes, parent, "parent_only")
        assert_close(alone, saved.decode(without).detach() + error, rtol=0, atol=1e-4)
        without[:, children] = 0
        both = features.toggled(resid, codes, parent, "zero")
        assert_close(both, saved.decode(without).detach() + error, rtol=0, atol=1e-4)


def test_what_is_read_is_what_the_model_says(model: Any, saved: Any, prompts: Any) -> None:
    from allostasis.experiments.hsae.features import Features

    features = Features(model, saved, seed=0)
    read = features.read(prompts.evaluation)
    ordered = sorted(prompts.evaluation, key=lambda p: len(p.ids))
    for row, prompt in zip(features.logits(read.resid), ordered, strict=True):
        expected = model.hf(torch.tensor([prompt.ids])).logits[0, -1].detach()
        assert_close(row, expected, rtol=0, atol=1e-4)
    # attribution is the change when a latent alone is set to 0, since the readout is linear
    gradient = features.attribution(read)
    impact = features.impact(read, [*range(24)])
    zeroed = impact[
        (impact["metric"] == "logit_diff") & impact["kind"].isin(["zero", "parent_only"])
    ]
    for feature, rows in zeroed.groupby("feature"):
        last = rows.iloc[-1]  # parent_only, where there are children
        if last["n"]:
            expected = -gradient[feature] * len(prompts.evaluation) / last["n"]
            assert last["value"] == pytest.approx(expected, abs=1e-4)
        else:
            assert np.isnan(last["value"])
            assert last["active_fraction"] == 0


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_direct_effects_of_heads_add_up_with_the_rest(arch: Any) -> None:
    """Heads, MLPs, embedding and biases together are the logit difference."""
    from allostasis.experiments.hsae.features import Features
    from allostasis.models.hsae import HierarchicalSAE
    from allostasis.models.lens import pretrained
    from allostasis.tasks.ioi import IOI

    model = pretrained(arch=arch)
    decoder = model.decoder
    hsae = HierarchicalSAE(seed=0, d_model=decoder.d_model, m=4, c=2, s=2, k=1)
    task = IOI(seed=0, n_examples=8, n_discovery=8, n_reference=8)
    prompts = task.build(model.encode, model.tokenizer).evaluation
    features = Features.__new__(Features)
    features.model, features.decoder, features.seed = model, decoder, 0
    features.atoms = hsae.atoms().detach().float()
    features.parent_of = np.full(len(features.atoms), -1)
    alignment, heads = features.alignment(prompts, [0, 5, 11])
    assert len(alignment) == 3 * decoder.n_layers * decoder.n_heads
    assert alignment["share"].between(0, 1 + 1e-6).all()
    zeroed = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        clean = decoder.capture(ids)
        end = clean.resid_pre[-1][:, -1]
        mean = end.mean(dim=1, keepdim=True) if decoder.is_centred else torch.zeros(1, 1)
        scale = ((end - mean).square().mean() + decoder.final_eps).sqrt()
        write = decoder.head_writes(1, clean.z[1])[0, -1, 2].detach()
        if decoder.is_centred:
            write = write - write.mean()
        toward = decoder.W_U[:, prompt.io_id] - decoder.W_U[:, prompt.s_id]
        zeroed.append(float((write * decoder.final_gain / scale) @ toward))
    found = heads.set_index(["layer", "head"])["direct_effect"][1, 2]
    assert found == pytest.approx(np.mean(zeroed), rel=1e-4)


def test_alignment_of_a_random_direction_is_its_null(model: Any, saved: Any, prompts: Any) -> None:
    from allostasis.experiments.hsae.features import Features

    features = Features(model, saved, seed=0)
    generator = torch.Generator().manual_seed(0)
    features.atoms = torch.randn(400, model.decoder.d_model, generator=generator)
    alignment, _ = features.alignment(prompts.evaluation[:2], range(400))
    expected = model.decoder.d_head / model.decoder.d_model
    means = alignment.groupby(["layer", "head"])["share"].mean()
    assert means.to_numpy() == pytest.approx(np.full(len(means), expected), abs=0.03)


# ---- steering


def test_teacher_data_are_disjoint_from_what_trains(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passages at which a teacher steers are none that an autoencoder reads."""
    from allostasis.experiments.hsae.shifts import contexts
    from allostasis.tasks.activations import ActivationDataModule
    from allostasis.tasks.corpora import GLOSSES, documents

    task = ActivationDataModule(seed=0, n_tokens=6000, window=48, folder=str(tmp_path / "cache"))
    task.prepare(model)
    texts = list(documents(GLOSSES))
    trained = {texts[number] for number in task.split("train").ids[:, 0].tolist()}
    assert len(trained) > 20
    read: list[str] = []
    encode = model.encode

    def noted(text: str) -> list[int]:
        read.append(text)
        return encode(text)

    monkeypatch.setattr(model, "encode", noted)
    contexts(model, 40)
    assert len(read) == 40
    assert not trained & set(read)
    held_out = {texts[number] for number in task.split("test").ids[:, 0].tolist()}
    assert not trained & held_out
