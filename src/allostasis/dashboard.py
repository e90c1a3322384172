"""The dashboard over all runs that were logged with logger=wandb or logger=tensorboard.

Try:
  python -m allostasis.dashboard                 W&B's own terminal dashboard, without a network
  python -m allostasis.dashboard --online        make the workspace on the W&B server; needs a key
  python -m allostasis.dashboard --tensorboard   TensorBoard, on this machine

Each first shows it the verdicts and figures of outputs/report, where there is a report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

Verdicts = Mapping[str, Sequence[Mapping[str, Any]]]
"""Content of verdicts.json: the claims of each experiment."""


class UsageError(ValueError):
    """What the user asked for cannot be shown; the message says what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Open or make a dashboard; exit status 2 where there is nothing to show or no way to."""
    words = _parser().parse_args(argv)
    report = words.outputs / "report"
    try:
        if words.online:
            print(make_workspace(words.project, words.entity, report))
            return 0
        if words.tensorboard:
            tell_tensorboard(report)
            command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(words.outputs)]
        else:
            folder = wandb_folder()
            tell_wandb(report, words.project)
            command = [sys.executable, "-m", "wandb", "leet", str(folder)]
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if words.tell_only else subprocess.call(command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m allostasis.dashboard",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--online", action="store_true", help="the workspace on the W&B server")
    kind.add_argument("--tensorboard", action="store_true", help="TensorBoard over the runs")
    parser.add_argument(
        "--tell-only", action="store_true", help="show it the report's verdicts, open nothing"
    )
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs lie")
    parser.add_argument("--project", default="allostasis", help="W&B project")
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="W&B entity")
    return parser


# ------------------------------------------------------------------ what the report found


def verdicts(report: Path) -> Verdicts:
    """What a report says of the claims; nothing where there is no report yet."""
    path = report / "verdicts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def rows(found: Verdicts) -> list[dict[str, str]]:
    """One row a claim: experiment, claim, verdict, estimate, interval, why."""
    return [
        {
            "experiment": experiment,
            "claim": claim["id"],
            "verdict": claim["verdict"],
            "estimate": _number(claim.get("estimate")),
            "interval": _interval(claim.get("interval")),
            "why": claim.get("reason") or "",
            "text": claim["text"],
        }
        for experiment, claims in found.items()
        for claim in claims
    ]


def _interval(interval: Mapping[str, Any] | None) -> str:
    if interval is None:
        return ""
    ends = f"[{_number(interval['low'])}, {_number(interval['high'])}]"
    return f"{ends} {interval['level']:.0%} {interval['method']}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def markdown(found: Verdicts) -> str:
    """The claims as a table."""
    heads = ("experiment", "claim", "verdict", "estimate", "interval", "why")
    cells = [[row[head].replace("|", "\\|") for head in heads] for row in rows(found)]
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(report: Path) -> dict[str, Path]:
    """A report's pictures by name, `figures/...`."""
    paths = sorted((report / "figures").rglob("*.png"))
    return {path.relative_to(report).with_suffix("").as_posix(): path for path in paths}


def tell_wandb(report: Path, project: str) -> None:
    """Log a report's verdicts and figures as a W&B run `claims`, once a report.

    The run's summary has a verdict a claim, for those who see no tables.
    """
    found = verdicts(report)
    if not found:
        return
    digest = hashlib.sha256((report / "verdicts.json").read_bytes()).hexdigest()[:12]
    if any(wandb_folder(is_needed=False).glob(f"*run-*-claims-{digest}")):
        return

    import pandas as pd
    import wandb

    from allostasis.callbacks import loggers

    run = loggers.start_wandb(
        project=project, id=f"claims-{digest}", name="claims", job_type="report", tags=["report"]
    )
    table = rows(found)
    run.summary.update({f"claims/{r['experiment']}/{r['claim']}": r["verdict"] for r in table})
    content: dict[str, Any] = {"claims": wandb.Table(dataframe=pd.DataFrame(table))}
    content |= {name: wandb.Image(str(path)) for name, path in figures(report).items()}
    run.log(content)
    run.finish()


