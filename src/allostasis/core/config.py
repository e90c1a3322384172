"""What every run is told, which run that makes it, and where its files lie."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

BLOCKS = ("task", "model", "module", "metrics", "trainer", "logger")
"""Fields that name something to build: their keys are the signature of their `_target_`."""

NOT_IDENTITY = ("logger", "force", "threads", "gates", "allow", "conditions", "hydra")
"""Fields without a say in what is computed, beside the seed and the device."""

SINCE = {"k_child": 1, "schedule": "constant", "allow_weak_map": False}
"""Settings of a module that a design was given after runs of it were recorded, each at the value
that those runs had: at it, a setting leaves their hash as it was."""

NOT_IDENTITY_OF_TRAINER = ("enable_progress_bar", "enable_model_summary", "log_every_n_steps")


@dataclass
class RunConfig:
    """The top level of every config.

    Attributes:
        name: The experiment; the first folder under outputs/.
        seed: All randomness of the run derives from it.
        condition: The arm of the design: one of `conditions`.
        conditions: What sets the arms apart, side by side.
        device: `auto`, `cpu`, `cuda`, `cuda:<index>` or `mps`.
        stages: What to do: `fit`, `test` or both.
        force: Whether to repeat a run that is finished.
        threads: CPU threads of torch; null leaves the choice to the run.
        gates: Whether to check the instrument before the run, as `preset=full` does.
        allow_inert: Whether an arm whose intervention changes nothing may run, labelled `inert`.
        allow: Packages beside allostasis and lightning that a `_target_` may come from.
        task: The data.
        model: What is trained or looked at.
        module: What happens in a step.
        metrics: What is recorded, and how often.
        trainer: Lightning's Trainer.
        logger: Where a dashboard finds the run; our own records do not depend on it.
    """

    name: str = ""
    seed: Annotated[int, Ge(0)] = 0
    condition: str = "default"
    conditions: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    stages: list[str] = field(default_factory=lambda: ["fit", "test"])
    force: bool = False
    threads: Annotated[int, Ge(1)] | None = None
    gates: bool = False
    allow_inert: bool = False
    allow: list[str] = field(default_factory=list)
    task: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    module: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    logger: dict[str, Any] = field(default_factory=dict)


def conf_dir() -> Path:
    """The folder of configs: inside the package once installed, else the checkout's."""
    package = Path(__file__).resolve().parents[1]
    folders = (package / "conf", package.parents[1] / "conf")
    return next(folder for folder in folders if (folder / "config.yaml").is_file())


def register() -> None:
    """Tell Hydra the schema of a config and OmegaConf the resolver `${run_folder:}`."""
    from hydra.core.config_store import ConfigStore  # slower than help has time for

    schema = OmegaConf.structured(RunConfig)
    for block in (*BLOCKS, "conditions"):
        OmegaConf.set_struct(schema[block], False)  # their keys are checked against signatures
    ConfigStore.instance().store(name="run_config", node=schema)
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)


def config_hash(cfg: DictConfig, *, without: tuple[str, ...] = ()) -> str:
    """Twelve hex digits that two runs share if they compute the same but for seed and device.

    Taken over the resolved config with seed and device blanked, so that `task.seed: ${seed}` does
    not tell seeds apart. Left out is what has no say in the result:
    the dashboard, force, threads, gates, allow, the table of other conditions, what the trainer
    shows on its way, and what is `SINCE` there.

    Args:
        cfg: A composed config, with or without its `hydra` part.
        without: Further top-level fields to leave out.
    """
    blank = copy.deepcopy(cfg)
    with flag_override(blank, ["struct", "readonly"], [False, False]):
        blank.seed, blank.device = 0, "auto"
        settings: dict[str, Any] = {
            str(key): OmegaConf.to_container(value, resolve=True)
            if OmegaConf.is_config(value)
            else value
            for key, value in blank.items_ex(resolve=True)
            if key not in (*NOT_IDENTITY, *without)
        }
    settings["module"].pop("n_seeds", None)  # how many runs are done side by side, whatever a run's
    for key, value in SINCE.items():
        if settings["module"].get(key) == value:
            del settings["module"][key]
    for key in NOT_IDENTITY_OF_TRAINER:
        settings["trainer"].pop(key, None)  # what it shows on its way
    text = json.dumps(_plain(settings), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_folder(cfg: DictConfig) -> Path:
    """Where a run lies, from here: outputs/<exp>/<condition>/seed=<n>/<device>-<hash>."""
    device = cfg.device.replace(":", "")
    arm = Path("outputs", cfg.name, cfg.condition)
    return arm / f"seed={cfg.seed}" / f"{device}-{config_hash(cfg)}"


def run_folders(cfg: DictConfig, folder: Path) -> list[Path]:
    """The folders of all runs that a config makes: its own, and those of the next seeds of a block.

    Args:
        cfg: A composed config; `module.replicas` above 1 makes a block of as many seeds, or of
            `module.n_seeds`.
        folder: The folder of the config's own seed.
    """
    replicas = cfg.module.get("replicas", 1)
    n_seeds = cfg.module.get("n_seeds") or replicas if replicas > 1 else 1
    others = range(cfg.seed + 1, cfg.seed + n_seeds)
    return [folder, *(folder.parents[1] / f"seed={seed}" / folder.name for seed in others)]


def _run_folder(*, _root_: DictConfig) -> str:
    try:
        return run_folder(_root_).as_posix()
    except OmegaConfBaseException:
        return "invalid"  # Hydra asks before validate has had its say, and shows a traceback


def _plain(value: Any) -> Any:
    """Settings with one spelling for one number: 1.0 and 1 are the same."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
