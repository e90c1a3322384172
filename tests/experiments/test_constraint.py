"""The constraint experiment: each treatment acts; a clamp is told its numbers by one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch.testing import assert_close

SITE = "blocks.1.hook_resid_mid"
SMALL = [
    "exp=constraint", "preset=quick", "threads=1", "device=cpu", "seed=5", "task.vocab_size=16",
    "task.n_val=96", "task.n_contexts=4", "task.n_calibration=6000", "model.d_model=16",
    "module.max_steps=60", "module.eval_every=20", "metrics.dense_every=20",
    "metrics.sparse_every=20",
]  # fmt: skip
Compose = Callable[..., DictConfig]


def compose(*overrides: str, small: bool = True) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from allostasis.core.config import conf_dir, register

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return hydra_compose("config", [*(SMALL if small else ["exp=constraint"]), *overrides])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("constraint")


def do(root: Path, condition: str, *overrides: str, again: bool = False) -> Path:
    """The folder of a run in a shared outputs/, made unless it is there."""
    from allostasis.core.config import run_folder
    from allostasis.run import run

    cfg = compose(f"condition={condition}", *overrides)
    folder = root / run_folder(cfg)
    if again or not (folder / "run.json").is_file():
        run(cfg, folder)
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def module(condition: str, *overrides: str):
    from hydra.utils import instantiate

    cfg = compose(f"condition={condition}", *overrides)
    task = instantiate(cfg.task, _convert_="all")
    model = instantiate(cfg.model, _convert_="all")
    return instantiate(cfg.module, model=model, task=task, _convert_="all")


@pytest.mark.parametrize(
    "condition",
    ["constraint", "constraint_routing", "constraint_module", "naive_clamp",
     "mean_preserving_clamp", "naive_clamp_batch", "placebo_clamp", "class_shrink_b"],
)  # fmt: skip
def test_every_arm_changes_logits_or_gradients(root: Path, condition: str) -> None:
    effect = read(do(root, condition))["effect"]
    if condition.startswith("constraint"):
        assert effect["frozen_gradient"] > 1e-6
        assert effect["n_frozen"] > 0
    else:
        assert max(effect["effect_logits"], effect["effect_gradient"]) > 1e-4
        assert effect["hook_calls"] == 1
    assert effect["gradient_norm"] > 1e-8


def test_every_loss_term_has_gradient() -> None:
    arm = module("control")
    assert arm.prove_effect()["gradient_norm"] > 1e-8
    with torch.no_grad():
        arm.model.W_U.zero_()  # logits that nothing moves but the unembedding
        arm.model.ln_final.w.zero_()
    with pytest.raises(RuntimeError, match="it cannot train"):
        arm.prove_effect()


def test_calibration_clamp_and_log_share_one_site(root: Path) -> None:
    folder = do(root, "naive_clamp")
    content = read(folder)
    assert content["reference"]["site"] == content["clamp"]["site"] == SITE
    control = next((root / "outputs/constraint/control").rglob("run.json")).parent
    assert content["reference"]["control"] == read(control)["run_id"]
    assert content["read"]["control"]["checkpoints"] == read(control)["checkpoints"]
    # what is logged there is what the clamp made of it
    metrics = pd.read_parquet(folder / "metrics.parquet")
    logged = metrics[(metrics["metric"] == "amplitude_activation.mid") & (metrics["layer"] == 1)]
    logged = logged[logged["split"] == "probe"]["value"]
    target = content["clamp"]["target"] / 16**0.5
    assert len(logged) >= 3
    assert logged.to_numpy() == pytest.approx(target, rel=1e-5)


def test_target_is_within_5_percent_of_the_control_mean(root: Path) -> None:
    """Against the control's own record on the probe, other sequences than the calibration's."""
    content = read(do(root, "naive_clamp"))
    control = next((root / "outputs/constraint/control").rglob("metrics.parquet"))
    metrics = pd.read_parquet(control)
    rows = metrics[(metrics["metric"] == "amplitude_activation.mid") & (metrics["layer"] == 1)]
    rows = rows[rows["split"] == "probe"]
    last = rows.loc[rows["step"].idxmax(), "value"] * 16**0.5
    assert content["clamp"]["target"] == pytest.approx(last, rel=0.05)
    assert content["reference"]["n_tokens"] >= 6000


def test_a_factor_scales_the_reference(root: Path) -> None:
    whole = read(do(root, "naive_clamp"))["clamp"]["target"]
    less = read(do(root, "naive_clamp", "module.clamp.target=reference*0.6"))["clamp"]["target"]
    assert less == pytest.approx(0.6 * whole)


def test_a_clamp_reads_the_one_control_whatever_its_own_settings(root: Path) -> None:
    do(root, "naive_clamp")
    do(root, "naive_clamp", "module.clamp.site=blocks.0.hook_resid_mid")
    assert len(list((root / "outputs/constraint/control").rglob("run.json"))) == 1


@pytest.mark.parametrize("condition", ["naive_clamp_batch", "mean_preserving_clamp_batch"])
def test_a_clamp_by_batch_is_evaluated_in_batches_as_large_as_it_was_trained_with(
    root: Path, condition: str
) -> None:
    from allostasis.analysis.aggregate import arms
    from allostasis.analysis.curves import RunView
    from allostasis.core.records import read_run
    from allostasis.experiments.constraint.report import clamp_tables

    folder = do(root, condition, "module.max_steps=20")
    content = read(folder)
    assert content["effect"]["label"] == content["summary"]["label"] == "batch_dependent"
    assert content["clamp"]["sequences_a_batch"] == 16
    (table,) = clamp_tables(arms([RunView(read_run(folder))]))
    assert table.rows[0][-1] == "batch_dependent"

    arm = module(condition)
    control = read_run(next((root / "outputs/constraint/control").rglob("run.json")).parent)
    target = arm.take({"control": control})["clamp"]["target"]
    seen = []

    def watch(tensor: torch.Tensor, *, hook: object) -> None:
        del hook
        left = tensor - tensor.mean(dim=(0, 1))
        size = (left.square().mean().sqrt(), tensor.norm(dim=-1).mean())
        seen.append((len(tensor), size[condition == "naive_clamp_batch"].item()))

    with arm.model.hooks(fwd_hooks=[(SITE, watch)]):
        arm.updates = arm.max_steps  # the whole held-out set is read
        list(arm.snapshots(["blocks.1.hook_resid_mid"], full=True))
        arm.test_step(None, 0)
    assert {n for n, _ in seen} == {16}  # held-out 96, probe 64, class probe 16 x 4
    assert [size for _, size in seen] == pytest.approx([target] * len(seen), rel=1e-4)


def test_frozen_weights_are_those_of_step_0_to_the_bit(root: Path) -> None:
    folder = do(root, "constraint")
    summary = read(folder)["summary"]
    assert summary["frozen_max_change"] == 0.0
    assert summary["free_head_change"] > 0
    start, end = (load_file(folder / f"checkpoints/{step}.safetensors") for step in (0, 60))
    name = "blocks.1.attn.W_K"
    assert torch.equal(start[name][1:], end[name][1:])
    assert not torch.equal(start[name][0], end[name][0])


def test_an_arm_without_training_is_the_constraints_model(root: Path) -> None:
    """`class_clamp_id` is the zero-damage twin of every arm of phase eval_only."""
    twin, base = read(do(root, "class_clamp_id")), read(do(root, "constraint"))
    assert twin["summary"]["steps"] == base["summary"]["steps"] == 60
    for group in ("all", "predictable", "last"):
        assert twin["summary"][f"accuracy_{group}"] == base["summary"][f"accuracy_{group}"]
    assert twin["checkpoints"] == {}
    assert twin["effect"]["effect_logits"] == 0.0


def test_a_class_clamp_sets_what_it_says_where_the_past_determines_the_token(root: Path) -> None:
    from allostasis.core.records import read_run

    arm = module("class_shrink_b")
    runs = {name: read_run(do(root, name)) for name in ("control", "constraint")}
    facts = arm.take(runs)["clamp"]
    batch = arm.task.calibration.part(slice(32))
    arm.prepare(batch)
    seen: list[torch.Tensor] = []

    def watch(tensor: torch.Tensor, *, hook: object) -> None:
        del hook
        seen.append(tensor.detach())

    with torch.no_grad(), arm.model.hooks(fwd_hooks=[(SITE, watch)]):
        arm.model.encode(batch.tokens)
        arm.attached.is_on = False
        arm.model.encode(batch.tokens)
    clamped, plain = seen
    counted = batch.groups["predictable"]
    assert_close(clamped[~counted], plain[~counted])
    means = arm.attached.clamp.means[batch.targets[counted]]
    moved = (facts["between"] - 1) * (means - arm.attached.clamp.mean)
    assert_close(clamped[counted] - plain[counted], moved, rtol=1e-4, atol=1e-5)
    assert facts["within"] == 1.0
    assert facts["between"] != pytest.approx(1.0)


@pytest.mark.parametrize(("condition", "halved"), [("class_halve_b", 0), ("class_halve_w", 1)])
def test_a_halved_variance_is_half_of_the_models_own(
    root: Path, condition: str, halved: int
) -> None:
    """By the law of total variance on the calibration split, class by class, in pandas."""
    from allostasis.core.records import read_run

    arm = module(condition)
    runs = {name: read_run(do(root, name)) for name in ("control", "constraint")}
    arm.take(runs)
    batch = arm.task.calibration
    arm.prepare(batch)
    counted = batch.groups["predictable"]

    def variances() -> tuple[float, float]:
        """Between and within classes, of the stream as the block's MLP reads it."""
        kept: list[torch.Tensor] = []

        def watch(tensor: torch.Tensor, *, hook: object) -> None:
            del hook
            kept.append(tensor.detach())

        with torch.no_grad(), arm.model.hooks(fwd_hooks=[(SITE, watch)]):
            arm.model.encode(batch.tokens)
        rows = pd.DataFrame(kept[0][counted].double().numpy())
        means = rows.groupby(batch.targets[counted].numpy()).transform("mean")
        between = means - rows.mean()
        return (between**2).sum(axis=1).mean(), ((rows - means) ** 2).sum(axis=1).mean()

    after = variances()
    arm.attached.is_on = False
    before = variances()
    ratios = [now / then for now, then in zip(after, before, strict=True)]
    assert ratios[halved] == pytest.approx(0.5, rel=1e-4)
    assert ratios[1 - halved] == pytest.approx(1.0, rel=1e-4)


