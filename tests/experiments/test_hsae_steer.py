"""Features toggled with the rest of the row kept; steering at equal gain, exact where it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def steered(model: Any, write_hsae: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A module that has taken a run whose autoencoder begins with its teacher's vectors."""
    from allostasis.core.records import read_run
    from allostasis.experiments.hsae.steer import HSAESteer
    from allostasis.tasks.activations import ActivationDataModule

    root = tmp_path_factory.mktemp("steer")
    task = ActivationDataModule(seed=0, n_tokens=8000, window=48, folder=str(root / "cache"))
    task.prepare(model)
    trained = root / "outputs" / "hsae_train" / "teacher_init" / "seed=0" / "cpu-bb"
    write_hsae(model, task, trained)
    module = HSAESteer(
        model=model, task=task, reads_of={"hsae_train": "teacher_init"}, gains=[0.1, 50.0],
        n_contexts=6, n_random=2, n_match=4000, n_prompts=8, n_features=6, n_controls=4, n_perm=100,
    )  # fmt: skip
    module.take({"hsae_train": read_run(trained)})
    return module


def test_every_direction_has_the_gain_that_was_asked_for_or_says_why_not(steered: Any) -> None:
    from allostasis.experiments.hsae.clouds import kept_tokens
    from allostasis.experiments.hsae.sources import Sources, chosen_of, concepts_of

    assert steered.prove_effect()["largest_change_of_a_logit"] > 1e-4
    tables = steered.test_step(0, 0)["tables"]
    table = tables["steering"]
    assert set(table["source"]) == {"teacher", "sae", "means", "random"}
    small = table[table["asked"] == 0.1]
    assert small[small["source"] == "teacher"]["reached"].mean() > 0.5
    there = table[table["reached"]]
    assert there["gain"].to_numpy() == pytest.approx(there["asked"].to_numpy(), rel=0.02)
    assert (there["leakage"] >= 0).all()
    missing = table[~table["reached"]]
    assert len(missing[missing["asked"] == 50.0])
    assert (missing["why_not"] != "").all()
    assert missing["leakage"].isna().all()
    # one row again, by the model's own unembedding of the moved rows
    row = small[(small["source"] == "teacher") & small["reached"]].iloc[0]
    chosen = chosen_of(steered.teacher)
    concepts = concepts_of(steered.table, chosen, max_parents=2, max_children=2)
    concept = next(one for one in concepts if one.synset == row["synset"])
    sources = Sources(steered.sae, steered.task, steered.table, steered.teacher, n_match=4000)
    source = next(iter(sources.of(concept, np.random.default_rng(0), 1)))
    kept = torch.from_numpy(kept_tokens(steered.model))
    resid = steered.there.resid
    logits = [
        steered.model.decoder.unembed(one).detach()[:, kept].double().log_softmax(dim=1)
        for one in (resid, resid + row["alpha"] * source.direction.float())
    ]
    targets = torch.isin(kept, torch.from_numpy(concept.targets))
    gain = (logits[1] - logits[0])[:, targets].mean()
    assert float(gain) == pytest.approx(row["gain"], abs=1e-4)
    others = ~torch.isin(kept, torch.from_numpy(concept.members))
    p, q = (one[:, others].exp() for one in logits)
    p, q = p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True)
    assert float((p * (p / q).log()).sum(dim=1).mean()) == pytest.approx(row["leakage"], abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), spread=st.floats(0.1, 30), nats=st.floats(0.01, 4))
