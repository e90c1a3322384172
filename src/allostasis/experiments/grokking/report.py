"""What the report shows of grokking beside its claims.

An experiment's `report.py` offers two functions, `figures(arms)` and `tables(arms)`; the report
finds it beside the module that the records' config names. Arms hold finished runs only, one arm a
condition. `cells(arms)` gets all arms, for a factorial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from allostasis.analysis import factorial, outcomes
from allostasis.analysis import figures as draw
from allostasis.analysis import statistics as st
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure, Quantity
from allostasis.analysis.curves import HIGH, LOW, RunView, UndefinedError
from allostasis.analysis.estimands import generator
from allostasis.analysis.plots import plot_phase_diagram
from allostasis.analysis.tables import Table, event_table, survival_table
from allostasis.analysis.text import number

ACCURACY = Quantity("accuracy", "test accuracy (Psi)", "test")
AMPLITUDES = (
    Quantity("amplitude_param.published", "norm of W_V, as published (A_param), param"),
    Quantity("amplitude_param", "OV circuit norm, heads added (A), resid/resid", is_summed=True),
    Quantity("logit_scale", "logit scale on test pairs (A), logit", "test"),
)
LOSSES = (
    Quantity("cross_entropy", "cross-entropy, nat", "train", "train"),
    Quantity("cross_entropy", "cross-entropy, nat", "test", "test"),
    Quantity("restricted_loss", "cross-entropy, nat", "all", "restricted to key frequencies"),
    Quantity("excluded_loss", "cross-entropy, nat", "all", "key frequencies excluded (train)"),
)
NORMS = (
    Quantity("qk_norm", "QK circuit norm (G), logit/resid²"),
    Quantity("amplitude_param", "OV circuit norm (A), resid/resid"),
)
TERMS = (
    Quantity("log_margin.scale", "log logit scale (A)", "train"),
    Quantity("log_margin.alignment", "log alignment (G)", "train"),
    Quantity("log_margin", "log margin (Psi), their sum", "train"),
)
MECHANISM = {
    "test accuracy": ("accuracy", "test"),
    "restricted loss": ("restricted_loss", "all"),
    "random frequencies": ("restricted_loss.null_mean", "all"),
    "excluded loss": ("excluded_loss", "all"),
}
FIRST = ("high_wd", "no_wd", "muon", "sgdm", "mse", "stablemax")
"""Arms that come first, and that figures with a panel an arm show."""
POWER = Quantity("fourier_power", "power of W_E, param")


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Figures of the study, in the report's order."""
    every = ordered(arms)
    arms = [arm for arm in every if arm.condition in FIRST] or every[: len(FIRST)]
    return [
        Figure(
            "figure_3_phase_diagram",
            "Phase diagram",
            "Test accuracy against three amplitudes; every seed, coloured by step. A_param is the "
            "published one; it changes under a rescaling of V against O that leaves the function "
            "as it is, the logit scale does not.",
            partial(plot_phase_diagram, arms, across=AMPLITUDES, up=ACCURACY),
        ),
        Figure(
            "losses",
            "Loss and phases",
            "Restricted and excluded loss use the key frequencies of the end of the run, in "
            "hindsight. A phase that did not end is shaded to the end of the run.",
            partial(draw.losses, arms, LOSSES),
        ),
        Figure(
            "fourier_power",
            "Frequencies of the embedding",
            "Length of W_E's component on each frequency of addition modulo p, first seed.",
            partial(draw.heat_map, arms, POWER, index="frequency k"),
        ),
        Figure(
            "survival",
            "Share of seeds that have not generalised",
            "Kaplan-Meier with log-log Greenwood bands; seeds that end before T_grok are censored.",
            partial(outcomes.survival, every, "t_grok", "95 % test accuracy"),
        ),
        Figure(
            "t_grok",
            "Time to grok",
            "One point a seed. A box is drawn for five seeds or more of which none is censored.",
            partial(outcomes.event_times, every, "t_grok", "T_grok"),
        ),
        Figure(
            "head_norms",
            "QK and OV norms",
            "By head, first seed. The dotted line is what weight decay alone makes of the first "
            "head's norm; a norm that follows it decays to zero, it is not frozen.",
            partial(draw.by_head, arms, NORMS),
        ),
        Figure(
            "identity",
            "log margin = log A + log G",
            "On the training pairs with a positive margin. The identity is exact; what an arm does "
            "to its two terms is not fixed by it.",
            partial(draw.terms, arms, TERMS, "mean over training pairs, nat"),
        ),
    ]


