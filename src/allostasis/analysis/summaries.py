"""One number a run, or a prompt: what a claim can name as its `summary`.

A claim writes `final`, `at_step(t_mem)` or `log_change(t_low, t_high)`; the name is the function's
here (a dot is an underscore), the words in brackets are its last arguments. A function whose
first parameter is `curve` reads the metric that the claim selects, those whose first is `run` read
the run (and with a `beside`, the other arm's of that seed), those whose first is `cells` read one
seed's runs in all cells of a factorial, and those of `analysis.prompts` read its prompts. Events
are those of run.json's summary (`t_mem`, `t_clean`, `t_grok`, `t_loss`) and `t_low`, `t_high`:
where test accuracy passes 15 % and 85 %. Every function returns a float, a `Time` or a pair for a
ratio, and raises `UndefinedError` with the reason where the run has none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from allostasis.analysis import prompts
from allostasis.analysis.curves import TABLES, Curve, RunView, Table, UndefinedError
from allostasis.analysis.surrogates import rank_correlation

if TYPE_CHECKING:
    import pandas as pd

FINAL_SHARE = 0.05  # of the steps, at the end
DWELL = 500  # steps above a level before a curve may be called stable
MIN_CELLS = 6  # of a factorial, with the event, for a line through them
# parameters that the records fill; a claim's words fill the others
READ = ("curve", "run", "cells", "beside", *TABLES)


@dataclass(frozen=True)
class Time:
    """A time to an event; right-censored where the run ended before the event came."""

    step: float
    censored: bool


def final(curve: Curve) -> float:
    """Mean over the last 5 % of steps, by trapezoids, so that cadence does not weigh in."""
    start = curve.steps[-1] * (1 - FINAL_SHARE)
    late = curve.steps >= start
    steps, values = curve.steps[late], curve.values[late]
    if len(steps) == 1:
        return float(values[0])
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def end(curve: Curve) -> float:
    """Value at the last recorded step, where experiments read their whole held-out set."""
    return float(curve.values[-1])


def end_except(curve: Curve, run: RunView, condition: str, when: str) -> float:
    """`end`, but in the runs of one condition the value recorded at a step before.

    For a source that compares arms after unequal numbers of updates.

    Args:
        curve: A metric.
        run: The run.
        condition: Whose runs are read at the step.
        when: The step; it must have been recorded.
    """
    if run.condition != condition:
        return end(curve)
    at = np.flatnonzero(curve.steps == int(when))
    if not len(at):
        raise UndefinedError(f"step {when} of {condition} was not recorded")
    return float(curve.values[at[0]])


def dwell(curve: Curve, level: str) -> float:
    """Steps at the end of the run over which no recorded value is below a level; 0: the last is."""
    below = np.flatnonzero(curve.values < float(level))
    begin = 0 if not len(below) else below[-1] + 1
    return float(curve.steps[-1] - curve.steps[begin]) if begin < len(curve.steps) else 0.0


def stable(curve: Curve, level: str) -> float:
    """1 where no recorded value of the last 500 steps or more is below a level, else 0.

    A mean over the end does not say so: `final` may lie above a level that the curve falls below.
    """
    return float(dwell(curve, level) >= DWELL)


def at_accuracy(curve: Curve, run: RunView, level: str) -> float:
    """Value where the run's held-out accuracy first reaches a level, linear between records."""
    accuracy = run.curve("accuracy", split="test")
    step = accuracy.rises_through(float(level))
    if step is None:
        raise UndefinedError(f"accuracy {level} was not reached by step {run.last_step}")
    return curve.at(step)


def peak(curve: Curve) -> float:
    """Highest recorded value."""
    return float(curve.values.max())


def auc(curve: Curve) -> float:
    """Mean over all steps, by trapezoids."""
    return float(np.trapezoid(curve.values, curve.steps) / (curve.steps[-1] - curve.steps[0]))


def at_step(curve: Curve, run: RunView, when: str) -> float:
    """Value at an event or at a step number, linear between records."""
    return curve.at(float(when) if when.isdigit() else run.at_event(when))


def crossing(curve: Curve, run: RunView, level: str) -> Time:
    """First step at which the curve reaches a level, linear between records; else censored."""
    step = curve.rises_through(float(level))
    if step is None:
        return Time(float(run.last_step), censored=True)
    return Time(step, censored=False)


def final_over(curve: Curve, run: RunView, when: str) -> float:
    """`final` as a multiple of the value at an event."""
    return final(curve) / at_step(curve, run, when)


def final_over_metric(curve: Curve, run: RunView, metric: str) -> float:
    """`final` as a multiple of another metric's `final` in the same run."""
    return final(curve) / final(run.curve(metric))


