"""What the report shows of superposition beside its claims."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from allostasis.analysis import suppressor_figures as draw
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.plots import plot_box_plots_variance
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

SEARCHED = ("suppressors_toy", "suppressors_lm")
TITLES = {
    "found_table": "Suppressors found",
    "selected_table": "Suppressors",
    "plant_table": "Planted suppressors",
    "null_table": "Where there is nothing to find",
    "grid_table": "Toy models of superposition",
}


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Figures of the study, in the report's order."""
    return [
        Figure(
            "effects",
            "Effect of ablating each head alone",
            "First seed, each ablation. Loss clean less loss ablated on the "
            "split that heads are selected on; above 0 the model is better without the head. Bars: "
            "95 % over sequences. Red: passes the false discovery rate and the least effect. "
            "Dashed: the least effect. Dotted: the smallest effect that passes the rate, where "
            "any does.",
            partial(draw.effects, arms),
        ),
        Figure(
            "variances",
            "Variance of what heads write, suppressors beside clean heads",
            "First seed, on sequences that selection never saw; of a language model without "
            "position 0, an attention sink. A box needs five heads; fewer are points.",
            partial(plot_box_plots_variance, arms),
        ),
        Figure(
            "ratios",
            "Ratios of variances by model and ablation",
            "E1: suppressors' writes over clean heads', geometric mean over layers, with the "
            "interval of a bootstrap of whole sequences. E2: last residual stream without "
            "suppressors over with them. Of a language model without position 0. One point a seed. "
            "Dotted: 1; dashed: the source's 2. A model without suppressors has no ratio.",
            partial(draw.ratios, arms),
        ),
        Figure(
            "plants",
            "Planted suppressors",
            "Each interval is a plant's; the dashed lines are the ratios that they were made for. "
            "Hollow: not found.",
            partial(draw.plants, arms),
        ),
        Figure(
            "divergence",
            "Variance of what heads write along training",
            "First seed. Red: heads that are suppressors at the end; none is, where none was "
            "found.",
            partial(draw.divergence, arms),
        ),
        Figure(
            "dimensionality",
            "Dimensionality by density",
            "Features that are represented at all, of the first seed; 1: a dimension of its own, "
            "1/2: one of an antipodal pair. Panels by importance and by features per dimension.",
            partial(draw.dimensionality, arms),
        ),
        Figure(
            "capacity",
            "Norm and capacity of each feature",
            "First seed. The claim is about slopes between features of equal importance, density "
            "and n/m, which are the points of one colour in a panel with equal importance.",
            partial(draw.capacity, arms),
        ),
    ]


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Tables of the study; one that lacks its records says why."""
    makers: list[Callable[[Sequence[Arm]], Table]] = [
        found_table, selected_table, plant_table, null_table, grid_table,
    ]  # fmt: skip
    made = []
    for make in makers:
        try:
            made.append(make(arms))
        except UndefinedError as error:
            made.append(Table(TITLES[make.__name__], ("missing",), ((str(error),),)))
    return made


def _runs(arms: Sequence[Arm], *conditions: str) -> list[RunView]:
    runs = [run for arm in arms if arm.condition in conditions for run in arm.runs]
    if not runs:
        raise UndefinedError(f"not run (no finished run of {' or '.join(conditions)})")
    return runs


def _scans(arms: Sequence[Arm]) -> Iterator[tuple[RunView, str, dict[str, Any]]]:
    for run in _runs(arms, *SEARCHED):
        for value, scan in (run.run.get("suppressors") or {}).items():
            yield run, value, scan


def found_table(arms: Sequence[Arm]) -> Table:
    """How many suppressors each run found, by what stood in a head's place."""
    rows = []
    for run, value, scan in _scans(arms):
        accuracy = run.summary.get("accuracy")
        again = scan.get("reselected")
        told = (
            f"{number(again['low'])} to {number(again['high'])}, found in {again['found']:.0%}"
            if isinstance(again, dict)
            else str(again or scan.get("undefined"))
        )
        rows.append((
            run.condition, str(run.seed), value, f"{scan['n_selected']} of {scan['n_heads']}",
            number(scan["ratio"]) if "ratio" in scan else "none",
            number(scan["ratio_with_first"]) if "ratio_with_first" in scan else "",
            told, number(accuracy) if isinstance(accuracy, float) else "",
        ))  # fmt: skip
    heads = ("condition", "seed", "ablation", "suppressors", "E1", "E1 with position 0",
             "E1 with selection repeated", "accuracy")  # fmt: skip
    note = (
        "Granularity head, component z, all positions, each head alone in the intact model. E1 of "
        "a language model leaves position 0 out, an attention sink; with it, it is told beside. "
        "Selection repeated: heads selected anew on resampled sequences; a sensitivity, no "
        "interval. Accuracy: of predictable tokens."
    )
    return Table(TITLES["found_table"], heads, tuple(rows), note)


