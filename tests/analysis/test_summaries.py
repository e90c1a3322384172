"""Curves and summaries of runs against curves whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from allostasis.analysis import summaries
from allostasis.analysis.curves import Curve, RunView, UndefinedError
from allostasis.core.records import read_run

Writer = Callable[..., Path]
LINE = Curve(np.arange(0, 101, 10), np.arange(0.0, 101, 10))


@pytest.fixture(scope="module")
def run(study: Path) -> RunView:
    return RunView(read_run(study / "grokking/high_wd/seed=3/auto-abc"))


@pytest.fixture(scope="module")
def flat(study: Path) -> RunView:
    return RunView(read_run(study / "grokking/no_wd/seed=3/auto-abc"))


def test_a_curve_is_linear_between_its_records() -> None:
    assert LINE.at(25.0) == 25
    assert LINE.rises_through(33.0) == pytest.approx(33)
    assert LINE.rises_through(0.0) == 0
    assert LINE.rises_through(101.0) is None
    with pytest.raises(UndefinedError, match="step 101 lies outside the recorded 0 to 100"):
        LINE.at(101.0)


def test_final_is_the_mean_of_the_last_twentieth_whatever_the_cadence() -> None:
    assert summaries.final(LINE) == 100  # only the last record lies there
    dense = Curve(np.array([0, 90, 95, 96, 97, 100]), np.array([0.0, 9, 1, 1, 1, 1]))
    assert summaries.final(dense) == pytest.approx(1.0)
    slope = Curve(np.array([0, 95, 96, 100]), np.array([0.0, 0, 1, 5]))
    assert summaries.final(slope) == pytest.approx(2.5)


def test_a_curve_is_stable_after_500_steps_above_the_level_and_not_before() -> None:
    steps = np.array([0, 400, 500, 700, 1000])
    late = Curve(steps, np.array([1.0, 0.2, 1.0, 1.0, 1.0]))
    assert summaries.dwell(late, "0.9") == 500
    assert summaries.stable(late, "0.9") == 1
    dips = Curve(steps, np.array([1.0, 1.0, 0.2, 1.0, 1.0]))
    assert summaries.final(dips) == 1.0  # which says nothing of the dip
    assert (summaries.dwell(dips, "0.9"), summaries.stable(dips, "0.9")) == (300, 0)
    assert summaries.dwell(dips, "0.1") == 1000
    assert summaries.dwell(dips, "1.1") == 0


def test_one_condition_is_read_before_its_end(run: RunView) -> None:
    other = summaries.end_except(LINE, run, "baseline", "70")
    assert other == summaries.end(LINE) == 100
    assert summaries.end_except(LINE, run, run.condition, "70") == 70
    with pytest.raises(UndefinedError, match=f"step 75 of {run.condition} was not recorded"):
        summaries.end_except(LINE, run, run.condition, "75")  # between two records


def test_area_and_peak() -> None:
    assert summaries.auc(LINE) == pytest.approx(50)
    assert summaries.peak(LINE) == 100


def test_the_transition_runs_from_15_to_85_percent_of_test_accuracy(run: RunView) -> None:
    # accuracy is 0.01 + 0.985 sigmoid((step - middle) / 300)
    middle = 9_000 + 250 * (3 - 3.5)
    for event, level in (("t_low", 0.15), ("t_high", 0.85)):
        share = (level - 0.01) / 0.985
        assert run.event(event) == pytest.approx(middle + 300 * np.log(share / (1 - share)), abs=1)
    width = summaries.transition_width(run)
    assert width == pytest.approx((run.at_event("t_high") - run.at_event("t_low")) / 9_800)


def test_the_transition_starts_where_accuracy_leaves_15_percent_for_good(run: RunView) -> None:
    steps = np.arange(0, 1_001, 100)
    values = np.array([0, 0.2, 0.1, 0.05, 0.1, 0.2, 0.5, 0.9, 0.8, 1, 1.0])
    view = RunView(run.record)
    view._curves["accuracy", "test"] = Curve(steps, values)
    assert view.event("t_low") == pytest.approx(450)
    assert view.event("t_high") == pytest.approx(687.5)


def test_events_that_did_not_come_are_censored_or_undefined_but_never_a_number(
    flat: RunView,
) -> None:
    assert summaries.time_to(flat, "t_grok") == summaries.Time(20_000.0, censored=True)
    assert summaries.reached(flat, "t_grok") == 0
    assert summaries.not_reached(flat, "t_grok") == 1
    assert summaries.precedes(flat, "t_mem", "t_grok") == 1
    assert summaries.precedes(flat, "t_grok", "t_mem") == 0
    with pytest.raises(UndefinedError, match="neither t_clean nor t_grok was reached"):
        summaries.precedes(flat, "t_clean", "t_grok")
    with pytest.raises(UndefinedError, match="t_grok was not reached by step 20000"):
        summaries.peaks_before(LINE, flat, "t_grok")
    with pytest.raises(UndefinedError, match="t_high was not reached"):
        summaries.transition_width(flat)
    with pytest.raises(UndefinedError, match="no event 't_grokk'"):
        flat.event("t_grokk")


def test_logarithms_of_what_is_not_positive_are_undefined(run: RunView) -> None:
    sinking = Curve(np.array([0, 20_000]), np.array([1.0, -1.0]))
    with pytest.raises(UndefinedError, match="logarithm of .* not positive"):
        summaries.log_change(sinking, run, "t_mem", "20000")


def test_changes_read_the_curve_at_the_events(run: RunView) -> None:
    scale = run.curve("logit_scale", split="train")
    logs = run.curve("log_margin.scale", split="train")
    by_log = summaries.log_change(scale, run, "t_low", "t_high")
    assert by_log == pytest.approx(summaries.change(logs, run, "t_low", "t_high"), abs=1e-3)
    assert by_log < 0
    assert summaries.falls(scale, run, "t_low", "t_high") == 1
    assert summaries.rises(scale, run, "t_low", "t_high") == 0
    assert summaries.handover(run) == 1


def test_scale_for_alignment_adds_up_to_the_change_of_the_log_margin(run: RunView) -> None:
    lost, gained = summaries.scale_for_alignment(run, "t_mem", "t_grok")
    margin = run.curve("log_margin", split="train")
    assert gained - lost == pytest.approx(summaries.change(margin, run, "t_mem", "t_grok"))


def test_the_published_velocity_changes_with_the_cadence_and_the_uniform_one_hardly(
    run: RunView,
) -> None:
    curve = run.curve("amplitude_param.published")
    rng = np.random.default_rng(0)
    noisy = Curve(curve.steps, curve.values + 0.2 * rng.normal(size=len(curve.values)).cumsum())
    published = summaries.spearman_velocity_published(noisy, run)
    accuracy, values, _ = run.beside_accuracy(noisy)
    inside = (accuracy > 0.15) & (accuracy < 0.85)
    from scipy.stats import spearmanr

    literal = spearmanr(np.gradient(accuracy)[inside], np.gradient(values)[inside])
    assert published == pytest.approx(literal.statistic)
    assert -1 <= summaries.spearman_velocity_uniform(noisy, run) <= 1


def test_a_curve_is_never_an_average_over_heads_or_positions(run: RunView) -> None:
    with pytest.raises(ValueError, match="several rows a step; select one by head"):
        run.curve("amplitude_param")
    with pytest.raises(ValueError, match="select one by position"):
        run.curve("fourier_power")
    with pytest.raises(ValueError, match="select one by split"):
        run.curve("logit_scale")
    heads = [run.curve("amplitude_param", layer=0, head=head).values for head in range(4)]
    assert run.total("amplitude_param").values == pytest.approx(np.sum(heads, axis=0))


def test_rows_that_repeat_exactly_count_once(tmp_path: Path, write_run: Writer) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = write_run(tmp_path)
    path = folder / "metrics.parquet"
    table = pq.read_table(path)
    once = RunView(read_run(folder)).curve("accuracy", split="test")
    pq.write_table(pa.concat_tables([table, table.slice(0, 500)]), path)
    twice = RunView(read_run(folder)).curve("accuracy", split="test")
    assert np.array_equal(once.steps, twice.steps)


def test_what_was_not_recorded_is_said_by_name(run: RunView) -> None:
    with pytest.raises(UndefinedError, match="dprime was not recorded on split 'test'"):
        run.curve("dprime", split="test")


def test_end_is_the_last_record_and_at_accuracy_reads_where_accuracy_arrives(run: RunView) -> None:
    accuracy = run.curve("accuracy", split="test")
    steps = Curve(np.array([0, 20_000]), np.array([0.0, 20_000.0]))  # its value is the step
    assert summaries.end(steps) == 20_000.0
    assert accuracy.at(summaries.at_accuracy(steps, run, "0.5")) == pytest.approx(0.5)
    with pytest.raises(UndefinedError, match=r"accuracy 1.5 was not reached by step 20000"):
        summaries.at_accuracy(steps, run, "1.5")


class Cell(RunView):
    """A run of a factorial as `mediation` reads it: norm, logit scale, temperature, delay."""

    def __init__(self, norm: float, scale: float, temperature: float, delay: float | None) -> None:
        self.values = {"weight_norm": norm, "logit_scale": scale}
        self.delay = delay
        self.record = SimpleNamespace(config={"module": {"temperature": temperature}})

    def event(self, name: str) -> float | None:
        return {"t_mem": 100.0, "t_grok": self.delay}[name]

    def curve(self, metric: str, *, split: str | None = None, **_: int | None) -> Curve:
        del split
        return Curve(np.array([0, 100, 200]), np.full(3, self.values[metric]))


def planted(power_of_scale: float, power_of_norm: float) -> list[Cell]:
    cells = []
    for i, norm in enumerate((10.0, 20.0, 40.0)):
        for temperature in (0.5, 1.0, 2.0):
            scale = norm**2 / 3 * (1 + 0.1 * i)
            effective = scale / temperature
            delay = 50 * effective**power_of_scale * norm**power_of_norm
            cells.append(Cell(norm, scale, temperature, delay))
    return cells


def test_mediation_finds_which_of_two_planted_predictors_sets_the_delay() -> None:
    by_scale, by_norm = planted(0.7, 0.0), planted(0.0, 2.0)
    assert summaries.mediation(by_scale, "logit_scale") == pytest.approx(1)
    assert summaries.mediation(by_norm, "norm") == pytest.approx(1)
    assert summaries.mediation_gain(by_scale, "logit_scale", "norm") > 0.1
    assert summaries.mediation_gain(by_norm, "logit_scale", "norm") < -0.1


def test_cells_without_a_delay_are_left_out_and_too_few_give_no_line() -> None:
    cells = planted(0.7, 0.0)
    cells[0].delay = None
    assert summaries.mediation(cells, "logit_scale") == pytest.approx(1)
    for cell in cells[:4]:
        cell.delay = None
    with pytest.raises(UndefinedError, match="5 of 9 cells reached t_grok; a line needs 6"):
        summaries.mediation(cells, "logit_scale")
    with pytest.raises(UndefinedError, match="no predictor 'width'"):
        summaries.mediation(planted(1, 1), "width")


@pytest.mark.parametrize(("lead", "expected"), [(-100, 1.0), (100, 0.0), (0, 0.0)])
def test_the_first_to_be_half_way_is_found(run: RunView, lead: int, expected: float) -> None:
    steps = np.arange(0, 1_001, 50)
    view = RunView(run.record)

    def ramp(middle: float, sign: float) -> Curve:
        return Curve(steps, sign / (1 + np.exp(-(steps - middle) / 40.0)))

    view._curves["log_margin.scale", "train"] = ramp(500, -1.0)
    view._curves["log_margin.alignment", "train"] = ramp(500 + lead, 1.0)
    view._curves["accuracy", "test"] = Curve(steps, np.linspace(0, 1, len(steps)))
    assert summaries.crosses_first(view, "t_low", "t_high") == expected


def test_kappa_of_shared_examples_reads_the_same_ones_of_both_arms(
    tmp_path: Path, write_run: Writer
) -> None:
    """Planted by seed: log A falls by 0.3 and log G rises by 0.5 on what both arms answer."""
    from allostasis.analysis.aggregate import arms
    from allostasis.analysis.claims import Claim
    from allostasis.analysis.verdicts import judge
    from allostasis.core.records import EXAMPLES_SCHEMA, read_runs, write_table

    data = {"test": {"n": 6, "sha256": "same"}}
    for seed in range(4):
        rng = np.random.default_rng(seed)
        log_a, log_g = rng.normal(3, 1, 6), rng.normal(-2, 1, 6)
        # each arm answers one that the other does not, with terms that would change everything
        signs = {"no_wd": np.array([1, 1, 1, 1, 1, -1]), "high_wd": np.array([1, 1, 1, 1, -1, 1])}
        for condition, (da, dg) in {"no_wd": (0.0, 0.0), "high_wd": (-0.3, 0.5)}.items():
            folder = write_run(tmp_path, condition, seed, every=1000, data=data)
            scale = np.exp(log_a + da + 9 * (signs["no_wd"] < 0))
            margin = signs[condition] * scale * np.exp(log_g + dg)
            rows = [
                {
                    "run_id": "r", "exp": "grokking", "condition": condition, "seed": seed,
                    "device": "auto", "step": 1, "split": "test", "metric": metric, "symbol": "A",
                    "unit": "1", "value": value, "n": 1, "example": example,
                }
                for metric, values in (("logit_scale", scale), ("margin", margin))
                for example, value in enumerate(values.tolist())
            ]  # fmt: skip
            write_table(folder / "examples.parquet", rows, EXAMPLES_SCHEMA)
    claim = Claim.model_validate({
        "id": "X", "source": "own", "text": "x", "direction": "inside", "bound": [0.5, 0.7],
        "estimand": {"summary": "shared_scale_and_alignment", "of": "kappa", "split": "test"},
        "arms": {"treatment": "high_wd", "control": "no_wd"}, "test": "tost", "family": "x",
        "status": "own",
    })  # fmt: skip
    views = [RunView(record) for record in read_runs(tmp_path)]
    (result,) = judge([claim], arms(views))
    assert result.inference is not None
    assert result.inference.n == 4
    assert result.inference.estimate == pytest.approx(0.3 / 0.5)
    left, right = views[0], views[4]
    assert (left.condition, right.condition, left.seed) == ("high_wd", "no_wd", right.seed)
    right.run["data"] = {"test": {"sha256": "another"}}
    with pytest.raises(UndefinedError, match="were tested on different sequences"):
        summaries.shared_scale_and_alignment(left, right)
    right.run["data"] = data
    (right.record.folder / "examples.parquet").unlink()
    again = RunView(read_run(right.record.folder))
    with pytest.raises(UndefinedError, match=r"examples\.parquet was not recorded"):
        summaries.shared_scale_and_alignment(left, again)
