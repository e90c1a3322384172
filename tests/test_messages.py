"""The text of help and of the errors that a user meets first, and what they cost."""

import subprocess
import sys
from pathlib import Path

import pytest

from allostasis.core import help as texts
from allostasis.core.config import conf_dir

SPY = """
import sys
from allostasis.__main__ import main
sys.argv = ["allostasis", *sys.argv[1:]]
try:
    status = main()
except SystemExit as stop:
    status = stop.code
heavy = {"torch", "lightning", "transformer_lens", "wandb", "scipy"} & set(sys.modules)
print("loaded:", *sorted(heavy), file=sys.stderr)
sys.exit(status)
"""


def say(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SPY, *words], cwd=folder, capture_output=True, text=True, check=False
    )


def refused(folder: Path, *words: str) -> list[str]:
    """The lines of a refusal, which imports nothing heavy and leaves nothing behind."""
    done = say(folder, *words)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert not [*folder.iterdir()]
    *lines, loaded = done.stderr.splitlines()
    assert loaded == "loaded:"
    return lines


def test_called_bare_it_says_what_it_is_and_lists_the_experiments_found_on_disk(
    tmp_path: Path,
) -> None:
    done = say(tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert done.stderr == "loaded:\n"
    assert lines[0] == (
        "allostasis: how transformers keep working when their routing is constrained"
    )
    assert sum(line.startswith("  python -m allostasis") for line in lines) == 3
    assert all(len(line) <= 100 for line in lines)
    on_disk = sorted(path.stem for path in (conf_dir() / "exp").glob("*.yaml"))
    text = " ".join(done.stdout.split())
    assert [e.name for e in texts.experiments()] == on_disk
    for experiment in texts.experiments():
        assert f"{experiment.name} {experiment.question}" in text
        assert f"conditions: {', '.join(experiment.conditions)}" in text


def test_help_alone_does_not_even_load_hydra(tmp_path: Path) -> None:
    code = SPY.replace('"torch",', '"torch", "hydra", "pydantic",')
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "loaded:\n"
    assert done.stdout.startswith("allostasis: ")


def test_help_of_an_experiment_shows_its_front_page_and_its_settings(tmp_path: Path) -> None:
    done = say(tmp_path, "+exp=grokking", "preset=quick", "--help")
    assert done.returncode == 0
    assert done.stderr == "loaded:\n"
    assert done.stdout.startswith("Does weight decay move a modular-addition transformer")
    assert "\nname: grokking\n" in done.stdout
    assert "\n  max_steps: 900\n" in done.stdout, "the preset shows"
    assert "powered by Hydra" not in done.stdout
    assert not [*tmp_path.iterdir()]


def test_cfg_prints_the_config_that_would_run(tmp_path: Path) -> None:
    done = say(tmp_path, "+exp=grokking", "--cfg", "job", "seed=3")
    assert done.returncode == 0
    assert done.stderr == "loaded:\n"
    assert "\nseed: 3\n" in done.stdout
    assert not [*tmp_path.iterdir()]


def test_version_is_ours_and_not_hydras(tmp_path: Path) -> None:
    assert say(tmp_path, "--version").stdout.startswith("allostasis ")


def test_an_unknown_experiment_is_answered_with_the_nearest_and_the_list(tmp_path: Path) -> None:
    listed = ", ".join(e.name for e in texts.experiments())
    assert refused(tmp_path, "+exp=groking", "-m", "seed=0,1") == [
        "The run was not started; its config has 1 problem:",
        f"  exp=groking: no such experiment; did you mean 'grokking'? (experiments: {listed})",
    ]


def test_a_run_without_an_experiment_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, "seed=3") == [
        "The run was not started; its config has 1 problem:",
        "  exp: no experiment is chosen; `python -m allostasis` lists them",
    ]


def test_all_mistyped_settings_are_told_at_once(tmp_path: Path) -> None:
    words = ["sed=3", "trainr.max_steps=9", "seed=abc", "lr=1", "preset=quik", "device"]
    assert refused(tmp_path, "+exp=grokking", *words) == [
        "The run was not started; its config has 6 problems:",
        "  device: cannot be read; settings are written key=value",
        "  preset=quik: no such preset; did you mean 'quick'?",
        "  sed: no such setting; did you mean 'seed'?",
        "  trainr: no such setting; did you mean 'trainer'?",
        "  seed='abc': input should be a valid integer, unable to parse string as an integer",
        "  lr: no such setting; did you mean 'module.lr'?",
    ]


def test_values_out_of_range_are_told_at_once(tmp_path: Path) -> None:
    words = ["seed=-1", "condition=hi_wd", "device=gpu", "stages=[train]", "threads=0"]
    assert refused(tmp_path, "+exp=grokking", *words) == [
        "The run was not started; its config has 5 problems:",
        "  seed=-1: input should be greater than or equal to 0",
        "  threads=0: input should be greater than or equal to 1",
        "  condition='hi_wd': the design has no such condition; did you mean 'high_wd'?",
        "  device='gpu': allowed are auto, cpu, cuda, cuda:<index> and mps",
        "  stages=['train']: allowed are fit, test, or both",
    ]


def test_several_values_without_m_are_explained(tmp_path: Path) -> None:
    assert refused(tmp_path, "+exp=grokking", "seed=0,1")[1:] == [
        "  seed=0,1: several values make a sweep, which needs -m"
    ]


def test_one_bad_run_stops_a_sweep_before_its_first(tmp_path: Path) -> None:
    assert refused(tmp_path, "+exp=grokking", "-m", "seed=0,-1", "condition=high_wd") == [
        "The sweep was not started; its config has 1 problem:",
        "  seed=-1: input should be greater than or equal to 0 (seed=-1)",
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-m", "--cfg", "job"], "-m sweeps, --cfg and --info show one config: give one of them"),
        (["--resolve"], "--resolve goes with --cfg or --help"),
    ],
)
def test_flags_that_do_not_go_together_are_explained(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    assert refused(tmp_path, "+exp=grokking", *flags) == [said]


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_what_the_code_forbids_is_told_at_once_and_leaves_nothing(
    tmp_path: Path, sweep: list[str]
) -> None:
    words = ["task.p=abc", "module.weight_decy=1", "task.op=times", "task.train_frac=1.5"]
    done = say(tmp_path, "+exp=grokking", *sweep, *words)
    assert done.returncode == 2
    assert done.stderr.splitlines()[:6] == [
        f"The {'sweep' if sweep else 'run'} was not started; its config has 5 problems:",
        "  task.p='abc': input should be a valid integer, unable to parse string as an integer",
        "  task.train_frac=1.5: input should be less than 1",
        "  task.op='times': input should be 'add' or 'subtract'",
        "  model.p='abc': input should be a valid integer, unable to parse string as an integer",
        "  module.weight_decy: Grokking has no such parameter; did you mean 'weight_decay'?",
    ]
    assert not [*tmp_path.iterdir()]
