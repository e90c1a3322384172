"""What is refused of a sweep as a whole, what each job gets, and how its end is told."""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from allostasis.core import sweep
from allostasis.core.config import conf_dir, register

Points = Callable[..., list[sweep.Point]]


@pytest.fixture
def points() -> Iterator[Points]:
    """The runs of a sweep over grokking, if nothing is wrong with it."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        loader = GlobalHydra.instance().config_loader()

        def run(*words: str) -> list[sweep.Point]:
            overrides = ["exp=grokking", *words, "hydra.mode=MULTIRUN"]
            cfg = loader.load_configuration("config", overrides, run_mode=RunMode.MULTIRUN)
            return sweep.check_sweep(cfg)

        yield run


def test_the_design_of_the_yaml_is_swept_unless_the_command_says_otherwise(points: Points) -> None:
    design = points()
    assert [(p.condition, p.seed) for p in design] == [
        (condition, seed) for condition in ("high_wd", "no_wd") for seed in range(8)
    ]
    assert [(p.condition, p.seed) for p in points("seed=3,1", "condition=no_wd")] == [
        ("no_wd", 3),
        ("no_wd", 1),
    ]


def test_runs_composed_by_their_seed_are_as_if_composed_alone(points: Points) -> None:
    found = points("seed=0,3", "preset=quick")
    for point in found:
        (alone,) = points(f"seed={point.seed}", f"condition={point.condition}", "preset=quick")
        assert alone.folder == point.folder


def test_a_run_is_told_from_the_others_by_what_varies(points: Points) -> None:
    found = points("condition=high_wd", "seed=0", "module.lr=1e-3,2e-3", "preset=quick")
    assert [p.axes for p in found] == [{"module.lr": "0.001"}, {"module.lr": "0.002"}]
    assert len({p.folder for p in found}) == 2


def test_every_run_lies_in_a_folder_of_its_own(points: Points) -> None:
    design = points()
    assert len({p.folder for p in design}) == len(design)
    first = design[0].folder.relative_to(Path.cwd())
    assert first.parts[:4] == ("outputs", "grokking", "high_wd", "seed=0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=0,0", "condition=no_wd"], "2 runs of the sweep are this one"),
        (["module.weight_decay=1.0"], "condition=high_wd,no_wd: these arms have the same settings"),
        (["seed=0,1,-1,-2"], "seed=-2: input should be greater than or equal to 0 (condition="),
        (["seed=0,x"], "seed='x': input should be a valid integer"),
        (["preset=quick,slow"], "preset=slow: no such preset; there are full, full_cpu,"),
        (["device=cpu,tpu"], "device='tpu': allowed are auto, cpu, cuda, cuda:<index> and mps"),
    ],
)
def test_a_sweep_with_one_bad_run_is_refused(
    points: Points, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        points(*words)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("The sweep was not started; its config has ")
    assert said in text


def test_a_problem_of_many_runs_is_told_once(
    points: Points, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        points("seed=range(0,8)", "task.p=3,-1")
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  task.p=-1: input should be greater than 2 (condition=high_wd seed=0 task.p=-1; "
        "condition=high_wd seed=1 task.p=-1; condition=high_wd seed=2 task.p=-1; and 13 more)",
        "  model.p=-1: input should be greater than 2 (condition=high_wd seed=0 task.p=-1; "
        "condition=high_wd seed=1 task.p=-1; condition=high_wd seed=2 task.p=-1; and 13 more)",
    ]


@pytest.mark.parametrize(
    ("launcher", "share"),
    [
        ({"_target_": "x.BasicLauncher"}, None),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 2}, 4),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 3}, 2),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 99}, 1),
        ({"_target_": "x.JoblibLauncher", "n_jobs": -1}, 1),
        ({"_target_": "x.JoblibLauncher", "n_jobs": -7}, 4),
        ({"_target_": "x.LocalLauncher", "cpus_per_task": None}, 1),
        ({"_target_": "x.LocalLauncher", "cpus_per_task": 4}, 4),
        ({"_target_": "x.SlurmLauncher", "cpus_per_task": None}, None),
        ({"_target_": "x.SlurmLauncher", "cpus_per_task": 6}, 6),
    ],
)
def test_jobs_side_by_side_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, launcher: dict[str, object], share: int | None
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    cfg = OmegaConf.create(launcher)
    assert isinstance(cfg, DictConfig)
    assert sweep.threads(cfg) == share


def test_the_table_names_every_run_and_its_headline_numbers(tmp_path: Path) -> None:
    ends = {
        0: {"status": "done", "wall_s": 200.4, "summary": {
            "grokked": True, "t_grok": 520, "loss": 1.23456e-7, "keys": [1, 2], "wall_s_train": 9.0,
        }},
        1: {"status": "done", "wall_s": 59.0, "summary": {"grokked": False, "t_grok": None}},
        2: {"status": "failed", "wall_s": 0.2, "summary": None},
        3: {"status": "running", "wall_s": None},
    }  # fmt: skip
    runs = []
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        if seed in ends:
            (folder / "run.json").write_text(json.dumps(ends[seed]))
        axes = {"condition": "a", "seed": str(seed), "module.lr": "0.1"}
        runs.append(sweep.Point(axes, folder, "exp", "m", "a", seed))
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(sweep.table(runs))
    lines = [re.sub(r"[│┃\s]+", " ", line).strip() for line in console.export_text().splitlines()]
    assert lines[1] == "condition seed module.lr status time grokked t_grok loss"
    assert lines[3:8] == [
        "a 0 0.1 done 3 min 20 s yes 520 1.235e-07",
        "a 1 0.1 done 59 s no - -",
        "a 2 0.1 failed 0 s - - -",
        "a 3 0.1 died - - - -",
        "a 4 0.1 not started - - - -",
    ]
