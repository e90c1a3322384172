"""From runs to one number a seed: arms, summaries, pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np

from allostasis.analysis import summaries
from allostasis.analysis.claims import Claim
from allostasis.analysis.curves import Curve, RunView, UndefinedError
from allostasis.analysis.summaries import Time

RAW_NORMS = {"amplitude_activation.published", "amplitude_param.published", "weight_norm"}
"""Metrics that grow with the width of the model, whatever it does."""


SHARES = {"accuracy", "accuracy.all", "accuracy.last", "accuracy.predictable"}
"""Metrics that are shares of trials, each right or wrong."""


class IdenticalArmsError(ValueError):
    """Two conditions that are one: their comparison would compare a run with itself."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone; never pooled with another arm.

    Attributes:
        exp: Experiment.
        condition: Condition.
        hash: Of the resolved config without seed and device.
        device: Kind of device: cpu, cuda, mps.
        runs: Finished runs, one a seed, in the order of seeds.
        left_out: Why each of the other runs does not count, by run id.
    """

    exp: str
    condition: str
    hash: str
    device: str
    runs: tuple[RunView, ...]
    left_out: dict[str, str]

    @property
    def name(self) -> str:
        """Condition, device and hash, as in the folders."""
        return f"{self.condition} ({self.device}-{self.hash})"

    @property
    def seeds(self) -> list[int]:
        """Seeds of the finished runs."""
        return [run.seed for run in self.runs]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config that all its runs share, but for the seed."""
        return self.runs[0].record.config

    def setting(self, name: str) -> Any:
        """A config value by its dotted name.

        Raises:
            UndefinedError: The config has no such value.
        """
        value: Any = self.config
        for key in name.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise UndefinedError(f"the config of {self.name} has no {name}")
            value = value[key]
        return value

    def has(self, settings: Mapping[str, Any]) -> bool:
        """Whether its config has all of these values, by dotted name."""
        try:
            return all(self.setting(name) == value for name, value in settings.items())
        except UndefinedError:
            return False

    def times_to(self, event: str) -> tuple[np.ndarray, np.ndarray]:
        """Step of an event in each run, or its last step, and whether that is censored."""
        times = [summaries.time_to(run, event) for run in self.runs]
        return np.array([t.step for t in times]), np.array([t.censored for t in times])

    def of_seed(self, seed: int) -> RunView | None:
        """The run of a seed, where there is one."""
        return next((run for run in self.runs if run.seed == seed), None)

    def is_inert(self) -> bool:
        """Whether several seeds gave the same readings, bit by bit: the seed changed nothing."""
        return len(self.runs) > 1 and len({run.fingerprint for run in self.runs}) == 1


def arms(runs: Sequence[RunView]) -> list[Arm]:
    """Sort runs into arms: one (experiment, condition, config hash, device kind) each.

    Returns:
        By experiment and condition; of one condition, the arm with most finished seeds first.
    """

    def identity(run: RunView) -> tuple[str, str, str, str]:
        return run.exp, run.condition, run.run["config_hash"], run.device

    made = [
        _arm(key, list(members))
        for key, members in groupby(sorted(runs, key=identity), key=identity)
    ]
    return sorted(made, key=lambda arm: (arm.exp, arm.condition, -len(arm.runs), arm.hash))


def _arm(identity: tuple[str, str, str, str], runs: list[RunView]) -> Arm:
    counted: dict[int, RunView] = {}
    left_out: dict[str, str] = {}
    for run in sorted(runs, key=lambda run: (run.seed, run.record.folder)):
        if run.status != "done":
            left_out[run.run_id] = f"seed {run.seed} {run.why_unfinished}"
        elif run.seed in counted:
            left_out[run.run_id] = f"seed {run.seed} repeats {counted[run.seed].run_id}"
        else:
            counted[run.seed] = run
    return Arm(*identity, runs=tuple(counted.values()), left_out=left_out)


