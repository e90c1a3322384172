"""Training of autoencoders: stages, what they hold fixed, what they refuse, and going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

CONF = Path(__file__).parents[2] / "conf"
PLANTED = [
    "task=planted_hierarchy", "model=planted_hierarchy", "module.reads_of=null", "threads=1",
    "device=cpu", "preset=quick", "module.max_steps=40", "module.stage_a.steps=20",
    "module.eval_every=10", "module.log_grad_every=10", "module.n_watch=128",
    "module.n_match=512", "module.n_test=512", "metrics.checkpoint_every=10",
    "module.evaluate_at=[20]", "module.dead_after_tokens=1500",
]  # fmt: skip


def composed(*words: str) -> DictConfig:
    from allostasis.core.config import register

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", ["exp=hsae_train", *words])


def run(folder: Path, *words: str) -> dict[str, Any]:
    from allostasis.run import run as do

    return do(composed(*PLANTED, *words), folder)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{step}.safetensors")


def test_what_stage_a_freezes_keeps_its_bits(tmp_path: Path) -> None:
    run(tmp_path, "condition=teacher_init")
    begin, after_a, end = (weights(tmp_path, step) for step in (0, 20, 40))
    moved = {name for name, tensor in begin.items() if not torch.equal(tensor, after_a[name])}
    assert moved == {"E", "b_E", "b", "Pi_down", "Pi_up", "Ec", "bc", "Dc"}
    assert not torch.equal(after_a["D"], end["D"])
    content = json.loads((tmp_path / "run.json").read_text())
    assert {"A.causal_ortho", "A.mse", "B.mse"} <= content["effect"].keys()
    assert content["effect"]["A.causal_ortho"] > 0
    assert (tmp_path / "sae" / "cfg.json").is_file()


def test_a_stage_with_a_loss_that_moves_nothing_is_refused(tmp_path: Path) -> None:
    from allostasis.models.hsae_losses import ConfigError

    literal = ["condition=teacher_init", "module.stage_a.freeze=[D,Pi_up,Dc]"]
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "refused", *literal)
    assert str(refused.value) == (
        "stage A enables 'causal' but no trainable parameter receives its gradient (frozen: D, "
        "Pi_up, Dc); set stage_a.causal_ortho=0 or unfreeze Pi_up or Dc"
    )


@pytest.mark.parametrize("condition", ["shuffled_teacher", "euclidean_teacher"])
def test_a_teacher_that_would_be_another_arms_is_refused(condition: str, tmp_path: Path) -> None:
    from hydra.errors import InstantiationException

    with pytest.raises((ValueError, InstantiationException), match="would be teacher_init"):
        run(tmp_path / "refused", f"condition={condition}")


@pytest.mark.slow
def test_the_literal_stage_a_runs_without_the_loss_that_it_could_not_follow(tmp_path: Path) -> None:
    literal = ["condition=teacher_init", "module.stage_a.freeze=[D,Pi_up,Dc]"]
    folder = tmp_path / "literal"
    run(folder, *literal, "module.stage_a.causal_ortho=0")
    begin, after_a = weights(folder, 0), weights(folder, 20)
    for name in ("D", "Pi_up", "Dc"):
        assert torch.equal(begin[name], after_a[name]), name


def same_after_a_cut(
    root: Path, patching: pytest.MonkeyPatch, cut: int, condition: str, *words: str
) -> Path:
    """See that a run that was cut short ends, bit by bit, as one that was not; its folder."""
    import pyarrow.parquet as pq

    from allostasis.experiments.hsae.train import HsaeTrain

    whole, parts = root / f"{condition}-whole", root / f"{condition}-parts"
    words = (f"condition={condition}", *words)
    run(whole, *words)
    update: Callable[..., torch.Tensor] = HsaeTrain._update

    def cut_short(module: HsaeTrain, *rest: Any) -> torch.Tensor:
        if module.updates == cut:
            raise RuntimeError("cut")
        return update(module, *rest)

    with patching.context() as patch:
        patch.setattr(HsaeTrain, "_update", cut_short)
        with pytest.raises(RuntimeError, match="cut"):
            run(parts, *words)
    run(parts, *words)
    for name in ("metrics", "training", "examples", "matches"):
        ours, theirs = (pq.read_table(folder / f"{name}.parquet") for folder in (parts, whole))
        assert ours.equals(theirs), name
    for step in (20, 40):
        ours, theirs = weights(parts, step), weights(whole, step)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    return parts


@pytest.mark.slow
@pytest.mark.parametrize("cut", [7, 20, 33], ids=["in A", "between A and B", "in B"])
def test_a_run_that_was_cut_short_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    same_after_a_cut(tmp_path, monkeypatch, cut, "teacher_init")


@pytest.fixture(scope="module")
def beside_a_baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which flat arms share the arm that they read."""
    return tmp_path_factory.mktemp("flat")


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["topk", "batchtopk", "matryoshka"])
def test_a_flat_run_that_was_cut_short_ends_as_one_that_was_not(
    beside_a_baseline: Path, monkeypatch: pytest.MonkeyPatch, condition: str
) -> None:
    # latents are dead after two batches in which they were silent, so that the loss for them is on
    words = (condition, "task.batch_size=32", "module.dead_after_tokens=40")
    folder = same_after_a_cut(beside_a_baseline, monkeypatch, 27, *words)
    curves = pd.read_parquet(folder / "training.parquet")
    of_dead = curves[curves["name"] == "auxiliary_reconstruction_loss"]
    assert (of_dead.loc[of_dead["step"] > 20, "value"] > 0).any()


