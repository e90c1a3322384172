"""What is done once a command: refuse bad configs, check a whole sweep, tell how it ended."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.utils import get_method
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from allostasis.core.compose import composition_problems
from allostasis.core.config import config_hash
from allostasis.core.validate import Problem, check, check_blocks, check_fields, refusal

log = logging.getLogger(__name__)
trace = logging.getLogger("allostasis.traceback")  # goes to run.log alone, see conf/config.yaml

HEADLINES = 6  # numbers of a run's summary that a table shows


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        axes: What tells it from the sweep's other runs: setting and value.
        folder: Where it lies.
        exp: Its experiment.
        module: The `_target_` of its module.
        condition: Its arm.
        seed: Its seed.
    """

    axes: dict[str, str]
    folder: Path
    exp: str
    module: str
    condition: str
    seed: int

    @property
    def name(self) -> str:
        """What log lines call it."""
        return f"{self.exp} {self.condition} seed {self.seed}"


class Supervisor(Callback):
    """Hydra's callback around a command.

    Raises SystemExit, because Hydra turns an Exception of a callback into a warning.

    Args:
        advise: Dotted path of a function that knows what to say before a sweep of `n_seeds` seeds
            of an experiment; a path, because core knows nothing of claims.
    """

    def __init__(self, *, advise: str) -> None:
        self.advise = advise
        self.points: list[Point] = []

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a bad config before a folder is made."""
        problems = check(config)
        if problems:
            refuse(problems)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse the whole sweep if one of its runs is wrong."""
        self.points = check_sweep(config)
        done = sum(status(point.folder) == "done" for point in self.points)
        finished = f", {done} finished already" if done and not config.force else ""
        log.info("%s%s", _count(len(self.points), "run"), finished)
        if done < len(self.points) or config.force:
            self._advise()

    def _advise(self) -> None:
        for exp in dict.fromkeys(point.exp for point in self.points):
            own = [point for point in self.points if point.exp == exp]
            advice = get_method(self.advise)(
                exp=exp,
                module=own[0].module,
                conditions={point.condition for point in own},
                n_seeds=len({point.seed for point in own}),
            )
            if advice:
                log.warning("%s: %s", exp, advice)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Tell why a run failed, and let the others go on."""
        if job_return.status is JobStatus.FAILED:
            error = job_return._return_value
            path = Path(config.hydra.runtime.output_dir) / "run.log"
            log.error("%s failed: %s: %s", label(config), type(error).__name__, error)
            log.error("traceback in %s", os.path.relpath(path))
            trace.error("%s failed", label(config), exc_info=error)
            # run.json says so; told to Hydra, it would print the first failure and hide the others
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        """Leave with status 1 if the run did not come to its end."""
        if status(Path(config.hydra.runtime.output_dir)) != "done":
            raise SystemExit(1)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002
        """Show the runs; leave with status 1 if one did not come to its end."""
        Console(width=None if sys.stdout.isatty() else 120).print(table(self.points))
        if any(status(point.folder) != "done" for point in self.points):
            raise SystemExit(1)


def refuse(problems: Sequence[str | Problem], *, kind: str = "run") -> NoReturn:
    """Print what is wrong and leave with status 2."""
    sys.stderr.write(refusal(problems, kind=kind) + "\n")
    raise SystemExit(2)


def label(config: DictConfig) -> str:
    """A run's name in log lines."""
    return f"{config.name} {config.condition} seed {config.seed}"


def status(folder: Path) -> str | None:
    """How the run in a folder stands, or None where none was started."""
    return _record(folder).get("status")