def shown(
    arms: Sequence[Arm], condition: str, settings: Mapping[str, Any] | None = None
) -> tuple[Arm, str]:
    """The arm that stands for a condition: the one with most finished seeds.

    Args:
        arms: All arms of one experiment.
        condition: Which condition.
        settings: Config values, by dotted name, that the arm should have.

    Returns:
        The arm, and in words which of the settings it does not have; empty where it has all.

    Raises:
        UndefinedError: No run of this condition is finished; the message begins with "not run".
    """
    there = [arm for arm in arms if arm.condition == condition and arm.runs]
    if not there:
        raise UndefinedError(f"not run (no finished run of condition '{condition}')")
    wanted = settings or {}
    for arm in there:
        if all(arm.setting(key) == value for key, value in wanted.items()):
            return arm, ""
    here = {key: there[0].setting(key) for key in wanted}
    unlike = [f"{k}={wanted[k]}, here {here[k]}" for k in wanted if here[k] != wanted[k]]
    return there[0], "; ".join(unlike)


def one_a_condition(arms: Sequence[Arm]) -> list[Arm]:
    """The arm that stands for each condition that has a finished run."""
    conditions = dict.fromkeys(arm.condition for arm in arms if arm.runs)
    return [shown(arms, condition)[0] for condition in conditions]


def check_distinct(treatment: Arm, control: Arm) -> None:
    """Refuse two conditions that are one.

    Arms that each take a size from another arm's run may take the same one, which is no fault,
    although the specification has equal weights refused always: a claim that compares them is
    undecided, and the report says that they are one.

    Raises:
        IdenticalArmsError: Their task, model and module settings are equal, or a seed's final
            weights are.
    """
    parts = ("task", "model", "module")
    same = [treatment.config.get(part) == control.config.get(part) for part in parts]
    if all(same):
        raise IdenticalArmsError(
            f"{_pair(treatment, control)} have equal settings; check `conditions:` in the "
            "experiment's YAML and that task, model or module reads from it"
        )
    if (text := equal_weights(treatment, control)) and not _both_matched(treatment, control):
        raise IdenticalArmsError(f"{text}; the condition changed nothing")


def equal_weights(left: Arm, right: Arm) -> str:
    """At which seeds two arms ended with equal weights, in words; empty where at none."""
    finals = {run.seed: run.final_weights for run in right.runs}
    same = [
        run
        for run in left.runs
        if run.final_weights is not None and run.final_weights == finals.get(run.seed)
    ]
    if not same:
        return ""
    where = f"seed {same[0].seed} ({same[0].final_weights})"
    if len(same) > 1:
        where = f"seeds {', '.join(str(run.seed) for run in same)}"
    text = f"{_pair(left, right)} ended with equal weights at {where}"
    if _both_matched(left, right):
        text += "; both take a size from another arm's run, and it came to the same"
    return text


def _both_matched(left: Arm, right: Arm) -> bool:
    return all(run.is_matched for arm in (left, right) for run in arm.runs)


def _pair(left: Arm, right: Arm) -> str:
    return f"conditions '{left.condition}' and '{right.condition}' of {left.exp}"


def check_widths(claim: Claim, treatment: Arm, control: Arm) -> None:
    """Refuse to compare raw norms of models of different width.

    Raises:
        UndefinedError: The claim reads a raw norm and the arms' d_model differ.
    """
    widths = [arm.config.get("model", {}).get("d_model") for arm in (treatment, control)]
    if claim.select is not None and claim.select.metric in RAW_NORMS and widths[0] != widths[1]:
        raise UndefinedError(
            f"{claim.select.metric} grows with the width, and the arms have d_model {widths[0]} "
            f"and {widths[1]}; across widths take amplitude_activation, which divides by "
            "sqrt(d_model)"
        )