@pytest.mark.slow
def test_ablations_differ_from_the_taught_arm_in_one_thing(tmp_path: Path) -> None:
    words = ["module.max_steps=10", "module.stage_a.steps=10", "module.evaluate_at=[]"]
    arms = ("baseline", "teacher_init", "random_projectors", "k_parent_x2", "k_child_x2")
    for condition in arms:
        run(tmp_path / condition, f"condition={condition}", *words)
    begin = {condition: weights(tmp_path / condition, 0) for condition in arms}
    taught, drawn, mixed = (begin[name] for name in ("teacher_init", "baseline", arms[2]))
    for name in ("D", "E"):
        assert torch.equal(mixed[name], taught[name])
        assert not torch.equal(mixed[name], drawn[name])
    for name in ("Pi_up", "Pi_down"):
        assert torch.equal(mixed[name], drawn[name])
        assert not torch.equal(mixed[name], taught[name])
    assert not torch.equal(mixed["Dc"], drawn["Dc"])  # children as far as subspaces hold them
    for name in ("k_parent_x2", "k_child_x2"):
        assert all(torch.equal(tensor, taught[key]) for key, tensor in begin[name].items())
    l0 = {name: json.loads((tmp_path / name / "run.json").read_text())["summary"]["l0"]
          for name in arms}  # fmt: skip
    assert l0["k_parent_x2"] > 1.5 * l0["teacher_init"]
    assert 1.1 * l0["teacher_init"] < l0["k_child_x2"] <= 1.5 * l0["teacher_init"]
    exported = json.loads((tmp_path / "k_child_x2" / "sae" / "cfg.json").read_text())
    assert (exported["k"], exported["k_child"]) == (2, 2)


@pytest.fixture(scope="module")
def tiny_model() -> Any:
    from allostasis.models.lens import pretrained

    return pretrained(arch="llama")


def of_a_tiny_model(model: Any, cache: Path, hook: str = "unembed_input", **settings: Any) -> Any:
    """The module of a run on some 1,800 training rows of a tiny language model."""
    from allostasis.experiments.hsae.train import HsaeTrain
    from allostasis.tasks.activations import ActivationDataModule

    task = ActivationDataModule(
        seed=0, hook=hook, n_tokens=2000, window=48, folder=str(cache), batch_size=64
    )
    given = {"reads_of": {"hsae_teacher": "causal"}, "m": 6, "c": 3, "s": 4, "max_steps": 10}
    return HsaeTrain(model=model, task=task, **(given | settings))