def test_a_clamp_that_a_norm_undoes_is_refused_and_runs_labelled_when_allowed(root: Path) -> None:
    from allostasis.interventions.clamp import InertError

    last = "module.clamp.site=blocks.1.hook_resid_post"
    alone = root / "refused"
    with pytest.raises(InertError, match="LayerNorm first"):
        do(alone, "naive_clamp", last)
    assert not (alone / "outputs/constraint/control").exists()  # told before the control is made
    folder = do(root, "naive_clamp", last, "allow_inert=true", "force=true")
    assert read(folder)["effect"]["label"] == "inert"
    assert read(folder)["effect"]["effect_logits"] < 1e-3


def test_claims_about_an_inert_arm_are_undecided(root: Path) -> None:
    from allostasis.analysis import claim_files, verdicts
    from allostasis.analysis.aggregate import arms
    from allostasis.analysis.curves import RunView
    from allostasis.core.records import read_run
    from allostasis.experiments import constraint

    last = "module.clamp.site=blocks.1.hook_resid_post"
    folder = do(root, "naive_clamp", last, "allow_inert=true", "force=true")
    views = [RunView(read_run(folder))]
    loaded = claim_files.load(Path(constraint.__path__[0]), "constraint")
    found = {result.claim.id: result for result in verdicts.judge(loaded, arms(views))}
    assert found["A5"].verdict.word == "undecided"
    assert found["A5"].verdict.reason.startswith("inert: ")