def threads(launcher: DictConfig) -> int | None:
    """CPU threads of one job where several run at once; None where a job has the machine.

    On busy cores a job with a thread a core is slower by far than one that keeps to its share.
    """
    kind = str(launcher._target_).rpartition(".")[2]
    cores = os.cpu_count() or 1
    if kind == "JoblibLauncher":
        jobs = launcher.n_jobs if launcher.n_jobs > 0 else max(1, cores + 1 + launcher.n_jobs)
        return max(1, cores // jobs)
    if kind == "LocalLauncher":  # starts all jobs at once
        return launcher.cpus_per_task or 1
    return launcher.cpus_per_task if kind == "SlurmLauncher" else None


def check_sweep(config: DictConfig) -> list[Point]:
    """Compose and check every run of a sweep; refuse the sweep if one is wrong.

    Args:
        config: What Hydra composed of the command, with its `hydra` part.

    Returns:
        The runs, in the order in which they will start.
    """
    runs = _expand(config)
    cfgs = _compose(config, [words for words, _ in runs])
    names = [" ".join(f"{key}={value}" for key, value in axes.items()) for _, axes in runs]
    _refuse_any(names, [check_fields(cfg) for cfg in cfgs])
    _refuse_any(names, [check_blocks(cfg) for cfg in cfgs])
    points = [_point(axes, cfg) for (_, axes), cfg in zip(runs, cfgs, strict=True)]
    arms: dict[str, set[str]] = defaultdict(set)
    for cfg in cfgs:
        arms[config_hash(cfg, without=("condition",))].add(cfg.condition)
    lines = [
        f"condition={','.join(sorted(twins))}: these arms have the same settings"
        for twins in arms.values()
        if len(twins) > 1
    ]
    lines += [
        f"{os.path.relpath(folder)}: {count} runs of the sweep are this one"
        for folder, count in Counter(point.folder for point in points).items()
        if count > 1
    ]
    if lines:
        refuse(lines, kind="sweep")
    return points


def _expand(config: DictConfig) -> list[tuple[list[str], dict[str, str]]]:
    """Each run's overrides, and what tells it from the other runs."""
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides(_design(config))
    runs = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    settings = [dict(word.split("=", 1) for word in words) for words in runs]
    varying = [key for key in settings[0] if len({run[key] for run in settings}) > 1]
    axes = [{key: run[key] for key in varying} for run in settings]
    return list(zip(runs, axes, strict=True))


def _design(config: DictConfig) -> list[str]:
    """The experiment's own axes and then the command's, which win."""
    defaults = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    return [*defaults, *config.hydra.overrides.task]


def _compose(config: DictConfig, runs: Sequence[list[str]]) -> list[DictConfig]:
    """Each run's config; runs that differ in their seed alone are composed once."""
    loader = GlobalHydra.instance().config_loader()
    composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(words: list[str]) -> DictConfig:
        seeds = [word for word in words if re.fullmatch(r"seed=\d+", word)]
        if len(seeds) != 1:
            return loader.load_sweep_config(config, words)
        rest = tuple(word for word in words if word not in seeds)
        if rest not in composed:
            composed[rest] = loader.load_sweep_config(config, words)
        cfg = copy.deepcopy(composed[rest])
        cfg.seed = int(seeds[0].removeprefix("seed="))
        return cfg

    try:
        return [compose(words) for words in runs]
    except CompactHydraException as error:
        problems = composition_problems(
            [*config.hydra.overrides.hydra, *_design(config)],
            loader=loader,
            config_name=config.hydra.job.config_name,
            is_sweep=True,
        )
        refuse(problems or [f"config: {error}"], kind="sweep")


def _point(axes: dict[str, str], cfg: DictConfig) -> Point:
    folder = Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir)
    return Point(axes, folder, cfg.name, cfg.module["_target_"], cfg.condition, cfg.seed)


def _refuse_any(names: Sequence[str], problems: Sequence[Sequence[Problem]]) -> None:
    """Refuse a sweep, saying of each problem which runs have it, unless all do."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, own in zip(names, problems, strict=True):
        for problem in own:
            found[str(problem)].append(name)
    if found:
        lines = [text + _where(runs, len(names)) for text, runs in found.items()]
        refuse(lines, kind="sweep")


def _where(runs: Sequence[str], total: int) -> str:
    if len(runs) == total:
        return ""
    more = f"; and {len(runs) - 3} more" if len(runs) > 3 else ""
    return f" ({'; '.join(runs[:3])}{more})"


def table(points: Sequence[Point]) -> Table:
    """How the runs of a sweep ended: condition, seed, status, wall time, headline numbers."""
    records = [_record(point.folder) for point in points]
    summaries = [record.get("summary") or {} for record in records]
    numbers = [
        key
        for key in dict.fromkeys(key for summary in summaries for key in summary)
        if any(_is_headline(key, summary.get(key)) for summary in summaries)
    ][:HEADLINES]
    axes = [key for key in points[0].axes if key not in {"condition", "seed"}]
    grid = Table("condition", "seed", *axes, "status", "time", *numbers)
    for point, record, summary in zip(points, records, summaries, strict=True):
        ended = record.get("status") or "not started"
        grid.add_row(
            point.condition,
            str(point.seed),
            *(point.axes[key] for key in axes),
            "died" if ended == "running" else ended,
            _duration(record.get("wall_s")),
            *(_short(summary.get(key)) for key in numbers),
        )
    return grid


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _is_headline(key: str, value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) and not key.startswith("wall")


def _short(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
