"""What the report shows of constraint and clamps beside its claims."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from allostasis.analysis import arm_figures as draw
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import Figure, Quantity
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.plots import (
    plot_box_plots_variance,
    plot_overlay_time_series,
    plot_phase_diagram,
    plot_time_series_divergence,
)
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

MUST = ("control", "constraint", "naive_clamp", "mean_preserving_clamp")
FREEZES = ("control", "constraint_routing", "constraint", "constraint_module")
DRIFT = 0.05  # bit: a frozen head that drifts more refutes the arm's own premise

ACCURACY = Quantity("accuracy", "accuracy, predictable (Psi)", "test")
LAST = Quantity("accuracy.last", "accuracy, last position", "test")
LOGIT_SCALE = Quantity("logit_scale", "logit scale (A), logit", "test")
BAND = {"t_low": ("accuracy 15 %", "o"), "t_high": ("accuracy 85 %", "s")}
TERMS = (
    Quantity("log_margin.scale", "log A (logit scale)", "test"),
    Quantity("log_margin.alignment", "log G (alignment)", "test"),
    Quantity("log_margin", "log margin, their sum", "test"),
)


class AtLayer(Quantity):
    """A curve of the layer behind which the unembedding reads: the last one."""

    def of(self, run: RunView) -> draw.Curve:
        """This curve of a run."""
        layers = run.table(self.metric, split=self.split)["layer"].dropna()
        if layers.empty:
            raise UndefinedError(f"{self.metric} was not recorded")
        return run.curve(self.metric, split=self.split, layer=int(layers.max()))


SITE = AtLayer("amplitude_activation.mid", "amplitude at the site (A), resid", "probe")
PUBLISHED = AtLayer("amplitude_activation.published", "A_activation as published, resid", "probe")
VARIANCE = AtLayer("residual_variance.published", "sigma² as published, resid²", "probe")
WITHIN = AtLayer("residual_variance.within", "variance within classes, resid²", "classes")
BETWEEN = AtLayer("residual_variance.between", "variance between classes, resid²", "classes")


def figures(arms: Sequence[Arm]) -> list[Figure]:
    """Figures of the study, in the report's order."""
    trained = [arm for arm in arms if _is_trained(arm)]
    return [
        Figure(
            "figure_1_overlay",
            "Figure 1: performance, amplitude and variance over training",
            "Seeds thin, their mean bold with a 95 % t interval. The published amplitude and "
            "variance stand beside the amplitude at the site of the clamps. Dashed: the accuracy "
            "that the best possible predictor reaches.",
            lambda: plot_overlay_time_series(
                draw.chosen(arms, MUST),
                (ACCURACY, SITE, PUBLISHED, VARIANCE),
                ceiling={0: _ceiling(arms)},
            ),
        ),
        Figure(
            "divergence",
            "Difference from the control",
            "Arm minus control, paired by seed, with a 95 % t interval; dotted: the first record "
            "at which it excludes 0.",
            lambda: plot_time_series_divergence(
                draw.chosen(trained, (*MUST, "constraint_routing")),
                (ACCURACY, SITE, LOGIT_SCALE),
                control="control",
            ),
        ),
        Figure(
            "ends",
            "What each arm ends with",
            "One point a seed; a box from five seeds up. `accuracy, predictable` is of positions "
            "that the past determines, where the best predictor reaches 1.",
            partial(draw.ends, arms, (ACCURACY, LAST, LOGIT_SCALE)),
        ),
        Figure(
            "variance",
            "Variance by arm",
            "Of the stream behind the last block. The published variance is over all tokens of the "
            "probe; those within and between classes are at the last position of the class probe, "
            "by the token that is right there. Clamped arms of phase eval_only are the trained "
            "model of `constraint`.",
            partial(plot_box_plots_variance, arms, metrics=(VARIANCE, WITHIN, BETWEEN)),
        ),
        Figure(
            "phase_diagram",
            "Phase diagram",
            "Accuracy against two amplitudes; every seed, coloured by step. An arm that does not "
            "reach 85 % has no mark.",
            lambda: plot_phase_diagram(
                draw.chosen(arms, MUST), across=(SITE, LOGIT_SCALE), up=ACCURACY, events=BAND
            ),
        ),
        Figure(
            "identity",
            "log margin = log A + log G by arm",
            "Change from the control of the same seed at the end, over predictable positions with "
            "a positive margin. The identity is exact; what an arm does to its terms is not fixed.",
            partial(draw.identity_terms, arms, "control", TERMS),
        ),
        Figure(
            "positions",
            "Accuracy by position",
            "All held-out sequences after the last update, mean over seeds; the first positions "
            "are a guess for any predictor.",
            lambda: draw.by_position(
                draw.chosen(arms, (*MUST, "constraint_routing")), "accuracy.at", "accuracy", "test"
            ),
        ),
    ]


