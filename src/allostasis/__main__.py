"""One command from a config to a verdict: `python -m allostasis +exp=grokking preset=quick`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from allostasis import __version__
from allostasis.core import help as texts
from allostasis.core import memory
from allostasis.core.config import conf_dir, register

log = logging.getLogger(__name__)

WITH_VALUE = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn",
    "--config-dir", "-cd", "--experimental-rerun",
}  # fmt: skip
SWEEP, SHOW = {"--multirun", "-m"}, {"--cfg", "-c", "--info", "-i"}
INFO = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}


def hoist(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command into flags and overrides, each in the order given.

    Hydra's parser takes overrides in one block, so that `+exp=x -m seed=0,1` fails unless flags
    come first. `+exp=x` means `exp=x`, since `exp` stands in the defaults list.

    Example:
        >>> hoist(["+exp=grokking", "-m", "seed=0,1"])
        (['-m'], ['exp=grokking', 'seed=0,1'])
    """
    flags: list[str] = []
    overrides: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        if equals and flag in WITH_VALUE:
            flags += [flag, value]
        elif word in WITH_VALUE:
            flags += [word, *left[:1]]
            del left[:1]
        elif word in {"--info", "-i"}:
            flags += [word, left.pop(0) if left and left[0] in INFO else "all"]
        elif word.startswith("-"):
            flags.append(word)
        else:
            overrides.append(_spelled(word))
    return flags, overrides


def _spelled(word: str) -> str:
    """An override as Hydra has to be given it."""
    if word.startswith("+exp="):
        return word.removeprefix("+")
    key, _, value = word.partition("=")
    if key != "condition":
        return word
    names = ("'null'" if name.strip() == "null" else name for name in value.split(","))
    return f"{key}={','.join(names)}"


def job(cfg: DictConfig) -> None:
    """Do one run, unless it is done already; Hydra calls this once a run, maybe in a worker."""
    from hydra.core.hydra_config import HydraConfig

    from allostasis.core import sweep
    from allostasis.core.config import run_folders

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    is_done = all(sweep.status(place) == "done" for place in run_folders(cfg, folder))
    if is_done and not cfg.force:
        name, path = sweep.label(cfg), os.path.relpath(folder)
        log.info("%s is finished, see %s; force=true repeats it", name, path)
        return
    if cfg.threads is None:
        cfg.threads = sweep.threads(hydra.launcher)

    from allostasis.run import run

    run(cfg, folder, command=" ".join(["python -m allostasis", *hydra.overrides.task]))


def main() -> int:
    """Read the command line and do what it says.

    Returns:
        Exit status: 0 done, 1 a run failed, 2 the command is wrong and nothing was started,
        130 and 143 stopped by Ctrl-C and SIGTERM.
    """
    flags, overrides = hoist(sys.argv[1:])
    experiment = next((word[4:] for word in overrides if word.startswith("exp=")), None)
    is_help = bool({"--help", "-h"} & {*flags})
    if not (flags or overrides) or (is_help and experiment is None):
        print(texts.overview(), end="")
        return 0
    if "--version" in flags:
        print(f"allostasis {__version__}")
        return 0
    if conflict := _conflict({*flags}):
        print(conflict, file=sys.stderr)
        return 2
    if is_help and (header := texts.describe(experiment or "")):
        print(header, end="\n\n")
    return _hydra(flags, overrides)


def _conflict(flags: set[str]) -> str | None:
    """What Hydra would say with a traceback."""
    if flags & SWEEP and flags & SHOW:
        return "-m sweeps, --cfg and --info show one config: give one of them"
    if "--resolve" in flags and not flags & {"--cfg", "-c", "--help", "-h"}:
        return "--resolve goes with --cfg or --help"
    return None


def _hydra(flags: list[str], overrides: list[str]) -> int:
    from hydra import main as hydra_main
    from hydra.errors import CompactHydraException

    from allostasis.core.compose import command_problems
    from allostasis.core.interrupt import Interrupted
    from allostasis.core.validate import refusal

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
    memory.keep_freed()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # has Hydra raise its errors, not print them
    warnings.filterwarnings("error", message=r"Callback Supervisor\.")  # no check, no run
    register()
    sys.argv[1:] = [*flags, *overrides]
    try:
        hydra_main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    except CompactHydraException as error:
        given = dict(zip(flags, flags[1:], strict=False))
        problems = command_problems(
            overrides,
            config_dir=given.get("--config-dir", given.get("-cd")),
            is_sweep=bool(SWEEP & {*flags}),
        )
        print(refusal(problems or [f"config: {error}"]), file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return stop.exit_status if isinstance(stop, Interrupted) else 130
    return 0


if __name__ == "__main__":
    from allostasis.__main__ import main as importable  # workers find `job` under this name

    sys.exit(importable())
