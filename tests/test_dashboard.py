"""The dashboard draws what runs log, offline; without a key or a run it says what to do."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from allostasis import dashboard

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "experiments" / "2026-11-23_grokking_weight_decay"
SHORT = [
    "preset=quick", "threads=1", "device=cpu", "logger=wandb", "logger.mode=offline",
    "module.max_steps=20", "module.eval_every=10", "metrics.dense_every=10",
    "metrics.sparse_every=10", "metrics.drift_lag=10",
]  # fmt: skip
SMALL = {
    "grokking": ["task.p=23", "task.probe_size=64", "model.d_mlp=64"],
    "constraint": [
        "condition=control", "task.n_val=64", "task.n_contexts=4", "task.n_calibration=8000",
    ],
}  # fmt: skip


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder without runs, on a machine without a key; nothing that W&B remembers."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_BASE_URL", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    wandb.teardown()


def leet(*words: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def logged() -> list[tuple[dict[str, Any], set[str]]]:
    """What W&B's reader says of each run here, oldest first, and the names of its history."""
    found = []
    for folder in Path("wandb").glob("offline-run-*"):
        summary = json.loads(leet("--summary", str(folder)))
        records = [json.loads(line) for line in leet(str(folder)).splitlines()]
        steps = [one["history"]["item"] for one in records if one["type"] == "history"]
        found.append((summary, {name for step in steps for name in step}))
    return sorted(found, key=lambda run: run[0]["start_time"])


@pytest.fixture
def three_runs(alone: Path) -> list[tuple[dict[str, Any], set[str]]]:
    """Two short runs and a failed one, of one process."""
    from hydra import compose, initialize_config_dir

    from allostasis.core.config import register
    from allostasis.run import run

    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        for exp, small in SMALL.items():
            run(compose("config", [f"exp={exp}", *SHORT, *small]), alone / "outputs" / exp)
        absent = compose("config", ["exp=grokking", *SHORT, "device=cuda:99"])
        with pytest.raises(ValueError, match="cuda:99"):
            run(absent, alone / "outputs" / "absent")
    return logged()


@pytest.mark.slow
def test_every_panel_draws_what_runs_of_one_process_log_each_as_its_own_wandb_run(
    three_runs: list[tuple[dict[str, Any], set[str]]],
) -> None:
    from allostasis.callbacks.panels import PANELS, WORDS

    summaries = [summary for summary, _ in three_runs]
    assert len({summary["run_id"] for summary in summaries}) == 3
    assert [summary["state"] for summary in summaries] == ["finished", "finished", "failed"]
    assert summaries[2]["summary"]["error"].startswith("ValueError: device=cuda:99")
    assert 0 <= summaries[0]["summary"]["test/accuracy"] <= 1
    assert summaries[0]["summary"]["summary/steps"] == 20
    names = [names for _, names in three_runs[:2]]
    for panel in PANELS:
        assert panel.draws(names[0] | names[1]), f"no run logs what '{panel.title}' draws"
    kept = sorted(path.name for path in Path("wandb").glob("*run-*/files/media/images/maps/*.png"))
    assert len([name for name in kept if name.startswith("amplitude_param")]) == 2
    for own in names:
        drawn = {panel.symbol for panel in PANELS if panel.draws(own)}
        assert drawn == set(WORDS)


def test_interventions_have_a_number_each_and_intervals_have_three() -> None:
    from allostasis.callbacks.panels import flat_units
    from allostasis.core.records import UNITS_SCHEMA

    none = dict.fromkeys(UNITS_SCHEMA.names)
    row = none | {"split": "test", "metric": "logit_diff"}
    rows = [
        row | {"value": 3.6, "ci_low": 2.0, "ci_high": 5.0},
        row | {"value": 3.0, "intervention": "zero:9.6+9.9"},
        row | {"value": 3.1, "layer": 0, "head": 1, "intervention": "zero:0.1"},
    ]
    assert flat_units(rows) == {
        "test/logit_diff_mean": 3.6,
        "test/logit_diff_ci_lower": 2.0,
        "test/logit_diff_ci_upper": 5.0,
        "test/logit_diff/zero_9.6_9.9": 3.0,
    }


@pytest.mark.usefixtures("alone")
def test_the_verdicts_of_a_report_are_one_wandb_run_however_often_one_looks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = Path("outputs/report")
    (report / "figures").mkdir(parents=True)
    shutil.copy(STUDY / "verdicts.json", report)
    shutil.copy(STUDY / "figures" / "losses.png", report / "figures")
    assert dashboard.main(["--tell-only"]) == 2
    assert "no run was logged to W&B from here" in capsys.readouterr().err
    Path("wandb").mkdir()
    for _ in range(2):
        assert dashboard.main(["--tell-only"]) == 0
    ((run, names),) = logged()
    known = json.loads((STUDY / "verdicts.json").read_text())["grokking"]
    for claim in known:
        assert run["summary"][f"claims/grokking/{claim['id']}"] == claim["verdict"]
    assert {name.partition(".")[0] for name in names} >= {"claims", "figures/losses"}


@pytest.mark.usefixtures("alone")
def test_without_a_key_no_workspace_is_made_and_the_reason_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert dashboard.main(["--online"]) == 2
    told = capsys.readouterr().err
    assert "There is no W&B key" in told
    assert "`make dashboard`" in told


def test_the_workspace_has_every_panel_the_maps_and_the_claims_grouped_by_arm() -> None:
    pytest.importorskip("wandb_workspaces")
    from allostasis.callbacks.panels import MAPS, PANELS

    found = dashboard.verdicts(STUDY)
    made = dashboard.workspace("allostasis", "us", found)
    assert [section.name for section in made.sections] == [
        "claims",
        "separability (Psi)",
        "geometry (G)",
        "amplitude (A)",
        "variance (sigma^2)",
        "maps of layers by heads",
    ]
    (claims,) = made.sections[0].panels
    assert "| C1.time | undecided | 6750 |" in claims.markdown
    drawn = [panel.metric_regex for section in made.sections[1:5] for panel in section.panels]
    assert drawn == [f"^{panel.pattern}$" for panel in PANELS]
    assert len(made.sections[5].panels) == len(MAPS)
    assert [str(key.name) for key in made.runset_settings.groupby] == ["Group"]
    assert made._to_model().spec  # what the server would be sent


def test_tensorboard_is_shown_the_verdicts_and_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shutil.copy(STUDY / "verdicts.json", tmp_path)
    (tmp_path / "figures").mkdir()
    shutil.copy(STUDY / "figures" / "losses.png", tmp_path / "figures")
    for _ in range(2):
        dashboard.tell_tensorboard(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["figures/losses"]
    assert tags["tensors"] == ["claims/text_summary"]