@dataclass(frozen=True)
class Sample:
    """One number a unit: a seed, a cluster of prompts, or a pretrained model.

    Attributes:
        arm: Where they come from.
        units: Seeds, or names of clusters or models.
        run_ids: The run of each seed; of clusters and models all runs that were read.
        values: One a unit; the numerator where the claim is about a ratio of sums.
        censored: Whether the value is a time that had not come to its event.
        denominators: Of a ratio of sums, else None.
        counts: Of shares of trials, how many each is of; None where values are no such shares.
        undefined: Why a seed, or a model, has no number.
        unit: What the units are.
        n_prompts: Of clusters: how many prompts went in.
        n_left_out: Of clusters: how many prompts have no value.
    """

    arm: Arm
    units: tuple[int | str, ...]
    run_ids: tuple[str, ...]
    values: np.ndarray
    censored: np.ndarray
    denominators: np.ndarray | None = None
    undefined: dict[int | str, str] = field(default_factory=dict)
    unit: Literal["seed", "cluster", "model"] = "seed"
    n_prompts: int = 0
    n_left_out: int = 0
    counts: np.ndarray | None = None

    def at(self, seeds: Sequence[int]) -> Sample:
        """The same, for these seeds only, in their order."""
        order = [self.units.index(seed) for seed in seeds]
        return Sample(
            self.arm,
            tuple(seeds),
            tuple(self.run_ids[i] for i in order),
            self.values[order],
            self.censored[order],
            None if self.denominators is None else self.denominators[order],
            self.undefined,
            counts=None if self.counts is None else self.counts[order],
        )


def summarise(
    claim: Claim, arm: Arm, cells: Sequence[Arm] = (), beside: Arm | None = None
) -> Sample:
    """Reduce every finished run of an arm to the number that a claim is about.

    Args:
        claim: The claim.
        arm: The arm.
        cells: All arms of its condition: the cells of a factorial, which differ in settings. A
            summary that reads them gets, for each seed, that seed's run in every cell.
        beside: The arm that it is compared with. A summary that reads it gets its run of the seed.
    """
    assert claim.estimand is not None
    summary = summaries.parse(claim.estimand.summary)
    found: dict[RunView, tuple[float, bool, float]] = {}
    undefined: dict[int | str, str] = {}
    counts: list[int | None] = []
    for run in arm.runs:
        try:
            curve = selected(claim, run)
            own = [other for cell in cells for other in cell.runs if other.seed == run.seed]
            other = None if beside is None else beside.of_seed(run.seed)
            if summary.reads_beside and other is None:
                raise UndefinedError("the arm that it is compared with has no run of this seed")
            value = summary(run, curve, own, other)
        except UndefinedError as error:
            undefined[run.seed] = str(error)
            continue
        counts.append(_trials(claim, curve))
        match value:
            case Time():
                found[run] = (value.step, value.censored, 1.0)
            case (numerator, denominator):
                found[run] = (numerator, False, denominator)
            case _:
                found[run] = (value, False, 1.0)
    columns = np.array(list(found.values()), dtype=float).reshape(-1, 3)
    return Sample(
        arm,
        tuple(run.seed for run in found),
        tuple(run.run_id for run in found),
        columns[:, 0],
        columns[:, 1].astype(bool),
        columns[:, 2] if claim.estimand.of == "kappa" else None,
        undefined,
        counts=None if None in counts else np.array(counts, dtype=int),
    )


def selected(claim: Claim, run: RunView) -> Curve | None:
    """The curve of a run that a claim selects; None where it reads none.

    Raises:
        UndefinedError: The run recorded no such curve.
    """
    if claim.select is None or claim.select.metric is None or claim.estimand is None:
        return None
    index = {name: getattr(claim.select, name) for name in ("layer", "head", "position")}
    return run.curve(claim.select.metric, split=claim.estimand.split, **index)


def _trials(claim: Claim, curve: Curve | None) -> int | None:
    """How many trials a run's number is a share of; None where it is no share of trials."""
    if curve is None or curve.n is None or claim.estimand is None or claim.select is None:
        return None
    shares = claim.select.metric in SHARES and claim.estimand.summary in {"end", "final"}
    return int(curve.n[-1]) if shares and curve.n[-1] > 0 else None


def pair(left: Sample, right: Sample) -> tuple[Sample, Sample]:
    """Both samples at the seeds that both have, in order."""
    seeds = sorted(int(seed) for seed in set(left.units) & set(right.units))
    return left.at(seeds), right.at(seeds)