def test_an_inert_label_goes_where_the_proof_shows_an_effect(root: Path) -> None:
    """A norm undoes a scale up to its epsilon: a stream far below it comes out small."""
    from allostasis.core.records import read_run

    labels = {}
    for factor in ("0.5", "0.0001"):
        arm = module(
            "naive_clamp", "module.clamp.site=blocks.1.hook_resid_post", "allow_inert=true",
            f"module.clamp.target=reference*{factor}",
        )  # fmt: skip
        arm.take({"control": read_run(do(root, "control"))})
        assert arm.label == "inert"
        labels[factor] = arm.prove_effect()["label"]
    assert labels == {"0.5": "inert", "0.0001": ""}


def test_accuracy_claims_about_a_clamp_that_changes_no_prediction_are_undecided(root: Path) -> None:
    from allostasis.analysis import claim_files, verdicts
    from allostasis.analysis.aggregate import arms
    from allostasis.analysis.curves import RunView
    from allostasis.core.records import read_run
    from allostasis.experiments import constraint

    words = ("model.norm=post", "model.final_norm=false", "module.max_steps=20",
             "module.clamp.site=blocks.1.hook_resid_post",
             "module.clamp.target=reference*0.5")  # fmt: skip
    folder = do(root, "naive_clamp", *words)
    effect = read(folder)["effect"]
    assert effect["label"] == "pinned, argmax_inert"
    assert effect["effect_argmax"] == 0
    assert effect["effect_logits"] > 1e-2
    loaded = claim_files.load(Path(constraint.__path__[0]), "constraint")
    found = {r.claim.id: r for r in verdicts.judge(loaded, arms([RunView(read_run(folder))]))}
    for name in ("A5", "A5.rs"):
        assert found[name].verdict.word == "undecided"
        assert found[name].verdict.reason.startswith("argmax_inert: ")
    assert found["A5.rs.amplitude"].verdict.reason == "1 of 5 seeds"