def change(curve: Curve, run: RunView, start: str, end: str) -> float:
    """Value at the second event minus value at the first."""
    return at_step(curve, run, end) - at_step(curve, run, start)


def log_change(curve: Curve, run: RunView, start: str, end: str) -> float:
    """Change of the natural logarithm from the first event to the second."""
    first, last = at_step(curve, run, start), at_step(curve, run, end)
    if min(first, last) <= 0:
        raise UndefinedError(f"logarithm of {min(first, last):.3g}, which is not positive")
    return float(np.log(last / first))


def rises(curve: Curve, run: RunView, start: str, end: str) -> float:
    """1 where the value is higher at the second event than at the first, else 0."""
    return float(change(curve, run, start, end) > 0)


def falls(curve: Curve, run: RunView, start: str, end: str) -> float:
    """1 where the value is lower at the second event than at the first, else 0."""
    return float(change(curve, run, start, end) < 0)


def peaks_before(curve: Curve, run: RunView, event: str) -> float:
    """1 where the highest recorded value lies strictly before an event, else 0."""
    return float(curve.steps[int(curve.values.argmax())] < run.at_event(event))


def time_to(run: RunView, event: str) -> Time:
    """Step of an event; censored at the run's last step where it has not come."""
    step = run.event(event)
    return Time(float(run.last_step), censored=True) if step is None else Time(step, censored=False)


def reached(run: RunView, event: str) -> float:
    """1 where the event came by the end of the run, else 0."""
    return float(run.event(event) is not None)


def not_reached(run: RunView, event: str) -> float:
    """1 where the run ended before the event came (it is censored), else 0."""
    return 1 - reached(run, event)


def precedes(run: RunView, first: str, second: str) -> float:
    """1 where the first event came strictly before the second, which may still be to come."""
    steps = run.event(first), run.event(second)
    if steps == (None, None):
        raise UndefinedError(f"neither {first} nor {second} was reached by step {run.last_step}")
    earlier, later = (np.inf if step is None else step for step in steps)
    return float(earlier < later)


def transition_width(run: RunView) -> float:
    """(Step at 85 % test accuracy - step at 15 %) / t_grok."""
    return (run.at_event("t_high") - run.at_event("t_low")) / run.at_event("t_grok")


def spearman_velocity_published(curve: Curve, run: RunView) -> float:
    """Spearman correlation of the velocities of test accuracy and of the metric, as published.

    `np.gradient` of both without the steps' spacing, where 15 % < accuracy < 85 %. It changes with
    the recording cadence, and its own p-value takes samples of a smooth curve for independent.
    """
    return rank_correlation(*run.published_velocities(curve))[0]


def spearman_velocity_uniform(curve: Curve, run: RunView) -> float:
    """Spearman correlation of the velocities of test accuracy and of the metric.

    Over the transition, on a uniform grid of steps as coarse as the coarsest cadence in it.
    """
    accuracy, values = run.over_transition(curve)
    return rank_correlation(np.gradient(accuracy), np.gradient(values))[0]


def head_variance_ratio(run: RunView, value: str) -> float:
    """Variance of suppressors' writes over clean heads' (E1), found by one kind of ablation."""
    return _ratio_of(f"head_write_variance.ratio_{value}", run, value)


def stream_variance_ratio(run: RunView, value: str) -> float:
    """Variance of the last residual stream, suppressors ablated over intact (E2)."""
    return _ratio_of(f"residual_variance.ratio_{value}", run, value)


def _ratio_of(metric: str, run: RunView, value: str) -> float:
    nothing = run.summary.get("no_ratio")
    if isinstance(nothing, Mapping) and value in nothing:
        raise UndefinedError(f"{nothing[value]} ({value} ablation)")
    return float(run.curve(metric).values[-1])


def holds(run: RunView, name: str) -> float:
    """1 where a check that the run made of itself came out as it should, else 0."""
    checks, undefined = run.summary.get("checks"), run.summary.get("no_check")
    if isinstance(undefined, Mapping) and name in undefined:
        raise UndefinedError(f"{undefined[name]} (check '{name}')")
    if not isinstance(checks, Mapping) or name not in checks:
        raise UndefinedError(f"the run made no check '{name}'")
    return float(bool(checks[name]))


