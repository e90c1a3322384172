"""Where a report's numbers come from: commits, versions, machines, commands, frozen claims."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from allostasis.analysis import claim_files
from allostasis.analysis.claims import Claim, ClaimError
from allostasis.analysis.curves import RunView

UNKNOWN = "unknown"
NAMED = ("allostasis", "python", "torch", "lightning", "numpy", "scipy", "pandas")


@dataclass(frozen=True)
class Commands:
    """What to type to have a study's finished runs again.

    Attributes:
        commit: The commit that they ran from; empty where the records name none.
        lines: Commands, in the order of runs; equal ones once.
        model: The pretrained model that they need; empty where they train their own.
        is_dirty: Whether any of the runs was made with changes that the commit does not hold.
    """

    commit: str
    lines: tuple[str, ...]
    model: str
    is_dirty: bool

    @property
    def text(self) -> str:
        """All of it, as a shell takes it."""
        start = [f"git checkout {self.commit}"] if self.commit else []
        start += ["make install && . .venv/bin/activate"]
        if self.model:
            start += [f"python -m allostasis.doctor   # says how to have {self.model}"]
        return "\n".join([*start, *self.lines])


def commands(runs: Sequence[RunView]) -> list[Commands]:
    """What reproduces the finished runs, commit by commit."""
    finished = [run for run in runs if run.status == "done"]
    return [
        Commands(
            "" if commit == UNKNOWN else commit,
            tuple(dict.fromkeys(_command(run) for run in group)),
            next((run.title for run in group if run.model), ""),
            any(run.run.get("dirty") for run in group),
        )
        for commit, group in _by(finished, "commit").items()
    ]


def provenance(
    runs: Sequence[RunView], claims: Sequence[Claim], folder: Path
) -> list[tuple[str, str]]:
    """Labels and texts, from the records and, for the frozen claims, from git.

    Args:
        runs: All runs of an experiment.
        claims: Its claims as they stand.
        folder: The experiment's package, which holds its claims.
    """
    finished = [run for run in runs if run.status == "done"]
    lines = [
        (f"commit {_short(commit)}", f"{_dirty(group)}; {_seeds(group)}")
        for commit, group in _by(finished, "commit").items()
    ]
    lines += [
        (f"device {device}", f"{_kinds(group)}; {_hours(group)}")
        for device, group in _by(finished, "device_name").items()
    ]
    for key in NAMED:
        found = {(run.run.get("versions") or {}).get(key) for run in finished} - {None}
        if found:
            lines.append((key, ", ".join(sorted(str(version) for version in found))))
    if claims:
        lines += [("claims", frozen_in_commit(finished, folder))]
    return lines


def _by(runs: Sequence[RunView], key: str) -> dict[str, list[RunView]]:
    groups: dict[str, list[RunView]] = defaultdict(list)
    for run in runs:
        groups[str(run.run.get(key) or UNKNOWN)].append(run)
    return dict(sorted(groups.items()))


def _short(commit: str) -> str:
    return commit[:12]


def _dirty(runs: Sequence[RunView]) -> str:
    if any(run.run.get("dirty") is None for run in runs):
        return "not run from a git checkout"
    changed = sum(run.run["dirty"] for run in runs)
    return f"with uncommitted changes in {changed} runs" if changed else "as committed"


def _seeds(runs: Sequence[RunView]) -> str:
    found: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        found[run.condition].append(run.seed)
    return "; ".join(f"{name} seeds {', '.join(map(str, s))}" for name, s in found.items())


def _kinds(runs: Sequence[RunView]) -> str:
    return ", ".join(sorted({str(run.run.get("device_resolved")) for run in runs}))


def _hours(runs: Sequence[RunView]) -> str:
    seconds = sum(float(run.run.get("wall_s") or 0) for run in runs)
    return f"{len(runs)} runs, {seconds / 3600:.2f} hours"


def _command(run: RunView) -> str:
    """The command that was typed, or one that names the run where the record has none."""
    command = run.run.get("command")
    if command is not None:
        return command if isinstance(command, str) else " ".join(command)
    return f"python -m allostasis +exp={run.exp} condition={run.condition} (settings: config.yaml)"


def frozen_in_commit(runs: Sequence[RunView], folder: Path) -> str:
    """Whether the claims that runs froze stand, word for word, in the commit that they ran from.

    A claim that does was written before the run, by a commit that the run's descends from.
    """
    try:
        top = Path(_git(folder, "rev-parse", "--show-toplevel"))
    except (subprocess.CalledProcessError, FileNotFoundError):
        return "not checked: no git repository"
    path = (folder / "claims.yaml").resolve().relative_to(top.resolve()).as_posix()
    return "; ".join(
        f"{_short(commit)}: {_compare(group, folder, f'{commit}:{path}')}"
        for commit, group in _by(runs, "commit").items()
    )


def _compare(runs: Sequence[RunView], folder: Path, blob: str) -> str:
    if blob.startswith(f"{UNKNOWN}:"):
        return "not checked: these runs record no commit"
    try:
        text = _git(folder, "show", blob)
    except subprocess.CalledProcessError:
        return "not checked: this repository has no such file in that commit"
    try:
        committed = claim_files.freeze(claim_files.read(text, origin=blob))["hashes"]
    except ClaimError:
        return "not checked: this version cannot read the claims of that commit"
    frozen = {pair for run in runs for pair in (run.run.get("claims") or {}).items()}
    unlike = sorted({name for name, digest in frozen if committed.get(name) != digest})
    if unlike:
        return f"not in it as frozen: {', '.join(unlike)}"
    return f"all {len(frozen)} claims stand in it as frozen"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