def test_gains_leakage_and_doses_are_those_of_the_moved_logits(
    model: Any, steered: Any, seed: int, spread: float, nats: float
) -> None:
    """Shifts knows them from probabilities before; here logits are moved and normalised anew."""
    from allostasis.experiments.hsae.shifts import Shifts
    from allostasis.metrics.steering_leakage import steering_leakage

    drawn = torch.Generator().manual_seed(seed)
    d = model.decoder.d_model
    resid = spread * torch.randn(5, d, generator=drawn)
    there = Shifts(model, steered.teacher.metric, resid, np.arange(40))
    effects = torch.stack([there.effect(torch.randn(d, generator=drawn)) for _ in range(3)])
    effects[0, 0] = effects.abs().max()  # a token to gain, at least at first
    targets, members = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    is_member = torch.zeros(40, dtype=torch.bool).index_fill(0, members, value=True)
    before = there.logits.double()

    def gain(alpha: float) -> Tensor:
        after = before + alpha * effects[:, None].double()
        change = after.log_softmax(dim=2) - before.log_softmax(dim=1)
        return change[:, :, targets].mean(dim=2).T

    for alpha in (0.3, 2.0, 25.0):
        assert_close(there.gains(effects, alpha, targets), gain(alpha), rtol=1e-9, atol=1e-9)
        leaks = steering_leakage(before, before + alpha * effects[0].double(), is_member)
        assert_close(there.leakage(effects[0], alpha, members), leaks, rtol=1e-9, atol=1e-9)
    limit = 20.0
    grid = torch.stack([gain(float(a))[:, 0].mean() for a in np.linspace(0, limit, 2001)])
    doses = there.doses(effects[0], (nats, 0.5), targets, limit)
    for asked, found in zip((nats, 0.5), doses, strict=True):
        if found is None:
            assert float(grid.max()) < asked + 1e-9
        else:
            assert float(gain(found)[:, 0].mean()) == pytest.approx(asked, abs=1e-8)
            assert float(grid[: int(found / limit * 2000) + 1].max()) <= asked + 1e-8


def test_two_contexts_and_one_random_direction_give_no_effect_size_and_all_else(
    steered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steered, "n_contexts", 2)
    monkeypatch.setattr(steered, "n_random", 1)
    tables = steered.test_step(0, 0)["tables"]
    assert tables["steering"]["reached"].any()
    assert tables["steering"]["hedges_g"].isna().all()
    names = set(tables["metrics"]["metric"])
    assert "steering_leakage" in names
    assert "steering_hedges_g" not in names