def geometric_mean_of_shared(run: RunView, beside: RunView, name: str, intervention: str) -> float:
    """Geometric mean of a column over the clusters that both arms' runs of a seed have.

    Of two arms, the ratio of it is that of the clusters' own ratios: no arm is measured on others
    than its counterpart is.

    Args:
        run: The run.
        beside: The other arm's run of the same seed.
        name: A column of examples.parquet.
        intervention: Whose rows.
    """
    own, other = (_by_cluster(name, intervention, one).dropna() for one in (run, beside))
    shared = own[own.index.isin(other.index)]
    if shared.empty:
        raise UndefinedError(f"no cluster has {name} of {intervention} in both arms")
    if not (shared > 0).all():
        raise UndefinedError(f"logarithm of {shared.min():.3g}, which is not positive")
    return float(np.exp(np.log(shared.to_numpy()).mean()))


def mean_of_clusters(run: RunView, name: str, intervention: str) -> float:
    """Mean of a column over clusters, each weighing alike.

    Args:
        run: The run.
        name: A column of examples.parquet, of numbers or of true and false.
        intervention: Whose rows.
    """
    return float(_by_cluster(name, intervention, run).mean())


def _by_cluster(name: str, intervention: str, run: RunView) -> pd.Series:
    rows = run.prompts("examples")
    rows = rows[rows["intervention"] == intervention]
    if rows.empty or not {name, "cluster"} <= {*rows}:
        raise UndefinedError(f"{name} of {intervention} was not recorded, by cluster")
    return rows.astype({name: "float64"}).groupby("cluster")[name].mean()


def handover(run: RunView) -> float:
    """1 where amplitude hands over to alignment around the transition, else 0.

    On the training pairs, all of which are right by then: the logit scale peaks before t_grok, is
    lower at 85 % test accuracy than at 15 %, and mean log alignment is higher.
    """
    scale = run.curve("logit_scale", split="train")
    alignment = run.curve("log_margin.alignment", split="train")
    return (
        peaks_before(scale, run, "t_grok")
        * falls(scale, run, "t_low", "t_high")
        * rises(alignment, run, "t_low", "t_high")
    )


def scale_for_alignment(run: RunView, start: str, end: str) -> tuple[float, float]:
    """Loss of mean log logit scale and gain of mean log alignment between two events.

    On the training pairs, nearly all of which have a positive margin at both.

    Returns:
        (-change of log A, change of log G): numerator and denominator of kappa.
    """
    scale = run.curve("log_margin.scale", split="train")
    alignment = run.curve("log_margin.alignment", split="train")
    return -change(scale, run, start, end), change(alignment, run, start, end)


def scale_and_alignment(run: RunView) -> tuple[float, float]:
    """Mean log logit scale and mean log alignment at the end, on held-out data.

    Over the examples that the run itself answers with a positive margin. Against a control, kappa
    is the loss of the one over the gain of the other, from control to treatment.
    """
    scale = run.curve("log_margin.scale", split="test")
    alignment = run.curve("log_margin.alignment", split="test")
    return end(scale), end(alignment)


def shared_scale_and_alignment(run: RunView, beside: RunView) -> tuple[float, float]:
    """Mean log logit scale and mean log alignment of held-out examples that both arms answer.

    The last position of each held-out sequence at the end, where this run and the same seed's of
    the other arm both have a positive margin. Against a control, kappa is the loss of the one over
    the gain of the other, from control to treatment, on the same examples.
    """
    if run.test_sha256 != beside.test_sha256:
        runs = f"{run.run_id} and {beside.run_id}"
        raise UndefinedError(f"{runs} were tested on different sequences")
    terms = run.example_values(("margin", "logit_scale"))
    margin, scale = terms["margin"], terms["logit_scale"]
    others = beside.example_values(("margin",))["margin"].reindex(margin.index)
    both = (margin > 0) & (others > 0)
    if not both.any():
        raise UndefinedError("no example has a positive margin in both arms")
    return float(np.log(scale[both]).mean()), float(np.log(margin[both] / scale[both]).mean())


def crosses_first(run: RunView, start: str, end: str) -> float:
    """1 where alignment is half-way between its values at two events before the logit scale is.

    On the training pairs: the first recorded step from `start` on at which each has covered half
    of its own change; 0 where the scale is there first or both at once.
    """
    halves = []
    for metric in ("log_margin.alignment", "log_margin.scale"):
        curve = run.curve(metric, split="train")
        first, last = curve.at(run.at_event(start)), curve.at(run.at_event(end))
        if first == last:
            raise UndefinedError(f"{metric} is the same at {start} and {end}")
        later = curve.steps >= run.at_event(start)
        covered = (curve.values[later] - first) / (last - first)
        halves.append(curve.steps[later][covered >= 0.5].min(initial=run.at_event(end)))
    return float(halves[0] < halves[1])