def tell_tensorboard(report: Path) -> None:
    """Write a report's verdicts and figures as events beside it.

    Raises:
        UsageError: TensorBoard is not installed.
    """
    if find_spec("tensorboard") is None:
        raise UsageError("TensorBoard is missing: pip install 'allostasis[tensorboard]'")
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    found = verdicts(report)
    if not found:
        return
    folder = report / "tensorboard"
    for old in folder.glob("events.*"):
        old.unlink()
    with SummaryWriter(folder) as writer:
        writer.add_text("claims", markdown(found))
        for name, path in figures(report).items():
            writer.add_image(name, imread(path)[..., :3], dataformats="HWC")


# ------------------------------------------------------------------ W&B


def wandb_folder(*, is_needed: bool = True) -> Path:
    """The one folder of W&B's runs: ./wandb, or that of WANDB_DIR.

    Raises:
        UsageError: It is not there.
    """
    folder = Path(os.environ.get("WANDB_DIR", "."), "wandb")
    if is_needed and not folder.is_dir():
        raise UsageError(
            f"{folder} is not there: no run was logged to W&B from here. "
            "One that is: python -m allostasis +exp=grokking preset=quick logger=wandb"
        )
    return folder


def make_workspace(project: str, entity: str | None, report: Path) -> str:
    """Save the workspace on the W&B server.

    Returns:
        Its address.

    Raises:
        UsageError: There is no key, the extra is not installed, or the server refuses.
    """
    from allostasis.callbacks import loggers

    if not loggers.has_key():
        raise UsageError(
            "There is no W&B key, so no workspace can be made. `wandb login` or WANDB_API_KEY sets "
            "one; without, `make dashboard` shows the runs in this terminal."
        )
    if find_spec("wandb_workspaces") is None:
        raise UsageError("wandb-workspaces is missing: pip install 'allostasis[dashboard]'")
    import wandb
    from requests import RequestException

    try:
        tell_wandb(report, project)
        owner = entity or wandb.Api(timeout=20).default_entity
        if not owner:
            raise UsageError("The W&B key has no default entity; name one with --entity")
        return workspace(project, owner, verdicts(report)).save().url
    except (wandb.Error, RequestException) as error:
        first = str(error).partition("\n")[0]
        raise UsageError(f"W&B refused, or is out of reach: {first}") from error


def workspace(project: str, entity: str, found: Verdicts) -> Workspace:
    """The workspace: a section a quantity, the maps, and the claims of a report if there is one.

    Runs are grouped by arm: the seeds of one condition at the same settings, as a mean and range.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces import expr

    from allostasis.callbacks.panels import MAPS, PANELS, WORDS

    sections = [
        workspaces.Section(
            name=word,
            is_open=True,
            panels=[
                reports.LinePlot(
                    title=panel.title,
                    x="trainer/global_step",
                    metric_regex=f"^{panel.pattern}$",
                    log_y=panel.is_log,
                    groupby_aggfunc="mean",
                    groupby_rangefunc="minmax",
                )
                for panel in PANELS
                if panel.symbol == symbol
            ],
        )
        for symbol, word in WORDS.items()
    ]
    sections.append(
        workspaces.Section(
            name="maps of layers by heads",
            panels=[reports.MediaBrowser(title=name, media_keys=[f"maps/{name}"]) for name in MAPS],
        )
    )
    if found:
        sections.insert(
            0,
            workspaces.Section(
                name="claims",
                is_open=True,
                panels=[reports.MarkdownPanel(markdown=markdown(found))],
            ),
        )
    return workspaces.Workspace(
        name="allostasis",
        entity=entity,
        project=project,
        sections=sections,
        runset_settings=workspaces.RunsetSettings(groupby=[expr.Metric("Group")]),
        auto_generate_panels=False,
    )


if __name__ == "__main__":
    raise SystemExit(main())
