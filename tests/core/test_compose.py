"""What is said of commands that Hydra cannot compose."""

from pathlib import Path

import pytest
from hydra.errors import CompactHydraException

from allostasis.core import compose
from allostasis.core.config import register


@pytest.fixture(autouse=True)
def _schema() -> None:
    register()


def explain(*words: str, is_sweep: bool = False, config_dir: str | None = None) -> list[str]:
    found = compose.command_problems(words, config_dir=config_dir, is_sweep=is_sweep)
    return [str(problem) for problem in found]


def test_a_command_that_composes_has_no_problem() -> None:
    assert explain("exp=grokking", "seed=3", "module.lr=1", "~trainer.max_steps") == []
    assert explain("exp=grokking", "seed=3,4", "module.lr=1,2", is_sweep=True) == []


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seed", "seed: cannot be read; settings are written key=value"),
        ("sed=3", "sed: no such setting; did you mean 'seed'?"),
        ("seed=1.5", "seed=1.5: input should be a valid integer"),
        ("seed=null", "seed=None: input should be a valid integer"),
        ("force=perhaps", "force='perhaps': input should be a valid boolean, "
         "unable to interpret input"),
        ("stages=fit", "stages='fit': input should be a valid list"),
        ("weight_decay=1", "weight_decay: no such setting; did you mean 'module.weight_decay'?"),
        ("logger=wand", "logger=wand: no such logger; did you mean 'wandb'?"),
        ("hydra/launcher=jobs", "hydra/launcher=jobs: no such hydra/launcher; did you mean"),
        ("hydra.run.dri=x", "hydra.run.dri: no such setting; did you mean 'dir'?"),
        ("+seed=3", "seed=3: Could not append to config. An item is already at 'seed'."),
        ("~nothing", "nothing=null: Could not delete from config. 'nothing' does not exist."),
        ("seed=interval(0,1)", "seed=interval(0,1): several values make a sweep, which needs -m"),
    ],
)  # fmt: skip
def test_a_bad_word_is_explained(word: str, said: str) -> None:
    (problem,) = explain("exp=grokking", word)
    assert problem.startswith(said)


def test_an_interval_cannot_be_swept() -> None:
    assert explain("exp=grokking", "module.lr=interval(0,1)", is_sweep=True) == [
        "module.lr=interval(0,1): cannot be swept; write the values out: a,b,c"
    ]


def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.config_store import ConfigStore

    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(launchers, "joblib.yaml")
    assert explain("exp=grokking", "hydra/launcher=joblib") == [
        "hydra/launcher=joblib: not installed: pip install 'allostasis[parallel]'"
    ]


def test_a_users_own_experiment_is_found_and_its_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    mine = tmp_path / "exp" / "mine.yaml"
    mine.write_text("# @package _global_\nname: mine\nmodule: {_target_: mine.Mine}\n")
    assert explain("exp=mine", config_dir=str(tmp_path)) == []
    mine.write_text("# @package _global_\nname: mine\ncondtion: a\n")
    assert explain("exp=mine", config_dir=str(tmp_path)) == [
        "condtion: no such setting; did you mean 'condition'?"
    ]


def test_every_problem_found_is_one_that_hydra_would_refuse() -> None:
    """Each word that is called wrong is wrong by itself, and the right ones are not mentioned."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from allostasis.core.config import conf_dir

    right = ["seed=1", "module.lr=3", "logger=csv", "threads=2"]
    wrong = ["sed=1", "seed=x", "logger=cvs", "threads=[]"]
    assert len(explain("exp=grokking", *right, *wrong)) == len(wrong)
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        for word in wrong:
            with pytest.raises(CompactHydraException):
                hydra_compose("config", ["exp=grokking", word])
