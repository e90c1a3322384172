"""What a tracker is given when a run has ended: summary numbers and words, maps, the records."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from allostasis.analysis import heatmap
from allostasis.analysis.canvas import Figure, png
from allostasis.analysis.run_maps import head_maps
from allostasis.callbacks.panels import MAPS
from allostasis.core.records import RunRecord

RECORDS = (
    "run.json", "config.yaml", "claims.json", "metrics.parquet", "times.parquet", "audit.json",
)  # fmt: skip
"""Files of a run that MLflow keeps as artefacts."""


def give(logger: Logger, record: RunRecord) -> None:
    """Give a tracker that shows more than curves what the end of a run tells.

    A run that did not come to its end has its status and its error alone.

    Args:
        logger: TensorBoard, W&B or MLflow; any other gets nothing.
        record: The run; its run.json is closed.
    """
    if not isinstance(logger, (TensorBoardLogger, WandbLogger, MLFlowLogger)):
        return
    words = {"status": str(record.run["status"])}
    if record.run["status"] == "done":
        step = int(record.times["step"].max())
        numbers, told = split(record.run["summary"])
        words |= told
        logger.log_metrics(numbers | {"summary/wall_s": float(record.run["wall_s"])}, step)
        for name, picture in pictures(record).items():
            _picture(logger, f"maps/{name}", picture, step)
    elif record.run["error"]:
        words["error"] = f"{record.run['error']['type']}: {record.run['error']['message']}"
    _words(logger, words)
    if isinstance(logger, MLFlowLogger):
        for file in RECORDS:
            if (record.folder / file).is_file():
                logger.experiment.log_artifact(logger.run_id, str(record.folder / file))


def split(summary: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """A run's summary as numbers and words; what is None or a list has neither.

    Example:
        >>> split({"t_grok": 440, "grokked": True, "selected": "9.6", "censored_at": None})
        ({'summary/t_grok': 440.0, 'summary/grokked': 1.0}, {'summary/selected': '9.6'})
    """
    numbers = {f"summary/{k}": float(v) for k, v in summary.items() if isinstance(v, (int, float))}
    return numbers, {f"summary/{k}": v for k, v in summary.items() if isinstance(v, str)}


def pictures(record: RunRecord) -> dict[str, np.ndarray]:
    """The run's maps as pixels: height, width, RGB from 0 to 255."""
    from matplotlib.image import imread

    found: dict[str, np.ndarray] = {}
    for name, one in head_maps(record, MAPS).items():
        drawn = png(Figure(name, one.title, "", lambda one=one: heatmap.draw([one])))
        found[name] = (imread(io.BytesIO(drawn), format="png")[..., :3] * 255).astype(np.uint8)
    return found


def _picture(
    logger: TensorBoardLogger | WandbLogger | MLFlowLogger,
    key: str,
    picture: np.ndarray,
    step: int,
) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, picture, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(key, [picture])
    else:
        logger.experiment.log_image(logger.run_id, picture, f"{key}.png")


def _words(
    logger: TensorBoardLogger | WandbLogger | MLFlowLogger, words: Mapping[str, str]
) -> None:
    if isinstance(logger, WandbLogger):
        logger.experiment.summary.update(words)
        return
    for key, text in words.items():
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, text)
        else:
            logger.experiment.set_tag(logger.run_id, key, text)
