"""The documents' plotting calls, on records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from allostasis.analysis import plots
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.core import audit
from allostasis.core.records import read_run, read_runs

Writer = Callable[..., Path]
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def logs(write_run: Writer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three seeds of two arms, by the names that the documents draw them under."""
    root = tmp_path_factory.mktemp("logs")
    for seed in range(3):
        for condition in ("high_wd", "no_wd"):
            write_run(root, condition, seed, every=500)
    return {"High WD": root / "grokking/high_wd", "No WD": root / "grokking/no_wd"}


def test_a_curve_by_the_documents_name_is_that_of_their_log(logs: dict[str, Path]) -> None:
    record = read_runs(logs["High WD"])[0]
    steps = sorted({int(step) for step in record.metrics["step"]})
    times = record.times.reindex(range(len(steps)))
    times["step"], times["time"] = steps, 0.0
    log = audit.view(record.run, record.metrics, times)["metrics"]
    (arm,) = plots._arms({"High WD": record.folder})
    for key in ("psi_accuracy", "A_param", "A_ov", "A_logit_scale"):
        (quantity,) = plots._quantities([key], [arm])
        curve = quantity.of(RunView(record))
        expected = {row["step"]: row[key] for row in log if key in row}
        assert dict(zip(curve.steps.tolist(), curve.values, strict=True)) == pytest.approx(expected)


def test_overlay_and_phase_diagram_take_the_documents_arguments(
    logs: dict[str, Path], tmp_path: Path
) -> None:
    overlay, phases = tmp_path / "figures/figure_1.png", tmp_path / "figures/figure_3.png"
    drawn = plots.plot_overlay_time_series(
        log_files=logs, metrics=["psi_accuracy", "A_param"], output_path=str(overlay)
    )
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == [
        "High WD, 3 seeds", "No WD, 3 seeds",
    ]  # fmt: skip
    assert drawn.axes[0].get_ylabel() == "accuracy (Psi), 1"
    drawn = plots.plot_phase_diagram(log_files=logs, output_path=str(phases))
    titles = [axis.get_title(loc="left") for axis in drawn.axes[:2]]
    assert titles == ["High WD, 3 seeds", "No WD, 3 seeds"]
    assert overlay.read_bytes().startswith(PNG)
    assert phases.read_bytes().startswith(PNG)


def test_divergence_is_from_the_first_arm_and_paired_by_seed(logs: dict[str, Path]) -> None:
    drawn = plots.plot_time_series_divergence(logs, metrics=["psi_accuracy"])
    bold = max(drawn.axes[0].lines, key=lambda line: line.get_linewidth())
    runs = {name: RunView(read_run(next(folder.glob("seed=0/*")))) for name, folder in logs.items()}
    ends = {name: run.curve("accuracy", split="test").values[-1] for name, run in runs.items()}
    difference = ends["No WD"] - ends["High WD"]  # the fixture's last records do not vary by seed
    assert np.asarray(bold.get_ydata())[-1] == pytest.approx(difference, abs=1e-6)
    with pytest.raises(UndefinedError, match="no run of Free is finished"):
        plots.plot_time_series_divergence(logs, ["psi_accuracy"], control="Free")


def test_what_was_not_recorded_is_said_and_not_drawn_empty(logs: dict[str, Path]) -> None:
    with pytest.raises(UndefinedError, match=r"sigma_sq \(residual_variance.published\) was rec"):
        plots.plot_box_plots_variance(logs)
    with pytest.raises(UndefinedError, match=r"no rows of depths.parquet"):
        plots.plot_heatmap_layer_compensation(logs)
    with pytest.raises(ValueError, match="no metric is called 'A_parm'; there are psi_accuracy"):
        plots.plot_overlay_time_series(logs, ["A_parm"])
    with pytest.raises(ValueError, match="no metric is called 'psi_accuracy_L0'"):
        plots.plot_overlay_time_series(logs, ["psi_accuracy_L0"])


def test_boxes_are_of_every_arm_by_its_name(logs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "box.png"
    drawn = plots.plot_box_plots_variance(logs, path, metrics=["A_param"])
    assert [text.get_text() for text in drawn.axes[0].get_yticklabels()] == ["High WD", "No WD"]
    assert path.read_bytes().startswith(PNG)


def test_what_is_no_arm_is_refused_with_what_to_give(logs: dict[str, Path], tmp_path: Path) -> None:
    root = logs["High WD"].parent
    with pytest.raises(ValueError, match=r"of several conditions \(high_wd, no_wd\)"):
        plots.plot_phase_diagram({"grokking": root})
    with pytest.raises(ValueError, match="drawn from records, not from a log"):
        plots.plot_phase_diagram({"High WD": root / "audit_log_exp_c_high_wd_seed_42.json"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no run\.json lies in or below"):
        plots.create_all_figures(tmp_path / "empty", tmp_path)


def test_all_figures_are_the_reports_own_to_the_byte(tmp_path: Path, write_run: Writer) -> None:
    from allostasis import report

    write_run(tmp_path / "outputs", every=1000)
    made = plots.create_all_figures(tmp_path / "outputs", tmp_path / "figures")
    assert report.main([str(tmp_path / "outputs")]) == 0
    reported = tmp_path / "outputs/report/figures"
    assert {path.name for path in made} == {p.name for p in reported.iterdir()} - {"forest.png"}
    for path in made:
        assert path.parent.name == "grokking"
        assert path.read_bytes() == (reported / path.name).read_bytes()