def mediation(cells: Sequence[RunView], predictor: str) -> float:
    """R^2 of log t_grok on the log of one predictor, over the cells of a factorial of one seed.

    Args:
        cells: One seed's runs. Those without t_grok have no delay and are left out.
        predictor: `logit_scale`: mean over training pairs at t_mem, over the temperature, which is
            what the loss sees. `norm`: of all parameters, at t_mem.
    """
    grokked = [run for run in cells if run.event("t_grok") is not None]
    if len(grokked) < MIN_CELLS:
        raise UndefinedError(
            f"{len(grokked)} of {len(cells)} cells reached t_grok; a line needs {MIN_CELLS}"
        )
    known = {"logit_scale": effective_logit_scale, "norm": norm_at_memorisation}
    if predictor not in known:
        raise UndefinedError(f"no predictor '{predictor}'; there are {', '.join(known)}")
    x = np.log([known[predictor](run) for run in grokked])
    y = np.log([run.at_event("t_grok") for run in grokked])
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise UndefinedError(f"{predictor} or t_grok is the same in all cells")
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def mediation_gain(cells: Sequence[RunView], better: str, worse: str) -> float:
    """How much more of the variance of log t_grok one predictor explains than another."""
    return mediation(cells, better) - mediation(cells, worse)


def effective_logit_scale(run: RunView) -> float:
    """Mean logit scale of the training pairs at t_mem, over the loss's temperature."""
    temperature = float(run.record.config["module"].get("temperature", 1.0))
    return run.curve("logit_scale", split="train").at(run.at_event("t_mem")) / temperature


def norm_at_memorisation(run: RunView) -> float:
    """Norm of all parameters at t_mem."""
    return run.curve("weight_norm").at(run.at_event("t_mem"))


@dataclass(frozen=True)
class Summary:
    """A claim's summary, parsed.

    Attributes:
        function: The function of this module, or of `prompts`, that it names.
        arguments: The words in its brackets.
    """

    function: Callable[..., Any]
    arguments: tuple[str, ...]

    @property
    def reads_metric(self) -> bool:
        """Whether it needs a metric to be selected."""
        return "curve" in inspect.signature(self.function).parameters

    @property
    def reads_beside(self) -> bool:
        """Whether it needs the run of the other arm."""
        return "beside" in inspect.signature(self.function).parameters

    @property
    def prompts(self) -> Table | None:
        """The table of single prompts that it reads, or None where it reads the run."""
        first = next(iter(inspect.signature(self.function).parameters))
        return next((table for table in TABLES if table == first), None)

    def __call__(
        self,
        run: RunView,
        curve: Curve | None,
        cells: Sequence[RunView] = (),
        beside: RunView | None = None,
    ) -> float | Time | tuple[float, float]:
        """Reduce one run, with the other arm's beside it, or one seed's runs in all cells."""
        given = {"curve": curve, "run": run, "cells": cells, "beside": beside}
        parameters = inspect.signature(self.function).parameters
        return self.function(*(given[p] for p in parameters if p in READ), *self.arguments)

    def of_prompts(self, rows: pd.DataFrame) -> prompts.Column | prompts.Pair:
        """Reduce each prompt."""
        return self.function(rows, *self.arguments)


def functions() -> dict[str, Callable[..., Any]]:
    """Every summary that a claim can name: the functions here of a curve or a run, and `prompts`'.

    Example:
        >>> "final" in functions() and "total_effect" in functions()
        True
    """
    known = {**globals(), **vars(prompts)}
    found = ((name, f) for name, f in known.items() if inspect.isfunction(f))
    return {n: f for n, f in found if next(iter(inspect.signature(f).parameters), "") in READ}


def parse(text: str) -> Summary:
    """Read a summary as a claim writes it.

    Raises:
        ValueError: It is not written `name` or `name(word, word)`, no function has that name, or
            the number of words is wrong.

    Example:
        >>> parse("log_change(t_low, t_high)").arguments
        ('t_low', 't_high')
    """
    match = re.fullmatch(r"([a-z_.]+)(?:\(([^()]*)\))?", text.strip())
    if match is None:
        raise ValueError(f"summary '{text}' is not written name or name(word, word)")
    name, words = match[1].replace(".", "_"), match[2]
    known = functions()
    if name not in known:
        raise ValueError(f"no summary is called '{match[1]}'; there are {', '.join(known)}")
    function = known[name]
    arguments = () if words is None else tuple(word.strip() for word in words.split(","))
    wanted = [p for p in inspect.signature(function).parameters if p not in READ]
    if len(arguments) != len(wanted):
        raise ValueError(
            f"summary '{text}' has {len(arguments)} words in brackets; "
            f"'{match[1]}' takes {len(wanted)}: {', '.join(wanted) or 'none'}"
        )
    return Summary(function, arguments)