def test_a_random_direction_is_compared_with_the_other_ones(
    steered: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two draws, each is held against the other: with itself among them it would be nearer."""
    from allostasis.experiments.hsae.sources import Concept, Source

    rng = np.random.default_rng(0)
    d = steered.task.d_model
    draws = [
        Source("random", torch.from_numpy(one / np.linalg.norm(one)), draw=at)
        for at, one in enumerate(rng.standard_normal((2, d)))
    ]
    steered.test_step(0, 0)
    targets = steered.table.ids(10, "test")
    concept = Concept("p10", 10, None, targets, steered.table.ids(10), targets[:0], targets[:0])
    chances = []
    outcomes = steered._outcomes

    def noted(concept: Any, effect: Any, alpha: float, controls: Any, chance: Any) -> Any:
        chances.append((effect, chance))
        return outcomes(concept, effect, alpha, controls, chance)

    monkeypatch.setattr(steered, "_outcomes", noted)
    monkeypatch.setattr(steered, "gains", (0.001,))
    steered._concept(concept, draws)
    assert chances
    for effect, chance in chances:
        (other,) = chance
        assert not torch.equal(other, effect)


def test_a_planted_teacher_is_where_the_autoencoder_begins(steered: Any) -> None:
    """The atom that a parent was planted as is the teacher's own direction."""
    metric = steered.teacher.metric
    directions = metric.to_resid(steered.teacher.parents).values.float()
    atoms = steered.sae.W_dec.detach()[:2]
    cosine = torch.nn.functional.cosine_similarity(directions, atoms)
    assert_close(cosine, torch.ones(2), rtol=0, atol=1e-5)


def test_features_are_listed_whether_or_not_they_are_ever_active(steered: Any) -> None:
    steered.what = "features"
    try:
        tables = steered.test_step(0, 0)["tables"]
    finally:
        steered.what = "steer"
    impact = tables["feature_impact"]
    assert impact["feature"].nunique() == 10
    silent = impact[impact["n"] == 0]
    assert silent["value"].isna().all()
    assert impact[impact["n"] > 0]["value"].notna().all()
    assert impact["q_value"].dropna().between(0, 1).all()
    alignment = tables["feature_head_alignment"]
    assert {"share", "cosine", "direct_effect"} <= set(alignment.columns)


def test_steering_elsewhere_than_at_the_unembedding_is_refused(model: Any, tmp_path: Path) -> None:
    from allostasis.experiments.hsae.steer import HSAESteer
    from allostasis.tasks.activations import ActivationDataModule

    task = ActivationDataModule(seed=0, hook="blocks.1.hook_resid_post", folder=str(tmp_path))
    with pytest.raises(ValueError, match="at unembed_input only"):
        HSAESteer(model=model, task=task, reads_of={"hsae_train": "baseline"})


@pytest.mark.slow
def test_a_run_finds_what_the_phases_before_have_made_and_reports(
    model: Any, write_hsae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra import compose, initialize_config_dir

    from allostasis.core.config import conf_dir, register, run_folder
    from allostasis.core.locate import of_experiment
    from allostasis.core.records import read_run
    from allostasis.report import main
    from allostasis.run import run
    from allostasis.tasks.activations import ActivationDataModule

    monkeypatch.chdir(tmp_path)
    register()
    words = [
        "exp=hsae_steer", "preset=quick", "model=tiny", "threads=1", "device=cpu",
        "task.n_tokens=8000", "+task.window=48", f"+task.folder={tmp_path / 'cache'}",
        "module.n_contexts=6", "module.n_match=4000", "module.n_prompts=8",
        "module.gains=[0.1,1.0]", "module.n_features=6", "module.n_controls=4", "module.n_perm=100",
    ]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfgs = [compose("config", [*words, f"condition={c}"]) for c in ("teacher_init", "features")]
        trained = tmp_path / run_folder(of_experiment(cfgs[0], "hsae_train", "teacher_init"))
        task = ActivationDataModule(
            seed=0, n_tokens=8000, window=48, epochs=9, folder=str(tmp_path / "cache")
        )
        task.prepare(model)
        write_hsae(model, task, trained)
        for cfg in cfgs:
            folder = tmp_path / run_folder(cfg)
            content = run(cfg, folder)
            assert content["status"] == "done"
            assert content["read"]["hsae_train"]["run_id"] == "hsae_train-x"
            assert content["teacher_run"] == "hsae_teacher-causal-0-cpu-aa"
            assert len(read_run(folder).metrics)
    assert main(["outputs/hsae_steer"]) == 0
    text = (tmp_path / "outputs" / "hsae_steer" / "report" / "REPORT.md").read_text(
        encoding="utf-8"
    )
    assert "Steering at equal gain" in text
    assert "H.steer.leakage" in text


@pytest.mark.parametrize(
    ("condition", "own"),
    [
        ("no_teacher", {"start"}),
        ("euclidean", {"teacher", "reads_of"}),
        ("k_parent_x2", {"k"}),
        ("k_child_x2", {"k_child"}),
        ("random_projectors", {"start"}),
    ],
)
def test_an_ablation_reads_an_arm_that_differs_in_one_thing(condition: str, own: set[str]) -> None:
    from hydra import compose, initialize_config_dir

    from allostasis.core.config import conf_dir, register
    from allostasis.core.locate import of_experiment

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfgs = [compose("config", ["exp=hsae_steer", f"condition={c}"])
                for c in ("teacher_init", condition)]  # fmt: skip
        taught, ablated = (
            of_experiment(cfg, "hsae_train", cfg.module.reads_of.hsae_train).module for cfg in cfgs
        )
    assert taught.keys() == ablated.keys()
    assert {name for name in taught if taught[name] != ablated[name]} == own
    assert (taught.k, taught.k_child) == (1, 1)
    assert ablated.k * ablated.k_child == 1 + (condition in ("k_parent_x2", "k_child_x2"))


@pytest.mark.parametrize("preset", ["quick", "full", "h100", "v2_text"])
def test_steering_reads_the_activations_that_were_trained_on(preset: str) -> None:
    from hydra import compose, initialize_config_dir

    from allostasis.core.config import conf_dir, register

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        tasks = [
            compose("config", [f"exp={exp}", f"preset={preset}"]).task
            for exp in ("hsae_train", "hsae_steer")
        ]
    assert tasks[0] == tasks[1]


@pytest.mark.parametrize(
    "preset",
    [
        "h100",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("quick", "full", "full_cpu", "v2_text")
        ),
    ],
)
def test_each_phase_looks_where_the_command_of_the_one_before_writes(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of the three commands as a user types them, against those that are looked at."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import setup_globals

    from allostasis.core.config import conf_dir, register, run_folder
    from allostasis.core.locate import of_experiment, sibling

    register()
    setup_globals()
    known = HydraConfig.instance()

    def typed(exp: str, condition: str, *words: str) -> Any:
        """The config of `python -m allostasis +exp=... condition=... preset=... ...`."""
        given = [f"exp={exp}", f"condition={condition}", f"preset={preset}", "seed=3", *words]
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            cfg = compose("config", given, return_hydra_config=True)
        monkeypatch.setattr(known, "cfg", cfg)  # as Hydra's main does: what is read asks for it
        return cfg

    rows = "task.corpus=some/texts"  # of the activations alone: a table of nouns has no corpus
    for arm in ("euclidean", "topk"):
        steer = typed("hsae_steer", arm, rows)
        reads = steer.module.reads_of.hsae_train
        found = of_experiment(steer, "hsae_train", reads)
        train = typed("hsae_train", reads, rows)
        assert run_folder(found) == run_folder(train)
        teacher = train.module.reads_of.hsae_teacher
        for reader in (train, found):
            taught = of_experiment(reader, "hsae_teacher", teacher)
            assert run_folder(taught) == run_folder(typed("hsae_teacher", teacher))
        for other in train.module.reads:
            assert run_folder(sibling(train, other)) == run_folder(typed("hsae_train", other, rows))


def test_full_cpu_is_full_with_a_teacher_that_is_tested_as_in_quick() -> None:
    from hydra import compose, initialize_config_dir

    from allostasis.core.config import conf_dir, register

    register()
    arms = {"hsae_teacher": "causal", "hsae_train": "baseline", "hsae_steer": "teacher_init"}
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        for exp, condition in arms.items():
            found = {
                preset: compose(
                    "config", [f"exp={exp}", f"condition={condition}", f"preset={preset}"]
                )
                for preset in ("full", "full_cpu", "quick")
            }
            like = "quick" if exp == "hsae_teacher" else "full"
            assert found["full_cpu"].module == found[like].module
            assert found["full_cpu"].task == found[like].task
            assert found["full_cpu"].gates


def test_settings_of_activations_are_for_the_phases_that_have_them() -> None:
    """`make hsae ARGS="task.corpus=..."` would be refused by the phase whose task is nouns."""
    import subprocess

    root, given = Path(__file__).parents[2], "preset=h100 task.corpus=some/texts seed=0"
    done = subprocess.run(
        ["make", "-n", "hsae", f"ARGS={given}"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    said = [line.split("-m allostasis ")[1] for line in done.stdout.splitlines() if "+exp=" in line]
    assert said == [
        "+exp=hsae_teacher -m preset=h100 seed=0",
        f"+exp=hsae_train -m {given}",
        f"+exp=hsae_steer -m {given}",
    ]
