"""run.json: what was run, with which code and versions, where, when, and how it ended."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, Literal

from allostasis.core.records import write_json

Status = Literal["running", "done", "failed", "interrupted", "failed_verification"]

PACKAGES = (
    "allostasis", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf",
    "transformer-lens", "sae-lens", "numpy", "scipy", "pandas", "wandb",
)  # fmt: skip


def now() -> str:
    """The time, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache
def commit() -> tuple[str | None, bool | None]:
    """The commit that this code stands on and whether the tree differs from it.

    Returns:
        Hash and dirty flag; both None where the package does not run from a git checkout.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None, None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None, None


@cache
def diff_sha256() -> str | None:
    """Hash of what the tree differs in from its commit; None where it does not differ."""
    root = Path(__file__).resolve().parents[3]
    if not commit()[1]:
        return None
    done = subprocess.run(["git", "-C", str(root), "diff", "HEAD"], capture_output=True, check=True)
    return hashlib.sha256(done.stdout).hexdigest()


@cache
def installed() -> tuple[str, ...]:
    """Every installed package as `name==version`, sorted; no addresses, so no tokens in them."""
    names = {(d.metadata["Name"].lower(), d.version) for d in distributions() if d.metadata["Name"]}
    return tuple(f"{name}=={number}" for name, number in sorted(names))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that carry the work, as far as they are there."""
    found: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class RunFile:
    """run.json of one run, rewritten whole and atomically at each change.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.content: dict[str, Any] = {}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def status(self) -> Status | None:
        """How the run stands, or None where none was started."""
        return self.content.get("status")

    def start(self, facts: Mapping[str, Any]) -> None:
        """Write the run's facts with status `running`.

        What earlier sessions of this run noted stays until it is noted anew: a run that goes on
        does not show its treatment's effect again.
        """
        sessions = [*self.content.get("sessions", []), {"started": now(), "ended": None}]
        head, dirty = commit()
        self.content |= {
            "schema_version": 1,
            **facts,
            "status": "running",
            "started": sessions[0]["started"],
            "finished": None,
            "wall_s": None,
            "sessions": sessions,
            "commit": head,
            "dirty": dirty,
            "diff_sha256": diff_sha256(),
            "versions": versions(),
            "platform": platform.platform(),
            "error": None,
            "pip_freeze": list(installed()),
        }
        write_json(self.path, self.content)

    def note(self, facts: Mapping[str, Any]) -> None:
        """Write facts as soon as they are known, for a session that may be killed."""
        self.content |= facts
        write_json(self.path, self.content)

    def elapsed(self) -> float:
        """Seconds worked on the run so far, summed over its sessions.

        A session that was killed left no end; its time is not known and not counted.
        """
        *past, last = self.content["sessions"]
        past = [session for session in past if session["ended"]]
        return sum(_seconds(s) for s in [*past, last | {"ended": last["ended"] or now()}])

    def finish(self, status: Status, facts: Mapping[str, Any], error: BaseException | None) -> None:
        """Write how the run ended."""
        session = self.content["sessions"][-1]
        session["ended"] = now()
        self.content |= facts
        self.content |= {
            "status": status,
            "finished": session["ended"],
            "wall_s": self.elapsed(),
            "error": None if error is None else describe(error),
        }
        write_json(self.path, self.content)


def _seconds(session: Mapping[str, str]) -> float:
    start, end = (datetime.fromisoformat(session[key]) for key in ("started", "ended"))
    return (end - start).total_seconds()


def describe(error: BaseException) -> dict[str, str]:
    """An error for run.json: type, message, traceback with the home folder written as `~`."""
    home = re.escape(str(Path.home()))
    trace = "".join(traceback.format_exception(error))
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": re.sub(rf"{home}(?=/)", "~", trace),
    }
