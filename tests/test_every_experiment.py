"""Every experiment in every condition does a short run whose records and report are valid."""

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from omegaconf import DictConfig

CONF = Path(__file__).parents[1] / "conf"
SHORT = {
    "grokking": [
        "module.max_steps=20",
        "task.p=23",
        "task.probe_size=64",
        "model.d_mlp=64",
        # arms that hold a norm read a run that has grokked
        "module.eval_every=10",
        "module.dwell=1",
        "module.grok_accuracy=0.001",
    ],
    "superposition": [
        "model=tiny",
        "model.arch=llama",
        "task.n_sequences=16",
        "task.n_tokens=16",
        "module.n_steps=20",
        "module.n_sequences=32",
        "module.n_plants=1",
        "module.n_sets=4",
        "module.grid.n_steps=20",
        "module.draws=200",
        "module.outer=5",
    ],
    "constraint": [
        "module.max_steps=20",
        "module.eval_every=10",
        "metrics.dense_every=10",
        "task.n_val=64",
        "task.n_contexts=4",
        "task.n_calibration=8000",
    ],
    "heads_zero": ["model=tiny", "model.arch=llama", "module.layers=1", "module.verify.units=1"],
    "heads_pairs": ["model=tiny", "model.arch=gpt2", "module.verify.units=0"],
    "heads_patch": [
        "model=tiny",
        "model.arch=gemma3_text",
        "module.layers=2",
        "module.positions=last",
        "module.verify.units=1",
    ],
    "heads_ov": ["model=tiny", "model.arch=gpt_neox", "module.layers=1"],
    "ioi": ["model=tiny", "model.arch=qwen2", "module.heads=['1.0','2.1']"],
    "hsae_train": [
        "task=planted_hierarchy",
        "model=planted_hierarchy",
        "module.reads_of=null",
        "module.max_steps=20",
        "module.stage_a.steps=10",
        "module.eval_every=10",
        "module.evaluate_at=[]",
        "module.log_grad_every=10",
        "module.n_watch=256",
        "module.n_match=512",
        "module.n_test=512",
    ],
    # a tiny tokenizer knows no hierarchy of nouns, so that concepts are of the real one
    "hsae_teacher": [
        "task.min_lemmas=300",
        "module.controls=[shuffled]",
        "module.selection.parents=4",
        "module.n_contexts=2",
        "module.n_partitions=2",
        "module.n_boot=100",
        "module.n_perm=100",
        "module.n_background=1000",
    ],
}
DESIGNS = {
    path.stem: list(yaml.safe_load(path.read_text())["conditions"])
    for path in sorted((CONF / "exp").glob("*.yaml"))
}
# they read a language model's autoencoder, or its teachers
READERS = {
    ("hsae_train", "shuffled_teacher"),
    ("hsae_train", "euclidean_teacher"),
    *(("hsae_steer", condition) for condition in DESIGNS["hsae_steer"]),
}
ARMS = [
    (exp, condition)
    for exp, conditions in DESIGNS.items()
    for condition in conditions
    if (exp, condition) not in READERS
]
SLOW = {"hsae_teacher"}  # all arms of it: they need a real vocabulary
AT_ONCE = 2  # arms of an experiment that are tried in the tests that take seconds


def trains(exp: str, condition: str) -> bool:
    content = yaml.safe_load((CONF / "exp" / f"{exp}.yaml").read_text())
    clamp = content["conditions"][condition].get("clamp", {})
    return "fit" in content["stages"] and clamp.get("phase") != "eval_only"


TRAINED = [arm for arm in ARMS if trains(*arm)]
ANSWERING = [arm for arm in TRAINED if arm[0] != "hsae_train"]  # an autoencoder has no answers


def shared_out(arms: list[tuple[str, str]]) -> list:
    """The first arms of each experiment, and the others as slow tests."""
    return [
        pytest.param(
            exp,
            condition,
            marks=pytest.mark.slow if exp in SLOW or condition in DESIGNS[exp][AT_ONCE:] else (),
        )
        for exp, condition in arms
    ]


def compose(exp: str, *overrides: str) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from allostasis.core.config import register

    register()
    short = SHORT.get(exp, ["trainer.max_steps=20"])
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        words = [f"exp={exp}", "preset=quick", "threads=1", "device=cpu", *short, *overrides]
        return hydra_compose("config", words)


