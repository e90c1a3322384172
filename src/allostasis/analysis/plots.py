"""The source documents' plotting calls, over records; the report draws with the same functions.

Where the documents name a log file, these take the folder of a run, or of several that differ in
their seed alone, such as `outputs/grokking/high_wd`. The documents' metric names hold, `A_param` or
`sigma_sq_L0`; a figure that lacks its data raises `UndefinedError` with the reason.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from allostasis.analysis import (
    ablation_figures,
    arm_figures,
    canvas,
    figures,
    studies,
    suppressor_figures,
)
from allostasis.analysis.aggregate import Arm, arms, one_a_condition
from allostasis.analysis.canvas import Quantity
from allostasis.analysis.curves import Curve, RunView, UndefinedError
from allostasis.core.audit import KEYS
from allostasis.core.records import read_runs, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

log = logging.getLogger(__name__)

Source = Path | str | Iterable[Path | str]
Logs = Mapping[str, Source] | Sequence[Arm]
"""Folders of runs by the name to draw them under, or arms that are read already."""


@dataclass(frozen=True)
class Logged(Quantity):
    """A curve as audit.json has it: the mean over heads, and over layers unless one is named.

    Attributes:
        layer: Which layer; None: the mean over all.
    """

    layer: int | None = None

    def of(self, run: RunView) -> Curve:
        """This curve of a run."""
        rows = run.table(self.metric, split=self.split)
        if self.layer is not None:
            rows = rows[rows["layer"] == self.layer]
        if rows.empty:
            where = "" if self.layer is None else f" in layer {self.layer}"
            raise UndefinedError(f"{self.metric} was not recorded{where}")
        mean = rows.groupby("step")["value"].mean()
        return Curve(mean.index.to_numpy("int64"), mean.to_numpy("float64"))


def plot_overlay_time_series(
    log_files: Logs,
    metrics: Sequence[str | Quantity] = ("psi_accuracy", "A_activation", "sigma_sq"),
    output_path: Path | str | None = None,
    *,
    ceiling: Mapping[int, float] | None = None,
) -> Canvas:
    """Metrics against steps, arms over each other: a panel a metric, seeds thin, mean and interval.

    Args:
        log_files: At least one arm.
        metrics: The documents' names, or quantities.
        output_path: Where to save it as PNG.
        ceiling: Of the metrics, by place: the best that any model can reach, dashed.
    """
    there = _arms(log_files)
    drawn = arm_figures.overlay(there, _quantities(metrics, there), ceiling)
    return _saved(drawn, output_path)


def plot_time_series_divergence(
    log_files: Logs,
    metrics: Sequence[str | Quantity] = ("psi_accuracy", "A_activation"),
    output_path: Path | str | None = None,
    *,
    control: str | None = None,
) -> Canvas:
    """Arms minus a control over steps, paired by seed, with a mark where 0 is first excluded.

    Args:
        log_files: Two arms or more that share three seeds.
        metrics: The documents' names, or quantities.
        output_path: Where to save it as PNG.
        control: Name of the arm that is subtracted; by default the first.
    """
    there = _arms(log_files)
    base = there[0].condition if control is None else control
    return _saved(arm_figures.divergence(there, base, _quantities(metrics, there)), output_path)


def plot_phase_diagram(
    log_files: Logs,
    output_path: Path | str | None = None,
    *,
    across: Sequence[str | Quantity] = ("A_param",),
    up: str | Quantity = "psi_accuracy",
    events: figures.Events = figures.EVENTS,
) -> Canvas:
    """Accuracy against amplitude along training, arms side by side, coloured by step.

    Args:
        log_files: At least one arm.
        output_path: Where to save it as PNG.
        across: Horizontal axes, a row each.
        up: Vertical axis.
        events: What to mark, with its name and marker.
    """
    there = _arms(log_files)
    (vertical,) = _quantities([up], there)
    drawn = figures.phase_diagram(there, _quantities(across, there), vertical, events)
    return _saved(drawn, output_path)


def plot_heatmap_layer_compensation(
    log_files: Logs, output_path: Path | str | None = None
) -> Canvas:
    """Norm of the residual stream by depth after ablation: to clean, its null, and their excess.

    Args:
        log_files: Runs of the repair experiment; rows are named by what was ablated there.
        output_path: Where to save it as PNG.
    """
    return _saved(ablation_figures.compensation(_arms(log_files, rename=False)), output_path)


def plot_box_plots_variance(
    log_files: Logs,
    output_path: Path | str | None = None,
    *,
    metrics: Sequence[str | Quantity] = ("sigma_sq",),
) -> Canvas:
    """Boxes of variance: of what suppressors and clean heads write, or of the stream by arm.

    Args:
        log_files: Runs that looked for suppressors, or any arms; a box needs five values.
        output_path: Where to save it as PNG.
        metrics: Panels of the second kind.
    """
    there = _arms(log_files, rename=False)
    if any("suppressors" in run.run for arm in there for run in arm.runs):
        return _saved(suppressor_figures.variances(there), output_path)
    there = _arms(log_files)
    return _saved(arm_figures.ends(there, _quantities(metrics, there)), output_path)


def create_all_figures(log_dir: Path | str, output_dir: Path | str) -> list[Path]:
    """Every figure of the report, as PNG, in a folder for each experiment and pretrained model.

    A figure whose data no run holds is left out, with the reason in the log.

    Args:
        log_dir: Where runs lie, at any depth.
        output_dir: Where figures go.

    Returns:
        What was written.
    """
    views = _views(log_dir)
    written = []
    for exp, subject, group in studies.by_subject(views):
        home = Path(output_dir) / studies.anchor(studies.title(exp, subject))
        for figure in studies.figures(arms(group), studies.extension(exp, views)):
            try:
                image = canvas.png(figure)
            except UndefinedError as error:
                log.warning("%s of %s is not drawn: %s", figure.name, exp, error)
                continue
            path = home / f"{figure.name}.png"
            write_atomically(path, lambda file, image=image: file.write_bytes(image))
            written.append(path)
    return written


def _views(*folders: Path | str) -> list[RunView]:
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(
                f"{folder} is not a folder. A figure is drawn from records, not from a log: give "
                "the folder of a run or of an arm, such as outputs/grokking/high_wd."
            )
    views = [RunView(record) for folder in folders for record in read_runs(Path(folder))]
    if not views:
        raise ValueError(f"no run.json lies in or below {', '.join(map(str, folders))}")
    return views


def _arms(logs: Logs, *, rename: bool = True) -> list[Arm]:
    if not isinstance(logs, Mapping):
        return list(logs)
    found = []
    for name, source in logs.items():
        views = _views(*([source] if isinstance(source, Path | str) else source))
        there = one_a_condition(arms(views))
        if not there:
            raise UndefinedError(f"{name}: no run of it is finished")
        if rename and len(there) > 1:
            conditions = ", ".join(arm.condition for arm in there)
            raise ValueError(f"{name} is of several conditions ({conditions}); name one a folder")
        found += [replace(arm, condition=name) if rename else arm for arm in there]
    return found


def _quantities(metrics: Sequence[str | Quantity], there: Sequence[Arm]) -> list[Quantity]:
    return [_logged(name, there) if isinstance(name, str) else name for name in metrics]


def _logged(name: str, there: Sequence[Arm]) -> Logged:
    """A metric by the documents' name, labelled with the unit in which it was recorded."""
    key, _, layer = name.partition("_L")
    if key not in KEYS or (layer and not (layer.isdigit() and KEYS[key][2])):
        layered = [f"{known}_L0" for known, (*_, has_layers) in KEYS.items() if has_layers]
        raise ValueError(f"no metric is called '{name}'; there are {', '.join([*KEYS, *layered])}")
    metric, split, _ = KEYS[key]
    quantity = Logged(metric, "", split, layer=int(layer) if layer else None)
    if not any(_has(run, quantity) for arm in there for run in arm.runs):
        raise UndefinedError(f"{name} ({metric}) was recorded in none of these runs")
    about = next(
        (run.run["metrics"][base] for arm in there for run in arm.runs
         for base in (metric, metric.partition(".")[0]) if base in (run.run.get("metrics") or {})),
        {},
    )  # fmt: skip
    symbol = f" ({about['symbol']})" if "symbol" in about else ""
    where = f", layer {layer}" if layer else ""
    unit = f", {about['unit']}" if "unit" in about else ""
    return replace(quantity, label=f"{re.sub(r'[_.]', ' ', metric)}{symbol}{where}{unit}")


def _has(run: RunView, quantity: Quantity) -> bool:
    try:
        quantity.of(run)
    except UndefinedError:
        return False
    return True


def _saved(drawn: Canvas, output_path: Path | str | None) -> Canvas:
    with canvas.style() as plt:
        plt.close(drawn)  # it stays usable; a notebook shows what a cell returns, once
    if output_path is not None:
        image = canvas.rendered(drawn)
        write_atomically(Path(output_path), lambda file: file.write_bytes(image))
    return drawn