def ordered(arms: Sequence[Arm]) -> list[Arm]:
    """Arms as the report shows them: those of `FIRST` in its order, then the others."""
    places = {condition: place for place, condition in enumerate(FIRST)}
    return sorted(arms, key=lambda arm: places.get(arm.condition, len(FIRST)))


def cells(arms: Sequence[Arm]) -> list[Figure]:
    """Figures of the factorial of norm and temperature, where it was run."""
    name = "norm_temperature"
    if not any(arm.condition == name and arm.runs for arm in arms):
        return []
    return [
        Figure(
            "norm_temperature",
            "Time to grok by norm and temperature",
            "Rows: the norm of all parameters, held at this multiple of what the same seed had at "
            "t_grok of high_wd. Columns: what logits are divided by in the loss. Kaplan-Meier "
            "median; hatched where at most half of the seeds grokked.",
            partial(
                factorial.heat_map, arms, name, "t_grok",
                rows="module.norm_clamp", columns="module.temperature",
            ),
        ),
        Figure(
            "mediation",
            "Delay against logit scale and against norm",
            "Both at memorisation; the logit scale over the temperature, as the loss sees it.",
            partial(factorial.mediation, arms, name),
        ),
    ]  # fmt: skip


def endpoint_table(arms: Sequence[Arm]) -> Table:
    """Which algorithm each run ended in: its key frequencies, and what rests on them."""
    rows = []
    for arm in arms:
        for run in arm.runs:
            named = run.summary.get("key_frequencies")
            count = str(len(named)) if isinstance(named, list) else "not recorded"
            found = [_last(run, metric, split) for metric, split in MECHANISM.values()]
            rows.append((arm.condition, str(run.seed), count, *found))
    heads = ("condition", "seed", "key frequencies", *MECHANISM)
    note = (
        "Last records. Restricted: loss on all pairs from the key frequencies alone, beside the "
        "mean for as many random ones. Excluded: loss on training pairs without them. A run that "
        "adds modulo p on its key frequencies has a low restricted and a high excluded loss."
    )
    return Table("Which algorithm: ends of runs", heads, tuple(rows), note)


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Tables of the study, in the report's order."""
    arms = ordered(arms)
    made = [
        event_table(arms, ("t_mem", "t_clean", "t_grok", "t_loss")),
        survival_table(arms, "t_grok"),
        endpoint_table(arms),
    ]
    return [*made, *velocity_tables(arms)]


def velocity_tables(arms: Sequence[Arm]) -> list[Table]:
    """The source's correlation seed by seed, with p-values that decide nothing."""
    rows = [
        (arm.condition, str(run.seed), *cells)
        for arm in arms
        for run in arm.runs
        if run.event("t_high") is not None
        for cells in _correlations(run)
    ]
    note = (
        f"Spearman's rho of test accuracy and A_param while {LOW:g} < accuracy < {HIGH:g}. Its own "
        "p takes neighbouring samples of a smooth curve for independent, which makes it invalid; "
        "the surrogate p-values are descriptive. The verdict on C2 comes from the seeds' spread."
    )
    heads = ("condition", "seed", "series", "rho", "own p (invalid)", "phase p", "shift p")
    return [Table("Accuracy and A_param seed by seed", heads, tuple(rows), note)] if rows else []


def _last(run: RunView, metric: str, split: str) -> str:
    try:
        return number(float(run.curve(metric, split=split).values[-1]))
    except UndefinedError as error:
        return str(error)


def _correlations(run: RunView) -> Iterator[tuple[str, ...]]:
    curve = AMPLITUDES[0].of(run)
    yield (
        "velocities as published",
        *_cells(lambda: st.rank_correlation(*run.published_velocities(curve)), 2),
        "",
        "",
    )
    try:
        accuracy, amplitude = run.over_transition(curve)
    except UndefinedError as error:
        yield "on uniform steps", str(error), "", "", ""
        return
    rng = generator(f"correlations of {run.run_id}")
    for name, left, right in (
        ("velocities", np.gradient(amplitude), np.gradient(accuracy)),
        ("levels", amplitude, accuracy),
    ):
        yield (
            f"{name} on uniform steps",
            *_cells(lambda: st.rank_correlation(left, right), 2),  # noqa: B023
            *_cells(lambda: (st.phase_randomised_p(left, right, rng),), 1),  # noqa: B023
            *_cells(lambda: (st.circular_shift_p(left, right),), 1),  # noqa: B023
        )


def _cells(compute: Callable[[], tuple[float, ...]], count: int) -> tuple[str, ...]:
    """Numbers as cells, or the reason why there are none and empty cells after it."""
    try:
        return tuple(number(value) for value in compute())
    except UndefinedError as error:
        return (str(error), *[""] * (count - 1))
