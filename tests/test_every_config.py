"""Every experiment with every preset composes, fits its code, and has a header that works."""

import re
import shlex
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from allostasis.__main__ import hoist
from allostasis.core import sweep
from allostasis.core.config import conf_dir, config_hash, register
from allostasis.core.help import OVERVIEW, experiments
from allostasis.core.validate import check

EXPERIMENTS = {experiment.name: experiment for experiment in experiments()}
DOCUMENTED = {  # the default design, where there are more arms
    "grokking": {"high_wd", "no_wd"},
    "constraint": {
        name for name in EXPERIMENTS["constraint"].conditions if not name.startswith("class_")
    },
}
PRESETS = sorted(path.stem for path in (conf_dir() / "preset").glob("*.yaml"))
COMMAND = re.compile(r"^ *python -m allostasis (\+?exp=\S.*?)(?:   |$)", re.MULTILINE)

Compose = Callable[..., DictConfig]


@pytest.fixture
def compose() -> Iterator[Compose]:
    """Compose as Hydra does for a command."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        loader = GlobalHydra.instance().config_loader()

        def run(*words: str, mode: RunMode = RunMode.RUN) -> DictConfig:
            return loader.load_configuration("config", list(words), run_mode=mode)

        yield run


@pytest.mark.parametrize(("name", "preset"), [*product(EXPERIMENTS, PRESETS)])
def test_an_experiment_composes_and_fits_the_code_it_names(
    compose: Compose, name: str, preset: str
) -> None:
    cfg = compose(f"exp={name}", f"preset={preset}")
    assert check(cfg) == []
    assert cfg.name == name
    assert cfg.condition in cfg.conditions


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_a_front_page_of_one_screen(name: str) -> None:
    experiment = EXPERIMENTS[name]
    lines = (conf_dir() / "exp" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert experiment.question.endswith("?")
    assert COMMAND.search(experiment.header), "a command to paste"
    assert len(lines) <= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_each_command_of_a_header_is_one_that_would_start(compose: Compose, name: str) -> None:
    for words in COMMAND.findall(EXPERIMENTS[name].header):
        would_start(compose, words)


def test_each_command_of_the_help_is_one_that_would_start(compose: Compose) -> None:
    found = COMMAND.findall(OVERVIEW)
    assert len(found) == 2
    for words in found:
        would_start(compose, words)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_no_two_conditions_are_the_same_run(compose: Compose, name: str) -> None:
    hashes = {
        config_hash(compose(f"exp={name}", f"condition='{condition}'"), without=("condition",))
        for condition in EXPERIMENTS[name].conditions
    }
    assert len(hashes) == len(EXPERIMENTS[name].conditions)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_default_design_has_every_condition(compose: Compose, name: str) -> None:
    cfg = compose(f"exp={name}", "hydra.mode=MULTIRUN", mode=RunMode.MULTIRUN)
    points = sweep.check_sweep(cfg)
    chosen = DOCUMENTED.get(name, set(EXPERIMENTS[name].conditions))
    assert {point.condition for point in points} == chosen


@pytest.mark.parametrize("group", ["task", "model", "logger", "trainer", "metrics"])
def test_every_file_of_a_group_says_what_it_is_in_its_first_line(group: str) -> None:
    for path in (conf_dir() / group).glob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path.name


@pytest.mark.parametrize("logger", sorted(p.stem for p in Path(conf_dir(), "logger").iterdir()))
def test_every_logger_fits_the_code_it_names(compose: Compose, logger: str) -> None:
    assert check(compose("exp=grokking", f"logger={logger}")) == []


def would_start(compose: Compose, words: str) -> None:
    flags, overrides = hoist(shlex.split(words))
    if "-m" in flags:
        cfg = compose(*overrides, "hydra.mode=MULTIRUN", mode=RunMode.MULTIRUN)
        assert sweep.check_sweep(cfg)
    else:
        assert check(compose(*overrides)) == []
