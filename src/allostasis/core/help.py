"""What the command line says of itself: the experiments found on disk and how to run them."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import yaml

from allostasis.core.config import conf_dir

OVERVIEW = """\
allostasis: how transformers keep working when their routing is constrained

  python -m allostasis +exp=grokking preset=quick       try it (CPU)
  python -m allostasis +exp=grokking -m seed=0,1,2      run the design over three seeds
  python -m allostasis.report outputs/grokking          figures and claims

experiments
{experiments}
Any setting is given as key=value; `-m` makes every a,b,c a run of its own, and repeating a command
goes on where it stopped. All settings of one: python -m allostasis +exp=grokking --help
"""


@dataclass(frozen=True)
class Experiment:
    """What the front page of an experiment, its YAML file, says.

    Attributes:
        name: The file's stem, as in `+exp=<name>`.
        header: The comment that heads the file, without its marks.
        conditions: The arms of its design.
    """

    name: str
    header: str
    conditions: tuple[str, ...]

    @property
    def question(self) -> str:
        """The header's first line."""
        return self.header.partition("\n")[0]


def experiments(folder: Path | None = None) -> list[Experiment]:
    """The experiments on disk, by name.

    Args:
        folder: Where their YAML files lie; by default the `exp` group of `conf_dir()`.
    """
    folder = conf_dir() / "exp" if folder is None else folder
    return [_read(path) for path in sorted(folder.glob("*.yaml"))]


def overview() -> str:
    """The help for one who has never seen it: what it is, commands to paste, the experiments."""
    found = experiments()
    width = max(len(experiment.name) for experiment in found) + 2
    lines: list[str] = []
    for experiment in found:
        texts = [experiment.question]
        if experiment.conditions:
            texts.append(f"conditions: {', '.join(experiment.conditions)}")
        for number, text in enumerate(texts):
            name = experiment.name if number == 0 else ""
            rest = " " * (width + 4)
            first = f"  {name:<{width}}  "
            lines.append(textwrap.fill(text, 100, initial_indent=first, subsequent_indent=rest))
    return OVERVIEW.format(experiments="\n".join(lines) + "\n")


def describe(name: str) -> str | None:
    """The header of one experiment's YAML file, or None if there is no such experiment."""
    return next((e.header for e in experiments() if e.name == name), None)


def _read(path: Path) -> Experiment:
    text = path.read_text(encoding="utf-8")
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            header.append(line.removeprefix("#").removeprefix(" "))
    conditions = (yaml.safe_load(text) or {}).get("conditions") or {}
    return Experiment(path.stem, "\n".join(header).strip(), tuple(map(str, conditions)))
