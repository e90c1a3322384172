"""Trackers of a run: none, CSV, TensorBoard, W&B, MLflow. Our own records never depend on one."""

from __future__ import annotations

import logging
import netrc
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Gt
from filelock import FileLock
from hydra.utils import instantiate
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from omegaconf import DictConfig

from allostasis.callbacks import closing
from allostasis.callbacks.panels import layout
from allostasis.callbacks.recorder import Identity
from allostasis.core.records import RunRecord, read_run

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)

Mode = Literal["auto", "online", "offline", "disabled"]

PROVENANCE = (
    "commit", "dirty", "diff_sha256", "config_hash", "claims_hash", "threads", "platform",
    "versions", "command",
)  # fmt: skip
"""What run.json has at a run's start that a tracker shows beside its config."""


def build(cfg: DictConfig, *, identity: Identity, folder: Path) -> Logger | None:
    """The logger that a config's `logger` block asks for, or None for `logger=none`.

    Args:
        cfg: The block.
        identity: Names the run.
        folder: The run's folder; its config.yaml is there already.
    """
    _quieten_lightning()
    if not cfg:
        return None
    # as arguments of instantiate itself they would arrive as configs
    return instantiate(cfg, _partial_=True)(identity=identity, folder=folder)


def _quieten_lightning() -> None:
    """Keep Lightning to warnings, each once: no adverts, no facts that run.json states."""
    logging.getLogger("lightning").handlers.clear()  # the root's handler prints them too
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning")
    # on a login node; on a cluster it is submitit that calls srun
    warnings.filterwarnings("ignore", message="The `srun` command is available")


def close(logger: Logger | None, *, folder: Path) -> None:
    """End a run's logging, so that the next run of this process gets a tracked run of its own.

    Before, a tracker that shows more than curves is given what only the end of a run can tell.

    Args:
        logger: What `build` returned.
        folder: The run's folder; its run.json says how the run ended.
    """
    if logger is None:
        return
    record = read_run(folder)
    is_done = record.run["status"] == "done"
    try:
        closing.give(logger, record)
    finally:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=int(not is_done))
        else:
            logger.finalize("success" if is_done else "failed")


def csv(*, identity: Identity, folder: Path) -> CSVLogger:
    """`csv/version_<n>/metrics.csv` in the run's folder; a new version where a run is resumed."""
    del identity
    return CSVLogger(folder, name="csv")


def tensorboard(*, identity: Identity, folder: Path) -> TensorBoardLogger:
    """Event files in the run's folder: `tensorboard --logdir outputs` shows all runs.

    Its tab "Custom Scalars" has the dashboard's panels.
    """
    del identity
    logger = TensorBoardLogger(folder, name="tensorboard", version="")
    logger.experiment.add_custom_scalars(layout())
    return logger


def wandb(
    *,
    identity: Identity,
    folder: Path,
    project: str = "allostasis",
    mode: Mode = "auto",
    init_timeout: Annotated[float, Gt(0)] = 10.0,
) -> WandbLogger:
    """A W&B run of its own for this run, in one group with the other seeds of its arm.

    Args:
        identity: Names the run.
        folder: The run's folder; its config.yaml becomes the W&B run's config.
        project: W&B project.
        mode: `auto` is WANDB_MODE if that is set, else `online` if there is a key, else `offline`.
            W&B never asks for a key, and a server out of reach makes the run an offline one.
        init_timeout: Seconds to wait for the server.
    """
    run = start_wandb(
        project=project,
        mode=mode,
        init_timeout=init_timeout,
        group=_arm(identity),
        name=identity.run_id,
        job_type=identity.condition,
        tags=[identity.exp, identity.condition, f"seed={identity.seed}", identity.device],
        config=_settings(folder),
    )
    return WandbLogger(experiment=run)


def start_wandb(
    *,
    project: str,
    mode: Mode = "auto",
    init_timeout: float = 10.0,
    **words: Any,
) -> Run:
    """A W&B run that asks for nothing and fails for no server; see `wandb`.

    Args:
        project: W&B project.
        mode: As in `wandb`.
        init_timeout: Seconds to wait for the server.
        words: What else wandb.init is told, such as its name.
    """
    import wandb as client

    if mode == "auto":
        asked = os.environ.get("WANDB_MODE", "online" if has_key() else "offline")
    else:
        asked = mode

    def start(mode: Any) -> Run:
        run = client.init(
            project=project,
            mode=mode,
            settings=client.Settings(
                init_timeout=init_timeout,
                silent=True,
                console="off",
                disable_git=True,  # an address of a remote may hold a token
            ),
            **words,
        )
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step")
        return run

    try:
        run = start(asked)
    except client.Error as error:
        log.warning("W&B is out of reach (%s); this run is logged offline", _first_line(error))
        run = start("offline")
    if run.offline:
        log.info("W&B is offline: `wandb leet %s` shows the runs", Path(run.dir).parents[1])
    elif run.url:
        log.info("W&B run: %s", run.url)
    return run


def mlflow(*, identity: Identity, folder: Path, store: str = "mlruns") -> MLFlowLogger:
    """An MLflow run of its own for this run, in the experiment of its name.

    Its parameters are the config and where the run comes from; its artefacts, given at the end, the
    run's records and maps.

    Args:
        identity: Names the run.
        folder: The run's folder; its config.yaml and run.json are there already.
        store: Folder of the SQLite store and the artefacts; MLFLOW_TRACKING_URI wins if it is set.

    Raises:
        ModuleNotFoundError: MLflow is not installed.
    """
    if find_spec("mlflow") is None:
        raise ModuleNotFoundError(
            "logger=mlflow needs the package mlflow: pip install 'allostasis[mlflow]'"
        )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
    home = Path(store).resolve()
    home.mkdir(parents=True, exist_ok=True)
    remote = os.environ.get("MLFLOW_TRACKING_URI")
    tags = {key: str(value) for key, value in vars(identity).items()} | {"arm": _arm(identity)}
    # runs side by side would make the store's tables, or the experiment, twice
    with FileLock(home / ".lock"):
        logger = MLFlowLogger(
            experiment_name=identity.exp,
            run_name=identity.run_id,
            tracking_uri=remote or f"sqlite:///{home / 'mlflow.db'}",
            artifact_location=None if remote else (home / "artifacts").as_uri(),
            tags=tags,
        )
        log.info("MLflow run %s in %s", logger.run_id, remote or home)
    if remote is None:
        os.environ.pop(
            "MLFLOW_TRACKING_URI", None
        )  # MLflow sets it, and the next run would heed it
    logger.log_hyperparams(_settings(folder))
    return logger


def _arm(identity: Identity) -> str:
    """What the seeds of an arm have in common."""
    return f"{identity.exp}-{identity.condition}-{identity.run_id.rpartition('-')[2]}"


def _settings(folder: Path) -> dict[str, Any]:
    """A run's config, and under `provenance` where it comes from."""
    record: RunRecord = read_run(folder)
    known = {key: record.run[key] for key in PROVENANCE}
    return record.config | {"provenance": known}


def has_key() -> bool:
    """Whether W&B would find a key where it looks for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