def test_answers_above_the_ceiling_are_a_leak_and_the_best_predictors_are_none() -> None:
    from allostasis.engines.sequence_training import LeakError
    from allostasis.tasks.interleaved_patterns import bayes_oracle

    arm = module("control")
    watched = arm.task.held_out
    tokens = torch.cat([watched.tokens, watched.targets[:, -1:]], dim=1)
    best = bayes_oracle(tokens, vocab_size=16, period_low=2, period_high=7).token

    def said(answers: torch.Tensor) -> None:
        """Have the model answer so, and look at it as at any other."""
        logits = torch.nn.functional.one_hot(answers, 16).double()
        arm.model.forward = lambda _: logits
        list(arm._answered("test", watched))

    said(best)
    nearly = torch.where(watched.groups["predictable"], best, watched.targets)
    with pytest.raises(LeakError, match="leak_suspected"):
        said(nearly)


@pytest.mark.slow
def test_unmasked_mutant_trains_past_the_ceiling_and_is_flagged(tmp_path: Path) -> None:
    from allostasis.run import run

    words = ["condition=control", "model.causal=false", "module.max_steps=1500",
             "module.lr=6.0e-3", "model.d_model=32"]  # fmt: skip
    cfg = compose(*words)
    with pytest.raises(RuntimeError, match="leak_suspected"):
        run(cfg, tmp_path / "run")
    content = read(tmp_path / "run")
    assert content["status"] == "failed"
    assert "leak_suspected" in content["error"]["message"]


@pytest.mark.parametrize("norm", ["post", "rms", "none"])
def test_every_norm_trains_and_records_amplitude_where_it_can_move(root: Path, norm: str) -> None:
    folder = do(root, "control", f"model.norm={norm}", "module.max_steps=20")
    metrics = pd.read_parquet(folder / "metrics.parquet")
    amplitude = metrics[(metrics["metric"] == "amplitude_activation") & metrics["layer"].notna()]
    assert set(amplitude["layer"]) == {0, 1}
    assert (amplitude["value"] > 0).all()


def test_every_arm_of_the_full_sweep_can_be_built_and_a_class_arm_is_refused_before_training() -> (
    None
):
    """As `run.read_first` builds it, before the runs that it reads are made."""
    from allostasis.core.config import conf_dir
    from allostasis.core.devices import resolve
    from allostasis.lifecycle import build_all

    content = yaml.safe_load((conf_dir() / "exp/constraint.yaml").read_text())
    swept = content["hydra"]["sweeper"]["params"]["condition"].split(",")
    assert "placebo_clamp" in swept
    for condition in swept:
        build_all(compose(f"condition={condition}", small=False), resolve("cpu"))
    with pytest.raises(ValueError, match="1698 of 4096 classes have fewer than 8 "):
        build_all(compose("condition=class_halve_b", small=False), resolve("cpu"))
    build_all(compose("condition=class_halve_b", "task=modular_sequences", small=False),
              resolve("cpu"))  # fmt: skip


