"""Run what a recorded study lacks, and keep each run's record as it finishes.

    python experiments/study.py experiments/<study> [--only ARM ...] [--variants V ...]
        [--seeds S ...] [--jobs N]

A study's folder holds design.yaml (command, axes), registered before its first run. Finished runs
lie under runs/ as run.json, config.yaml, claims.json, metrics.parquet and times.parquet, with the
further tables that the design's `keep` names; weights stay in the folder's own outputs/, which git
ignores. An interrupted run goes on where it stopped. A design with `variants` (by name: further
overrides, or what else of the design is another) has one such runs/ and outputs/ in a folder of
each variant, or in the `folder` that it names, where it reads another variant's runs; one with
`needs: cuda` says so and runs nothing where there is no GPU. One with `replicas` trains all seeds
of an arm in one block; several settings of an arm, as in `module.temperature=0.5,1`, are several
blocks. With `--jobs` several runs or blocks are done at once, all seeds of an arm before the next
arm; a run that reads another one waits for it.
"""

import argparse
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

KEPT = ("run.json", "config.yaml", "claims.json", "metrics.parquet", "times.parquet")


def finished(folder: Path) -> dict[tuple[str, str, int], Path]:
    """Finished runs below a folder, by experiment, condition and seed."""
    done: dict[tuple[str, str, int], Path] = {}
    for path in sorted(folder.rglob("run.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["status"] == "done":
            done[content["exp"], content["condition"], content["seed"]] = path.parent
    return done


def keep(study: Path, more: list[str]) -> None:
    """Copy the records of finished runs from outputs/ to runs/, one a condition and seed."""
    copy(finished(study / "outputs").values(), study, more)


def keep_all(study: Path, more: list[str]) -> None:
    """Copy the records of all finished runs, several settings of one condition included."""
    folders = [path.parent for path in sorted((study / "outputs").rglob("run.json"))]
    copy([folder for folder in folders if is_done(folder)], study, more)


def is_done(folder: Path) -> bool:
    """Whether a run ended as it should."""
    text = (folder / "run.json").read_text(encoding="utf-8")
    return bool(json.loads(text)["status"] == "done")


def copy(sources: Iterable[Path], study: Path, more: list[str]) -> None:
    """Copy records that are not kept yet."""
    for source in sources:
        target = study / "runs" / source.relative_to(study / "outputs")
        if not (target / "run.json").is_file():
            target.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copy2(source / name, target / name)
            for name in more:  # an arm that does nothing has fewer tables
                if (source / name).is_file():
                    shutil.copy2(source / name, target / name)


def main() -> int:
    """Do the study's missing runs one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="conditions, e.g. --only high_wd")
    parser.add_argument("--variants", nargs="*", default=[], help="of a design that has some")
    parser.add_argument("--seeds", nargs="*", type=int, default=[], help="some of the design's")
    parser.add_argument("--jobs", type=int, default=1, help="runs or blocks at a time")
    options = parser.parse_args()
    study: Path = options.study.resolve()
    design = yaml.safe_load((study / "design.yaml").read_text(encoding="utf-8"))
    if design.get("needs") == "cuda" and not has_gpu():
        print(f"{study.name} is registered for a GPU, and torch finds none here; nothing was run")
        return 2
    if unknown := set(options.seeds) - set(design["seeds"]):
        parser.error(f"the design has no seed {min(unknown)}; it has {design['seeds']}")
    if options.seeds and "replicas" in design:
        parser.error("--seeds: this design trains all seeds of an arm in one block")
    variants = design.get("variants", {"": []})
    do = work_in_blocks if "replicas" in design else work
    return max(
        do(study / _folder(name, variant), *_of_variant(design, variant), options)
        for name, variant in variants.items()
        if name in (options.variants or variants)
    )


def _folder(name: str, variant: list[str] | dict[str, Any]) -> str:
    return name if isinstance(variant, list) else variant.get("folder", name)


def _of_variant(
    design: dict[str, Any], variant: list[str] | dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A variant's design, and its further overrides."""
    return (design, variant) if isinstance(variant, list) else (design | variant, [])


def has_gpu() -> bool:
    """Whether torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


def settings(words: list[str]) -> list[list[str]]:
    """Overrides with several values each, as every combination of single ones.

    A list in brackets is one value.
    """
    values = []
    for word in words:
        key, _, value = word.partition("=")
        parts = [value] if value.startswith("[") else value.split(",")
        values.append([f"{key}={part}" for part in parts])
    return [list(chosen) for chosen in itertools.product(*values)]


def is_of(record: Path, condition: str, words: list[str]) -> bool:
    """Whether a finished run is of an arm: its condition and settings."""
    config = yaml.safe_load((record / "config.yaml").read_text(encoding="utf-8"))
    for word in words:
        key, _, value = word.partition("=")
        found: Any = config
        for part in key.split("."):
            found = found[part]
        if found != yaml.safe_load(value):
            return False
    return config["condition"] == condition


def done_seeds(folder: Path, condition: str, words: list[str]) -> set[int]:
    """Seeds of an arm whose record is kept."""
    kept = [path.parent for path in (folder / "runs").rglob("run.json")]
    return {
        json.loads((record / "run.json").read_text(encoding="utf-8"))["seed"]
        for record in kept
        if is_of(record, condition, words)
    }


def work_in_blocks(
    folder: Path, design: dict[str, Any], variant: list[str], options: argparse.Namespace
) -> int:
    """Do the missing arms of a design, all seeds of one in a block; keep what is finished."""
    folder.mkdir(exist_ok=True)
    seeds, more, only = design["seeds"], design.get("keep", []), options.only
    keep_all(folder, more)
    arms = [
        (condition, words)
        for condition, own in design["conditions"].items()
        for words in settings(own)
    ]

    def run(condition: str, words: list[str]) -> int:
        command = [f"exp={design['exp']}", f"condition={condition}", f"seed={seeds[0]}"]
        command += [f"module.replicas={design['replicas']}", f"module.n_seeds={len(seeds)}"]
        command += design["overrides"] + words + variant
        return subprocess.call([sys.executable, "-m", "allostasis", *command], cwd=folder)

    failed = 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is finished is kept then, too
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            asked = [
                pool.submit(run, condition, words)
                for condition, words in arms
                if (not only or condition in only)
                and done_seeds(folder, condition, words) != set(seeds)
            ]
            try:
                for job in as_completed(asked):
                    failed += job.result() != 0
                    keep_all(folder, more)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        keep_all(folder, more)
        n_done = sum(len(done_seeds(folder, condition, words)) for condition, words in arms)
        print(f"{len(arms) * len(seeds) - n_done} of {len(arms) * len(seeds)} runs missing")
    return int(failed > 0)


def work(
    folder: Path, design: dict[str, Any], variant: list[str], options: argparse.Namespace
) -> int:
    """Do the missing runs of a design, or of one variant of it, in a folder."""
    folder.mkdir(exist_ok=True)
    conditions, seeds, more = design["conditions"], design["seeds"], design.get("keep", [])
    chosen = [condition for condition in conditions if condition in (options.only or conditions)]
    order = list(itertools.product(options.seeds or seeds, chosen))
    if options.jobs > 1:
        order.sort(key=lambda one: chosen.index(one[1]))
    keep(folder, more)

    def do(seed: int, condition: str) -> bool:
        """Whether a run failed."""
        if (design["exp"], condition, seed) in finished(folder / "runs"):
            return False
        words = [f"exp={design['exp']}", f"condition={condition}", f"seed={seed}"]
        words += design["overrides"] + conditions[condition] + variant
        return subprocess.call([sys.executable, "-m", "allostasis", *words], cwd=folder) != 0

    failed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for has_failed in pool.map(lambda one: do(*one), order):
            failed += has_failed
            keep(folder, more)
    wanted = set(itertools.product([design["exp"]], conditions, seeds))
    missing = wanted - set(finished(folder / "runs"))
    where = f"{folder.name}: " if variant else ""
    print(f"{where}{len(missing)} of {len(conditions) * len(seeds)} runs missing; {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
