"""Dashboards of a run: none, CSV, TensorBoard or W&B. Our own records never depend on one."""

from __future__ import annotations

import logging
import netrc
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Gt
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from allostasis.callbacks.recorder import Identity

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)


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


def close(logger: Logger | None, *, exit_code: int) -> None:
    """End a run's logging, so that the next run of this process gets a W&B run of its own.

    Args:
        logger: What `build` returned.
        exit_code: 0 if the run is done; a W&B run shows any other as failed.
    """
    if isinstance(logger, WandbLogger):
        logger.experiment.finish(exit_code=exit_code)
    elif logger is not None:
        logger.finalize("failed" if exit_code else "success")


def csv(*, identity: Identity, folder: Path) -> CSVLogger:
    """`csv/version_<n>/metrics.csv` in the run's folder; a new version where a run is resumed."""
    del identity
    return CSVLogger(folder, name="csv")


def tensorboard(*, identity: Identity, folder: Path) -> TensorBoardLogger:
    """Event files in the run's folder: `tensorboard --logdir outputs` shows all runs."""
    del identity
    return TensorBoardLogger(folder, name="tensorboard", version="")


def wandb(
    *,
    identity: Identity,
    folder: Path,
    project: str = "allostasis",
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
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
    import wandb as client

    if mode == "auto":
        asked = os.environ.get("WANDB_MODE", "online" if _has_key() else "offline")
    else:
        asked = mode

    def start(mode: Any) -> Run:
        run = client.init(
            project=project,
            group=f"{identity.exp}-{identity.condition}-{identity.run_id.rpartition('-')[2]}",
            name=identity.run_id,
            job_type=identity.condition,
            config=_config(folder),
            mode=mode,
            settings=client.Settings(
                init_timeout=init_timeout,
                silent=True,
                console="off",
                disable_git=True,  # an address of a remote may hold a token
            ),
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
    return WandbLogger(experiment=run)


def _config(folder: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _has_key() -> bool:
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