def selected_table(arms: Sequence[Arm]) -> Table:
    """Which heads were found, with their effect on sequences that did not select them."""
    rows = [
        (run.condition, str(run.seed), value, head, number(float(effect)))
        for run, value, scan in _scans(arms)
        for head, effect in (scan.get("effect_on_measure") or {}).items()
    ]
    if not rows:
        raise UndefinedError("no head was found to be a suppressor in any run")
    heads = ("condition", "seed", "ablation", "head", "effect on fresh sequences, nat")
    return Table(TITLES["selected_table"], heads, tuple(rows))


def plant_table(arms: Sequence[Arm]) -> Table:
    """What became of planted suppressors."""
    rows = []
    for run in _runs(arms, "planted"):
        facts = run.run.get("plants") or {}
        for ratio in ("3", "1"):
            told = facts[f"ratio_{ratio}"]
            rows.append((
                str(run.seed), ratio, number(told["mean"]), f"{told['covers']:.0%}",
                f"{told['above_2']:.0%}", f"{told['above_1']:.0%}",
                f"{facts['n_costly_found']} of {facts['n_costly']}",
            ))  # fmt: skip
    heads = ("seed", "E1 planted", "E1 found", "interval covers it", "above 2", "above 1",
             "found where it costs 0.1 nat")  # fmt: skip
    note = "The last column is about all plants of the run, of both strengths and every ablation."
    return Table(TITLES["plant_table"], heads, tuple(rows), note)


def null_table(arms: Sequence[Arm]) -> Table:
    """How often something was found where nothing is."""
    rows = []
    for run in _runs(arms, "null"):
        facts = run.run.get("nulls") or {}
        for value, rate in facts["random_signs"].items():
            untrained, silent = facts["untrained"][value], facts["silent"][value]
            again = untrained["mean_effect_again"]
            rows.append((
                str(run.seed), value, f"{rate:.1%}", f"{untrained['exchanged']:.1%}",
                f"{untrained['selected']:.1%}", f"{untrained['false']:.1%}",
                "none" if again is None else number(again),
                number(silent["largest_effect"]), f"{facts['relabelled_coverage']:.1%}",
            ))  # fmt: skip
    heads = ("seed", "ablation", "random signs", "untrained: exchanged", "untrained: selected",
             "untrained: false", "effect again, nat", "silent head, nat",
             "coverage of 1")  # fmt: skip
    note = (
        "Shares of data sets in which any head was selected. Exchanged: it is drawn by lot which "
        "of two losses is the clean one, so that there is nothing to find. False: twice the share "
        "of selected heads without an effect on fresh sequences, mean over data sets. A head of an "
        "untrained model writes noise, without which the loss is lower in truth, above all under "
        "zero ablation."
    )
    return Table(TITLES["null_table"], heads, tuple(rows), note)


def grid_table(arms: Sequence[Arm]) -> Table:
    """What each toy model holds."""
    rows = []
    for run in _runs(arms, "toy_models"):
        columns = {
            metric: run.interventions(metric, split="features").set_index("intervention")["value"]
            for metric in (
                "features_per_dimension", "features_per_dimension.represented",
                "features_per_dimension.polysemanticity", "amplitude_activation.hidden", "loss",
            )
        }  # fmt: skip
        for cell in columns["features_per_dimension"].index:
            rows.append((
                str(run.seed), str(cell),
                *(number(float(c[cell])) if cell in c else "none" for c in columns.values()),
            ))  # fmt: skip
    heads = ("seed", "model", "features per dimension", "represented", "polysemanticity",
             "hidden RMS", "loss")  # fmt: skip
    return Table(TITLES["grid_table"], heads, tuple(rows))
