"""A run's identity: what changes it and what does not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from allostasis.core.config import RunConfig, conf_dir, config_hash, register, run_folder

Make = Callable[..., DictConfig]


@pytest.fixture
def make() -> Make:
    """Compose the config of grokking under the given overrides."""
    register()

    def run(*words: str, with_hydra: bool = False) -> DictConfig:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return compose("config", ["exp=grokking", *words], return_hydra_config=with_hydra)

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["seed=7"],
        ["device=cpu"],
        ["logger=csv"],
        ["force=true"],
        ["threads=1"],
        ["gates=false"],
        ["trainer.enable_progress_bar=true"],
        ["+conditions.third={weight_decay: 3.0}"],
        ["module.weight_decay=1"],
        ["+module.k_child=1"],  # which runs that were recorded before the setting do not state
    ],
)
def test_what_has_no_say_in_the_result_keeps_the_hash(make: Make, words: list[str]) -> None:
    assert config_hash(make(*words)) == config_hash(make())


@pytest.mark.parametrize(
    "words",
    [
        ["condition=no_wd"],
        ["module.lr=2e-3"],
        ["module.weight_decay=1.5"],
        ["+module.k_child=2"],
        ["task.p=97"],
        ["task.seed=3"],
        ["trainer.max_steps=5"],
        ["preset=quick"],
        ["stages=[fit]"],
        ["metrics.dense_every=20"],
    ],
)
def test_what_has_a_say_in_the_result_changes_the_hash(make: Make, words: list[str]) -> None:
    assert config_hash(make(*words)) != config_hash(make())


def test_the_hash_is_twelve_hex_digits_and_blind_to_hydras_own_part(make: Make) -> None:
    assert config_hash(make(with_hydra=True)) == config_hash(make())
    assert len(config_hash(make())) == 12
    int(config_hash(make()), 16)


def test_hashing_leaves_the_config_as_it_was(make: Make) -> None:
    cfg = make("seed=3", "device=cuda:1")
    before = OmegaConf.to_yaml(cfg)
    config_hash(cfg)
    assert OmegaConf.to_yaml(cfg) == before


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_subnormal=False)
)
SETTINGS = st.dictionaries(st.text("abc_", min_size=1), SCALARS, max_size=5)


@given(SETTINGS, st.randoms())
def test_the_order_of_keys_does_not_matter(settings: dict[str, Any], random: Any) -> None:
    shuffled = list(settings.items())
    random.shuffle(shuffled)
    hashes = set()
    for content in (settings, dict(shuffled)):
        cfg = OmegaConf.structured(RunConfig)
        for key, value in content.items():
            cfg.module[key] = value if not isinstance(value, str) else f"text {value}".split("$")[0]
        hashes.add(config_hash(cfg))
    assert len(hashes) == 1


def test_a_run_lies_where_its_identity_says(make: Make) -> None:
    cfg = make("seed=3", "condition=no_wd", "device=cuda:1")
    where = Path("outputs/grokking/no_wd/seed=3", f"cuda1-{config_hash(cfg)}")
    assert run_folder(cfg) == where
    assert run_folder(make()).name.startswith("auto-")


def test_hydra_puts_a_run_where_its_identity_says(make: Make) -> None:
    cfg = make("seed=3", with_hydra=True)
    assert cfg.hydra.run.dir == run_folder(cfg).as_posix()


def test_a_config_without_an_identity_gives_a_folder_name_and_no_traceback(make: Make) -> None:
    cfg = make("condition=nothing", with_hydra=True)
    assert cfg.hydra.run.dir == "invalid"


def test_conf_lies_beside_the_package_that_uses_it() -> None:
    assert (conf_dir() / "exp" / "grokking.yaml").is_file()
