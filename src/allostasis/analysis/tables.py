"""Tables of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from allostasis.analysis import statistics as st
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.estimands import generator
from allostasis.analysis.summaries import final
from allostasis.analysis.suppressors import exponential
from allostasis.analysis.text import bracket, number

Times = tuple[np.ndarray, np.ndarray]
"""Times, and whether each is censored."""


@dataclass(frozen=True)
class Table:
    """A table of the report; every cell is text.

    Attributes:
        title: Heading.
        columns: Heads.
        rows: Cells.
        note: What to know before reading it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def event_table(arms: Sequence[Arm], events: Sequence[str]) -> Table:
    """When each run's events came; a run that ended before one is censored there."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            steps = [run.event(event) for event in events]
            cells = [f"> {run.last_step}" if step is None else number(step) for step in steps]
            rows.append((arm.condition, str(run.seed), *cells, str(run.last_step), run.run_id))
    columns = ("condition", "seed", *events, "last step", "run")
    return Table(
        "When each phase began",
        columns,
        tuple(rows),
        "A number after > is the last step of a run that did not get there (censored).",
    )


def survival_table(arms: Sequence[Arm], event: str) -> Table:
    """Kaplan-Meier median and mean restricted to the common end; each arm against the first."""
    samples = {arm.condition: arm.times_to(event) for arm in arms}
    until = st.common_end(*samples.values())
    first = arms[0]
    rows = []
    for arm in arms:
        times, censored = samples[arm.condition]
        curve = st.kaplan_meier(times, censored)
        rng = generator(f"{event}: {arm.condition} against {first.condition}")
        mean, _ = curve.restricted_mean(until)
        compared = [""] * 3
        if arm is not first:
            compared = [
                _difference(samples[arm.condition], samples[first.condition], until, rng),
                _ratio(arm, first, event),
                _log_rank(samples[arm.condition], samples[first.condition], rng),
            ]
        rows.append((
            arm.condition,
            f"{int((~censored).sum())} of {len(times)}",
            number(curve.median),
            bracket(curve.median_interval()),
            f"{number(mean)} {_greenwood(curve, until)}",
            *compared,
        ))
    note = (
        f"Intervals are 95 %. Those of the median and of the mean, restricted to T = "
        f"{number(until)}, are log-log Greenwood's; that of a difference of restricted means is by "
        "a bootstrap over seeds; that of a ratio of times, paired by seed and told only where "
        "nothing is censored, by t on logarithms. Log-rank tests are two-sided, by relabelling, "
        f"and not corrected; z > 0: sooner than {first.condition}.{_cadence(arms)}"
    )
    heads = (
        "condition", "reached", "median", "95 %", "restricted mean",
        f"minus {first.condition}", f"times {first.condition}", "log-rank",
    )  # fmt: skip
    return Table(f"Steps to {event}", heads, tuple(rows), note)


def _cadence(arms: Sequence[Arm]) -> str:
    """How well a time is known, where configs say how often the event was looked for."""
    try:
        every = max(arm.setting("module.eval_every") for arm in arms)
    except UndefinedError:
        return ""
    return f" A time is that of an evaluation; the event lies within the {every} updates before it."


def _greenwood(curve: st.KaplanMeier, until: float) -> str:
    try:
        return bracket(curve.restricted_interval(until))
    except UndefinedError as undefined:
        return f"({undefined})"


def _difference(left: Times, right: Times, until: float, rng: np.random.Generator) -> str:
    one, other = (np.minimum(times, until) for times, _ in (left, right))
    told = number(float(one.mean() - other.mean()))
    try:
        return f"{told} {bracket(st.resampled_difference(one, other, rng))}"
    except UndefinedError as undefined:
        return f"{told} ({undefined})"


def _ratio(arm: Arm, first: Arm, event: str) -> str:
    """Geometric mean of the ratios of times of the seeds that both arms have."""
    steps: list[dict[int, float]] = []
    for one in (arm, first):
        times, censored = one.times_to(event)
        if censored.any():
            return "censored"
        steps.append(dict(zip(one.seeds, times, strict=True)))
    ratios = np.array([steps[0][seed] / steps[1][seed] for seed in steps[0] if seed in steps[1]])
    if not len(ratios):
        return "no seed in both"
    told = number(float(stats.gmean(ratios)))
    try:
        return f"{told} {bracket(exponential(st.t_interval(np.log(ratios))))}"
    except UndefinedError as undefined:
        return f"{told} ({undefined})"


def _log_rank(left: Times, right: Times, rng: np.random.Generator) -> str:
    try:
        z, _ = st.log_rank(left, right)
        test = st.permuted_times(left, right, rng)
    except UndefinedError as undefined:
        return str(undefined)
    return f"z = {z:.2f}, p = {test.two_sided():.3g}"


def exploratory(arms: Sequence[Arm]) -> Table:
    """Final values, which no claim is about: mean over seeds of the mean of the last 5 % of steps.

    Metrics by layer, head or position are left to the figures: their rows are never averaged
    together.
    """
    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for arm in arms:
        for run in arm.runs:
            for metric, split, unit, curve in run.scalar_curves():
                cell = values.setdefault((metric, split or "", unit), {})
                cell.setdefault(arm.condition, []).append(final(curve))
    rows = [
        (*key, *(_mean(cells.get(arm.condition, [])) for arm in arms))
        for key, cells in sorted(values.items())
    ]
    heads = ("metric", "split", "unit", *(f"{a.condition}: mean, 95 %, n" for a in arms))
    note = (
        "Means of the last 5 % of steps, computed but registered by no claim: not corrected for "
        "how many there are, and in support of nothing."
    )
    if any(run.model for arm in arms for run in arm.runs):
        note += (
            " Of the untouched model; n counts seeds, which draw prompts, so that an interval over "
            "them is about the prompts and not about other models."
        )
    return Table("Exploratory: final values", heads, tuple(rows), note)


def _mean(values: list[float]) -> str:
    if not values:
        return "not recorded"
    array = np.array(values)
    try:
        interval = bracket(st.t_interval(array))
    except UndefinedError:
        interval = "no interval"
    return f"{number(array.mean())} {interval} n={len(values)}"