@pytest.mark.parametrize("kind", ["hsae", "topk"])
def test_transformer_lens_finds_the_hook_of_a_run_s_autoencoder(
    kind: str, tiny_model: Any, tmp_path: Path
) -> None:
    from allostasis.models import lens, sae

    reads = [] if kind == "hsae" else ["baseline"]
    module = of_a_tiny_model(tiny_model, tmp_path / "cache", kind=kind, reads=reads)
    module.write_sae(tmp_path / "sae", "some run")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert (cfg["hook_name"], cfg["task_hook"]) == ("unembed.hook_in", "unembed_input")
    bridge: Any = lens.bridge(tiny_model)
    bridge.__class__ = sae.SAETransformerBridge
    bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}
    found, ids = sae.load(tmp_path / "sae"), torch.arange(10)[None] + 5
    read = lens.unembed_input(tiny_model, ids)
    with torch.no_grad():
        expected = tiny_model.decoder.unembed(found(read))
        assert (expected - bridge(ids)).abs().max() > 1e-3
        assert torch.allclose(bridge.run_with_saes(ids, saes=[found]), expected, atol=1e-4)


def test_arms_differ_in_what_sets_them_apart_alone() -> None:
    own = {"condition", "module.kind", "module.start", "module.teacher", "module.reads",
           "module.reads_of.hsae_teacher", "module.k", "module.k_child"}  # fmt: skip

    def flat(node: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {name: node}
        return {k: v for key, part in node.items() for k, v in flat(part, f"{name}.{key}").items()}

    resolved = {}
    for condition in composed().conditions:
        cfg = composed(f"condition={condition}")
        content = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(content, dict)
        resolved[condition] = {k.removeprefix("."): v for k, v in flat(content).items()}
    first = resolved["baseline"]
    for condition, values in resolved.items():
        assert values.keys() == first.keys()
        assert {name for name in first if values[name] != first[name]} <= own, condition


@pytest.mark.slow
def test_a_flat_autoencoder_has_the_l0_and_the_parameters_of_the_arm_it_reads(
    tmp_path: Path,
) -> None:
    from allostasis.core.config import run_folder

    words = ["condition=topk", "seed=1"]
    folder = tmp_path / run_folder(composed(*PLANTED, *words))
    content = run(folder, *words)
    # the arm that was read lies where its own command looks for it, whatever the seed
    assert (tmp_path / run_folder(composed(*PLANTED, "seed=1")) / "run.json").is_file()
    assert not (folder.parent / "outputs").exists()
    matched = content["matched"]
    assert matched["d_sae"] == content["summary"]["d_sae"] == 84
    assert pytest.approx(content["summary"]["n_parameters"], rel=0.01) == 10_896
    assert content["summary"]["l0"] == pytest.approx(round(matched["l0"]), abs=0.2)


def test_a_rotated_teacher_keeps_its_angles_and_nothing_else() -> None:
    from allostasis.core.spaces import CausalMetric, ResidVec, UnembVec
    from allostasis.experiments.hsae.arms import of_teacher
    from allostasis.models.teacher import Teacher

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = drawn(10, 10)
    metric = CausalMetric(root @ root.T + torch.eye(10), torch.zeros(10))
    mask = torch.ones(3, 2, dtype=torch.bool)
    teacher = Teacher(
        UnembVec(drawn(3, 10)), UnembVec(drawn(3, 2, 10)), mask, (1, 2, 3),
        ((4, 5), (6, 7), (8, 9)), metric, "", "",
    )  # fmt: skip
    plain, turned = (of_teacher(teacher, m=3, c=2, seed=seed) for seed in (None, 0))

    def gram(start: Any) -> torch.Tensor:
        rows = torch.cat([start.parents, start.children.flatten(0, 1)]).double()
        white = metric.whiten_resid(ResidVec(rows))
        return white @ white.T

    assert torch.allclose(gram(plain), gram(turned), rtol=1e-4, atol=1e-5)
    cosines = torch.cosine_similarity(plain.parents, turned.parents)
    assert cosines.abs().max() < 0.95
    # children lost their parent's part under the causal inner product
    inner = gram(plain)[0, 3:5]
    assert inner.abs().max() < 1e-4


def test_an_update_that_nothing_evaluates_is_refused(tmp_path: Path) -> None:
    from hydra.errors import InstantiationException

    for steps in ("[20,60]", "[25]", "[0]"):
        with pytest.raises((ValueError, InstantiationException), match="nothing is evaluated at"):
            run(tmp_path / "refused", f"module.evaluate_at={steps}")


def test_more_updates_than_the_data_hold_are_refused_before_the_first(
    tiny_model: Any, tmp_path: Path
) -> None:
    from allostasis.tasks.activations import ActivationDataModule

    cache = tmp_path / "cache"
    task = ActivationDataModule(seed=0, n_tokens=2000, window=48, folder=str(cache), batch_size=64)
    task.prepare(tiny_model)
    most = 8 * (task.n_train // 64)
    of_a_tiny_model(tiny_model, cache, max_steps=most, chunk=most, eval_every=most,
                    log_grad_every=most)  # fmt: skip
    with pytest.raises(ValueError, match=rf"hold {most} batches of 64 in task.epochs=8"):
        of_a_tiny_model(tiny_model, cache, max_steps=2 * most, chunk=most, eval_every=most,
                        log_grad_every=most)  # fmt: skip


def test_what_could_not_be_written_at_the_end_is_refused_before_rows_are_harvested(
    tiny_model: Any, tmp_path: Path
) -> None:
    from allostasis.models.hsae import UnsupportedExport

    d = tiny_model.decoder.d_model
    with pytest.raises(UnsupportedExport, match="take fewer parents or children"):
        of_a_tiny_model(tiny_model, tmp_path / "cache", m=2**20 // d, c=2**10, s=1)
    assert not (tmp_path / "cache").exists()


def test_losses_and_curves_have_the_causal_inner_product_in_every_arm(
    tiny_model: Any, write_hsae: Any, tmp_path: Path
) -> None:
    from allostasis.core.records import read_run
    from allostasis.core.spaces import UnembVec, causal_metric
    from allostasis.experiments.hsae.clouds import kept_tokens

    rows = tiny_model.decoder.W_U.detach().T.float()[kept_tokens(tiny_model)]
    sigma = causal_metric(UnembVec(rows)).sigma
    for arm in ("causal", "euclidean"):
        reads_of = {"hsae_teacher": arm}
        module = of_a_tiny_model(
            tiny_model, tmp_path / "cache", start="teacher", teacher=arm, reads_of=reads_of,
        )  # fmt: skip
        trained = tmp_path / arm / "outputs" / "hsae_train" / "an_arm" / "seed=0" / "cpu-bb"
        write_hsae(tiny_model, module.task, trained, metric=arm)
        taught = trained.parents[3] / "hsae_teacher" / arm / "seed=0" / "cpu-aa"
        module.take({"hsae_teacher": read_run(taught)})
        assert torch.equal(module.sigma, sigma.float()), arm
        assert torch.equal(module.metric.sigma, sigma), arm
        is_unit = torch.equal(module.teacher.metric.sigma, torch.eye(len(sigma)).double())
        assert is_unit == (arm == "euclidean")  # what the vectors were estimated with
    with pytest.raises(ValueError, match="set module.teacher alone"):
        of_a_tiny_model(tiny_model, tmp_path / "cache", teacher="euclidean")


def test_at_an_earlier_hook_concepts_are_carried_back_by_a_map_of_the_same_tokens(
    tiny_model: Any, write_hsae: Any, tmp_path: Path
) -> None:
    from allostasis.core.records import read_run
    from allostasis.core.spaces import ResidVec
    from allostasis.experiments.hsae.arms import of_teacher

    def made(hook: str, **settings: Any) -> Any:
        return of_a_tiny_model(
            tiny_model, tmp_path / hook, hook, n_match=1800, n_test=100, **settings
        )

    trained = tmp_path / "outputs" / "hsae_train" / "an_arm" / "seed=0" / "cpu-bb"
    hook = f"blocks.{tiny_model.decoder.n_layers - 1}.hook_resid_post"
    module = made(hook, start="teacher")
    write_hsae(tiny_model, module.task, trained, metric="causal")
    teacher = {"hsae_teacher": read_run(trained.parents[3] / "hsae_teacher/causal/seed=0/cpu-aa")}
    facts = module.take(teacher)
    assert 0.5 < facts["map"]["r2"] <= 1  # behind the last block only a norm is left
    x, read = module.task.split("test").x.double(), module.task.unembed_input("test").double()
    guessed = x @ module.map.weight.T
    off = (read - read.mean(dim=0)) - (guessed - guessed.mean(dim=0))
    share = 1 - off.square().sum() / (read - read.mean(dim=0)).square().sum()
    assert float(share) == pytest.approx(facts["map"]["r2"], abs=0.05)
    # the atoms' inner products at the hook are those of the concepts where they are read
    later = of_teacher(module.teacher, m=6, c=3)
    was = module.teacher.metric.whiten_resid(ResidVec(later.parents.double()))
    now = module.metric.whiten_resid(ResidVec(module.beginning.parents.double()))
    assert torch.allclose(now @ now.T, was @ was.T, rtol=1e-3, atol=1e-5)
    assert torch.equal(module.sigma, module.metric.sigma.float())
    # what the language model loses is read behind the hook, on the rows that the task tests on
    windows = module.task.windows(tiny_model, "test", 100)
    ids = torch.cat([torch.from_numpy(window.ids) for window in windows])
    tested = module.task.split("test", len(ids)).ids
    assert len(ids) >= min(100, len(module.task.split("test").ids))
    assert torch.equal(ids[: len(tested)], tested)
    losses = module.scoring._losses(module.model)
    there = tested[:, 3] >= 0
    logits = tiny_model.decoder.unembed(module.task.unembed_input("test", len(tested))[there])
    exact = torch.nn.functional.cross_entropy(
        logits.detach().float(), tested[there, 3].long(), reduction="none"
    )
    assert torch.allclose(losses["clean"][: len(exact)], exact, atol=0.05)  # rows are bfloat16
    assert all((losses[kind] - losses["clean"]).abs().max() > 1e-3 for kind in ("sae", "mean"))
    early = made("blocks.0.hook_resid_pre")  # of any arm: the losses' inner product needs the map
    with pytest.raises(ValueError, match=r"module\.allow_weak_map=true"):
        early.take(teacher)
    assert made("blocks.0.hook_resid_pre", allow_weak_map=True).take(teacher)["map"]["r2"] < 0.5


def test_k_means_begins_with_clusters_and_not_with_the_mean_that_they_have_in_common() -> None:
    from allostasis.experiments.hsae.arms import of_kmeans

    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.eye(5, 12)
    rows = centres.repeat(100, 1) + 0.1 * torch.randn(500, 12, generator=generator)
    start = of_kmeans(rows + 30.0, m=5, c=2, seed=0)
    # a planted centre less the mean of all of them, one parent each
    wanted = centres - centres.mean(dim=0)
    cosine = torch.cosine_similarity(start.parents[:, None], wanted[None], dim=-1)
    assert (cosine.max(dim=0).values > 0.99).all()
    assert (cosine.max(dim=1).values > 0.99).all()
    assert start.mask.all()
    assert start.children.shape == (5, 2, 12)