class Runs:
    """Folders of short runs, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, {}

    def __getitem__(self, arm: tuple[str, str]) -> Path:
        from allostasis.core.config import run_folder
        from allostasis.run import run

        if arm not in self.made:
            exp, condition = arm
            cfg = compose(exp, f"condition='{condition}'", "seed=42")
            self.made[arm] = self.root / run_folder(cfg)
            if not (self.made[arm] / "run.json").is_file():  # another arm may have asked for it
                run(cfg, self.made[arm])
        return self.made[arm]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(("exp", "condition"), shared_out(ARMS))
def test_a_short_run_leaves_complete_records(runs: Runs, exp: str, condition: str) -> None:
    folder = runs[exp, condition]
    content = json.loads((folder / "run.json").read_text())
    assert content["status"] == "done"
    assert content["error"] is None
    facts = {
        "run_id", "commit", "dirty", "versions", "device_resolved", "device_name", "started",
        "finished", "wall_s", "seed", "config_hash", "claims_hash", "checkpoints", "pip_freeze",
        "threads", "sessions",
    }  # fmt: skip
    assert facts <= content.keys()
    assert len(content["claims"]) > 0
    assert content["checkpoints"].keys() == ({"0", "20"} if (exp, condition) in TRAINED else set())
    for step, digest in content["checkpoints"].items():
        weights = (folder / "checkpoints" / f"{step}.safetensors").read_bytes()
        assert digest == "sha256:" + hashlib.sha256(weights).hexdigest()
    assert {path.name for path in folder.iterdir()} >= {
        "run.json", "config.yaml", "claims.json", "metrics.parquet", "times.parquet",
        "examples.parquet", "audit.json",
    }  # fmt: skip
    assert not (folder / "parts").exists()
    assert not (folder / "checkpoints" / "resume.ckpt").exists()


@pytest.mark.parametrize(("exp", "condition"), shared_out(ANSWERING))
def test_tables_hold_steps_0_and_last_and_layers_from_0(
    runs: Runs, exp: str, condition: str
) -> None:
    metrics = pd.read_parquet(runs[exp, condition] / "metrics.parquet")
    assert {0, 20} <= set(metrics["step"])
    n_layers = compose(exp).model.get("n_layers", 1)
    assert set(metrics["layer"].dropna()) == set(range(n_layers))
    assert set(metrics["head"].dropna()) == {0, 1, 2, 3}
    assert not metrics.duplicated(["step", "split", "metric", "layer", "head", "position"]).any()
    symbols = set(metrics["symbol"])
    assert {"Psi", "G", "A", "sigma2"} <= symbols


@pytest.mark.parametrize(("exp", "condition"), shared_out(ARMS))
def test_the_log_format_of_the_documents_is_there(runs: Runs, exp: str, condition: str) -> None:
    log = json.loads((runs[exp, condition] / "audit.json").read_text())
    assert list(log) == ["metadata", "metrics", "checkpoints", "summary"]
    assert log["metadata"].keys() == {"experiment", "seed", "start_time", "git_commit"}
    assert log["metadata"]["experiment"].endswith(condition)
    if (exp, condition) not in ANSWERING:
        metrics = pd.read_parquet(runs[exp, condition] / "metrics.parquet")
        assert [row["step"] for row in log["metrics"]] == sorted(metrics["step"].unique())
        return
    keys = {"step", "timestamp", "psi_accuracy", "A_activation", "A_param", "sigma_sq"}
    assert keys <= log["metrics"][-1].keys()
    assert log["metrics"][-1]["step"] == 20
    assert log["summary"]["total_steps"] == 20


FIRST = [next(arm for arm in TRAINED if arm[0] == exp) for exp in dict(TRAINED)]
AGAIN = {
    "started", "finished", "wall_s", "wall_s_amortised", "sessions", "command", "run_id", "profile",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("exp", "condition"), FIRST)
def test_a_run_that_is_cut_after_its_last_update_says_all_that_a_whole_one_says(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exp: str, condition: str
) -> None:
    """The proof of effect is the first session's; what is read last is read before the cut."""
    from hydra.utils import get_class

    from allostasis.core.interrupt import Interrupted
    from allostasis.run import run

    whole = json.loads((runs[exp, condition] / "run.json").read_text())
    words = [f"condition='{condition}'", "seed=42"]
    folder = tmp_path / "cut"

    def stop(*_: object) -> None:
        raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(get_class(compose(exp, *words).module["_target_"]), "test_step", stop)
        with pytest.raises(Interrupted):
            run(compose(exp, *words), folder)
    cut = json.loads((folder / "run.json").read_text())
    assert cut["effect"] == whole["effect"]
    run(compose(exp, *words), folder)
    cut = json.loads((folder / "run.json").read_text())
    assert {k: v for k, v in cut.items() if k not in AGAIN} == {
        k: v for k, v in whole.items() if k not in AGAIN
    }


@pytest.mark.slow
def test_arms_differ_in_hash_and_final_weights(runs: Runs) -> None:
    contents = [json.loads((runs[arm] / "run.json").read_text()) for arm in ARMS]
    assert len({content["config_hash"] for content in contents}) == len(contents)
    # two flat autoencoders are the same where the arms that they read have the same L0
    trained = [json.loads((runs[arm] / "run.json").read_text()) for arm in ANSWERING]
    assert len({content["checkpoints"]["20"] for content in trained}) == len(ANSWERING)
    # arms of one seed start from the same weights, where their start is not what sets them apart
    contents = [json.loads((runs[arm] / "run.json").read_text()) for arm in ANSWERING]
    first = {content["checkpoints"]["0"] for content in contents}
    assert len(first) == len({exp for exp, _ in ANSWERING})


def test_no_record_holds_a_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from allostasis.run import run

    secret = "sk-5f1c" * 4
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("HF_TOKEN", secret)
    cfg = compose("grokking", "task.p=7", "model.d_model=8", "model.d_mlp=8", "task.probe_size=8")
    run(cfg, tmp_path / "run")
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes()


@pytest.mark.slow
def test_both_engines_train_to_the_same_losses(tmp_path: Path) -> None:
    from allostasis.run import run

    tables = {}
    for engine in ("structured", "naive"):
        run(
            compose("grokking", f"module.engine={engine}", "task.p=23", "task.probe_size=64"),
            tmp_path / engine,
        )
        table = pd.read_parquet(tmp_path / engine / "metrics.parquet")
        picked = table[(table["metric"] == "cross_entropy") & (table["split"] == "train")]
        tables[engine] = picked.set_index("step")["value"]
    pd.testing.assert_series_equal(tables["structured"], tables["naive"], rtol=1e-5)