def _is_trained(arm: Arm) -> bool:
    return arm.setting("module.clamp.phase") != "eval_only"


def _ceiling(arms: Sequence[Arm]) -> float:
    run = arms[0].runs[0]
    headline = "predictable" if "ceiling_predictable" in run.summary else "all"
    return float(str(run.summary[f"ceiling_{headline}"]))


def tables(arms: Sequence[Arm]) -> list[Table]:
    """Tables of the study, in the report's order."""
    return [accuracy_table(arms), *freeze_tables(arms), *clamp_tables(arms)]


def accuracy_table(arms: Sequence[Arm]) -> Table:
    """Every accuracy beside the best that any predictor can expect there."""
    groups = [
        group for group in ("all", "predictable", "last")
        if f"ceiling_{group}" in arms[0].runs[0].summary
    ]  # fmt: skip
    rows = []
    for arm in arms:
        cells = [arm.condition, str(len(arm.runs))]
        for group in groups:
            values = [float(str(run.summary[f"accuracy_{group}"])) for run in arm.runs]
            best = np.mean([float(str(run.summary[f"ceiling_{group}"])) for run in arm.runs])
            cells.append(f"{np.mean(values):.3f} of {best:.4f}")
        rows.append(tuple(cells))
    heads = ("condition", "seeds", *(f"accuracy, {group}, of its ceiling" for group in groups))
    note = (
        "All held-out sequences after the last update, mean over seeds. The ceiling is the "
        "expected accuracy of the Bayes predictor on the same sequences; no causal model can be "
        "above it."
    )
    return Table("Accuracy and its ceiling", heads, tuple(rows), note)


def freeze_tables(arms: Sequence[Arm]) -> list[Table]:
    """What was frozen, that it did not move, and how far its routing drifted all the same."""
    rows = []
    for arm in arms:
        runs = [run for run in arm.runs if "n_frozen" in run.summary]
        if not runs:
            continue
        drifts = [_drift(run) for run in runs]
        known = [drift for drift in drifts if drift is not None]
        rows.append((
            arm.condition,
            str(runs[0].summary["n_frozen"]),
            number(max(float(str(run.summary["frozen_max_change"])) for run in runs)),
            number(min(float(str(run.summary["free_head_change"])) for run in runs)),
            number(max(known)) if known else "not recorded",
            "yes" if known and max(known) > DRIFT else "no",
        ))
    heads = (
        "condition", "frozen parameters", "largest change of one", "free heads moved by",
        "drift of frozen heads from step 0, bit", f"above {DRIFT} bit",
    )  # fmt: skip
    note = (
        "Frozen weights do not freeze routing: what the heads read still trains. An arm whose "
        f"frozen heads drift by more than {DRIFT} bit refutes its own premise of constrained "
        "routing. Largest value over seeds, layers and frozen heads."
    )
    return [Table("What was frozen", heads, tuple(rows), note)] if rows else []


def _drift(run: RunView) -> float | None:
    table = run.table("routing_drift.from_init", split="probe")
    frozen = run.record.config["module"]["frozen_heads"]
    if run.record.config["module"]["freeze"] != "module":
        table = table[table["head"].isin(frozen)]
    last = table[table["step"] == table["step"].max()]
    return None if last.empty else float(last["value"].max())


def clamp_tables(arms: Sequence[Arm]) -> list[Table]:
    """What each clamp was set to, and what switching it on changed."""
    rows = []
    for arm in arms:
        run = arm.runs[0]
        clamp, effect = run.run.get("clamp"), run.run.get("effect") or {}
        if not clamp or "effect_logits" not in effect:
            continue
        skipped = {"site", "label"}  # the label is the proof's
        rows.append((
            arm.condition,
            str(clamp["site"]),
            ", ".join(f"{k} {number(float(v))}" for k, v in clamp.items() if k not in skipped),
            number(effect["effect_logits"]),
            number(effect["effect_gradient"]),
            f"{effect['effect_argmax']:.1%}",
            effect.get("label") or "acts",
        ))
    heads = (
        "condition", "site", "set to", "largest change of a logit", "of a gradient",
        "predictions changed", "label",
    )  # fmt: skip
    note = (
        "First seed. The clamp switched on and off on eight calibration sequences, from equal "
        "weights: those at step 0, or the trained ones of an arm that trains nothing. `pinned`: "
        "the site is a norm's output; `argmax_inert`: no scale there can change a prediction; "
        "`batch_dependent`: what it does to a token depends on its batch, so that it is evaluated "
        "in batches of the size that was trained with."
    )
    return [Table("What the clamps do", heads, tuple(rows), note)] if rows else []