@pytest.mark.parametrize(("vocab_size", "seq_len"), [(4096, 128), (512, 32), (64, 64)])
def test_the_number_of_tokens_that_is_advised_is_enough(vocab_size: int, seq_len: int) -> None:
    from allostasis.experiments.constraint.reference import check_classes
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns

    def check(seed: int, tokens: int) -> None:
        task = InterleavedPatterns(
            seed=seed, seq_len=seq_len, vocab_size=vocab_size, n_calibration=tokens
        )
        check_classes(task.calibration, vocab_size)

    with pytest.raises(ValueError, match="about") as caught:
        check(0, 10 * vocab_size)
    advised = int(str(caught.value).partition("; about ")[2].split()[0])
    for seed in range(10):  # it fails in at most 0.1 % of splits
        check(seed, advised)
    with pytest.raises(ValueError, match="about"):
        check(0, advised // 4)


@pytest.mark.slow
def test_the_second_task_runs_every_kind_of_arm(root: Path) -> None:
    from allostasis.core.config import run_folder
    from allostasis.run import run

    words = ["task=modular_sequences", "task.p=17", "task.vocab_size=18", "task.probe_size=8",
             "task.train_frac=0.8", "module.max_steps=20"]  # fmt: skip
    kept = [w for w in SMALL[1:] if not w.startswith(("task.", "preset"))]
    for condition in ("naive_clamp", "placebo_clamp", "class_halve_b", "class_halve_w_shuffled"):
        cfg = compose(*kept, *words, f"condition={condition}", small=False)
        folder = root / run_folder(cfg)
        cfg.gates = False
        run(cfg, folder)
        assert read(folder)["status"] == "done"
        assert read(folder)["summary"]["ceiling_all"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("cut_in", ["training_step", "test_step"])
def test_an_interrupted_run_resumes_to_the_same_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_in: str
) -> None:
    from allostasis.core.interrupt import Interrupted
    from allostasis.experiments.constraint.module import Constraint
    from allostasis.run import run

    words = ["condition=constraint", "metrics.checkpoint_every=20", "metrics.drift_lag=20"]
    run(compose(*words), tmp_path / "whole")
    step, at = getattr(Constraint, cut_in), {"training_step": 40, "test_step": 60}[cut_in]

    def stopping(self, batch, batch_idx):
        if self.updates == at:
            raise Interrupted(15)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Constraint, cut_in, stopping)
        with pytest.raises(Interrupted):
            run(compose(*words), tmp_path / "cut")
    run(compose(*words), tmp_path / "cut")
    for table in ("metrics", "examples"):
        whole, cut = (
            pd.read_parquet(tmp_path / name / f"{table}.parquet") for name in ("whole", "cut")
        )
        pd.testing.assert_frame_equal(whole, cut)
    for fact in ("summary", "effect"):
        assert read(tmp_path / "cut")[fact] == read(tmp_path / "whole")[fact]


@pytest.mark.slow
def test_a_resumed_arm_that_was_shown_to_be_inert_stays_inert(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allostasis.analysis.curves import RunView
    from allostasis.core.interrupt import Interrupted
    from allostasis.core.records import read_run
    from allostasis.experiments.constraint.module import Constraint

    step = Constraint.test_step

    def stop(self, *batch):
        if self.plan.kind == "none":  # the control, which is made first
            return step(self, *batch)
        raise Interrupted(15)

    words = ("module.max_steps=20", "allow_inert=true", "module.clamp.target=reference*1.5")
    with monkeypatch.context() as patch:
        # nothing of the site says so: the proof alone finds out
        for name in ("INERT", "UNDONE"):
            patch.setattr(f"allostasis.experiments.constraint.module.{name}", 1e9)
        patch.setattr(Constraint, "test_step", stop)
        with pytest.raises(Interrupted):
            do(root, "naive_clamp", *words)
    folder = do(root, "naive_clamp", *words, again=True)
    assert RunView(read_run(folder)).is_inert
    assert read(folder)["summary"]["label"] == "inert"


@pytest.mark.slow
def test_the_report_draws_every_figure_and_says_what_was_frozen(root: Path) -> None:
    from allostasis.report import main

    arms = ("control", "constraint", "constraint_routing", "naive_clamp", "mean_preserving_clamp")
    for seed in (5, 6, 7):
        for condition in arms:
            do(root / "whole", condition, f"seed={seed}")
    do(root / "whole", "class_halve_b")
    folder = root / "whole/outputs/constraint"
    assert main([str(folder)]) == 0
    drawn = {path.stem for path in (folder / "report/figures").glob("*.png")}
    assert drawn >= {
        "figure_1_overlay", "divergence", "ends", "variance", "identity", "positions", "forest",
        "phase_diagram",
    }  # fmt: skip
    text = (folder / "report/REPORT.md").read_text()
    for words in ("Accuracy and its ceiling", "What was frozen", "What the clamps do", "of 1.0000"):
        assert words in text
    verdicts = json.loads((folder / "report/verdicts.json").read_text())
    assert "A.dissociate" in json.dumps(verdicts)
