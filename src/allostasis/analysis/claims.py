"""Claims as data: their schema, and what is proved of one without data."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from allostasis.analysis import summaries

Direction = Literal["greater", "less", "inside", "outside"]
Test = Literal["t", "tost", "binomial", "bootstrap", "log_rank", "sign_flip", "permutation"]
Of = Literal[
    "mean", "difference", "paired_difference", "log_ratio", "proportion", "unanimous",
    "median_time", "rmst", "kappa", "ratio_of_sums", "log_ratio_of_sums", "hedges_g",
    "geometric_ratio", "log_hazard_ratio",
]  # fmt: skip
OF_CLUSTERS: tuple[Of, ...] = (
    "mean", "ratio_of_sums", "log_ratio_of_sums", "kappa", "geometric_ratio",
)  # fmt: skip

OF_MODELS: tuple[Of, ...] = ("mean", "paired_difference", "log_ratio")

TESTS: dict[Of, tuple[Test, ...]] = {
    "mean": ("t", "tost", "sign_flip"),
    "log_ratio": ("t", "tost", "sign_flip"),
    "paired_difference": ("t", "tost", "sign_flip"),
    "difference": ("t", "tost", "permutation"),
    "proportion": ("binomial",),
    "unanimous": ("binomial",),
    "median_time": ("binomial",),
    "rmst": ("t", "permutation"),
    "kappa": ("t", "tost"),
    "ratio_of_sums": ("t", "tost"),
    "log_ratio_of_sums": ("t", "tost"),
    "hedges_g": ("t",),
    "geometric_ratio": ("bootstrap",),
    "log_hazard_ratio": ("log_rank",),
}


LEAST_FLIPPED = 6  # units: 2 / 2 ** 6 is the first two-sided p of flipped signs below 0.05


class ClaimError(ValueError):
    """A claims file that cannot be used; the message lists everything that is wrong with it."""


class Part(BaseModel):
    """A part of a claim: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimand(Part):
    """What is estimated.

    Attributes:
        summary: One number a run, or a prompt, by a function of `analysis.summaries`.
        of: How the units' numbers become one. `log_ratio` with one arm takes the summary itself for
            the ratio. `unanimous` is a proportion that only all seeds together can support.
        unit: What counts as one observation: a seed, which is one trained model, a cluster of
            prompts of the one pretrained model that was run, or a pretrained model, where the claim
            is about models in general.
        split: Which data the metric was read on; weights have none.
    """

    summary: str
    of: Of
    unit: Literal["seed", "cluster", "model"] = "seed"
    split: Literal["train", "test", "probe", "classes", "all"] | None = None

    @field_validator("summary")
    @classmethod
    def _is_known(cls, text: str) -> str:
        summaries.parse(text)
        return text


class Arms(Part):
    """Conditions of the experiment; two arms are paired by seed."""

    treatment: str
    control: str | None = None


SetKind = Literal[
    "single", "pair", "all", "random", "published", "suppressor", "named", "named pair", "restored",
    "writer", "head", "layer", "neuron", "window", "early", "middle", "late",
]  # fmt: skip
"""Kinds of sets: of `ioi` the first five, of the head lab the others; the last four are windows."""


class Select(Part):
    """Columns of the records that pick one curve, or one intervention on prompts.

    Attributes:
        metric: Of a curve: its name.
        layer: Of a curve.
        head: Of a curve.
        position: Of a curve.
        ablation: Of prompts: what stands in the heads' place.
        set: Of prompts: which sets of heads; several of a kind are averaged prompt by prompt.
        intervention: Of prompts: one by its key, such as `zero:9.6+9.9`.
        depth: Of prompts: the input of block `depth`. `late` is every depth from 10/12 of the
            layers on that the intervention can reach, and a claim is about the weakest of them.
    """

    metric: str | None = None
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    ablation: Literal["zero", "mean", "resample", "denoise", "noise"] | None = None
    set: SetKind | None = None
    intervention: str | None = None
    depth: int | Literal["late"] | None = None


class Proved(Part):
    """What is proved of a claim's estimand, whatever a model does.

    Attributes:
        low: Least value that it can have; None: unknown.
        high: Largest value that it can have; None: unknown.
        by: Where the proof is.
        settings: Config values, by dotted name, that the proof takes for granted.
    """

    low: float | None = None
    high: float | None = None
    by: str
    settings: dict[str, bool | int | float | str | None] = {}


class Claim(Part):
    """One sentence that a study can support, refute, or leave undecided.

    An atom has an estimand, arms, a direction, a bound and a test. A compound has `all_of` instead:
    it is supported where all of them are and refuted where any is; one that asks its atoms to
    `agree` has the word that all of them have, and none where they differ.

    Attributes:
        id: The experiment document's number, else EXPERIMENT.slug.
        alias: Another name that the documents use.
        exp: The experiment, where a file holds claims of several.
        source: Document and section; "own" for ours.
        text: One sentence, as the source has it.
        all_of: Ids of the atoms of a compound.
        agree: Whether a compound's atoms must all say the same, as where they ask one question in
            several ways; never false, so that the claims that do not ask for it stay as they are.
        bound: A number; [low, high] for inside and outside. Never taken from data.
        negligible: Distance from the bound that is nothing in practice.
        refuted_at: Value beyond which it is refuted, where that is not the bound itself; what lies
            between the two leaves it undecided.
        test: `tost` asks for equality within the bounds and is answered by `equivalent`; any other
            test of `inside` asks for a band and is answered by `supported`.
        alpha: Two-sided level; one-sided tests use half, each side of `inside` uses all.
        min_seeds: Fewer units than this decide nothing.
        lookup: Whether seeds may be added after a look at the verdict; alpha is then split evenly
            over the looks (Bonferroni). Never false, so that claims without it stay as they are.
        family: Claims that share one Holm correction.
        requires: Claims without whose support this one is undecided.
        settings: Config values, by dotted name, that the arms' runs must have.
        exclusions: Which runs do not count, decided before the run.
        confounds: What else would give the same result, with the arm that excludes it, or None.
        status: `published` as the source has it, `corrected` twin of such, or `own`.
        proved: Which values the estimand can have at all. It is no part of what is claimed, so that
            it is not hashed: a proof found later leaves the claim, and records of it, as they are.
        remark: What was found out about a claim later, and which claim asks better; not hashed,
            likewise.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.]*$")]
    alias: str | None = None
    exp: str | None = None
    source: str
    text: str
    estimand: Estimand | None = None
    arms: Arms | None = None
    select: Select | None = None
    all_of: tuple[str, ...] = ()
    agree: Literal[True] | None = None
    direction: Direction | None = None
    bound: float | tuple[float, float] | None = None
    negligible: Annotated[float, Field(gt=0)] | None = None
    refuted_at: float | None = None
    test: Test | None = None
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    min_seeds: Annotated[int, Field(ge=2)] = 5
    lookup: Literal[True] | None = None
    family: str
    requires: tuple[str, ...] = ()
    settings: dict[str, bool | int | float | str | None] = {}
    exclusions: str | None = None
    confounds: dict[str, str | None] = {}
    status: Literal["published", "corrected", "own"]
    proved: Annotated[Proved | None, Field(exclude=True)] = None
    remark: Annotated[str | None, Field(exclude=True)] = None

    @field_validator("confounds", mode="before")
    @classmethod
    def _name_the_excluding_arm(cls, confounds: Any) -> Any:
        """Read a list of `name` or `name: arm` as a mapping."""
        if not isinstance(confounds, list):
            return confounds
        named: dict[str, str | None] = {}
        for confound in confounds:
            named |= confound if isinstance(confound, dict) else {confound: None}
        return named

    @model_validator(mode="after")
    def _is_one_kind(self) -> Claim:
        fields = ("estimand", "arms", "direction", "bound", "test")
        there = [name for name in fields if getattr(self, name) is not None]
        if self.all_of and there:
            raise ValueError(f"a compound (`all_of`) has no {', '.join(there)}")
        if self.agree and not self.all_of:
            raise ValueError("`agree` is about the atoms of a compound; give `all_of`")
        if not self.all_of and len(there) < len(fields):
            missing = [name for name in fields if name not in there]
            raise ValueError(f"a claim needs {', '.join(missing)}, or `all_of`")
        if self.all_of and self.proved is not None:
            raise ValueError("`proved` is about an estimand; give it to the compound's atoms")
        if self.estimand is not None:
            self._check_atom(self.estimand)
        return self

    def _check_atom(self, estimand: Estimand) -> None:
        if self.test not in TESTS[estimand.of]:
            allowed = ", ".join(TESTS[estimand.of])
            raise ValueError(
                f"test '{self.test}' does not fit of: {estimand.of}; allowed: {allowed}"
            )
        if self.test == "sign_flip" and self.min_seeds < LEAST_FLIPPED:
            raise ValueError(
                f"min_seeds {self.min_seeds}: no fewer than {LEAST_FLIPPED} flipped signs can "
                "give p < 0.05"
            )
        band = self.direction in {"inside", "outside"}
        if band != isinstance(self.bound, tuple):
            wanted = "[low, high]" if band else "a number"
            raise ValueError(f"bound {self.bound} does not fit '{self.direction}': give {wanted}")
        if isinstance(self.bound, tuple) and self.bound[0] >= self.bound[1]:
            raise ValueError(f"bound {list(self.bound)}: the first is not below the second")
        bounds = self.bound if isinstance(self.bound, tuple) else (self.bound,)
        if (
            estimand.of in {"log_ratio", "geometric_ratio"}
            and min(b for b in bounds if b is not None) <= 0
        ):
            raise ValueError(
                f"bound {self.bound}: of: {estimand.of} is told as a ratio, not as its logarithm; "
                "give a number above 0, such as 0.8 for a fifth less"
            )
        if self.test == "tost" and self.direction != "inside":
            raise ValueError(
                f"test 'tost' asks whether a value lies inside, not '{self.direction}'"
            )
        if self.refuted_at is not None:
            self._check_refuted_at(self.refuted_at)
        if estimand.summary == "final" and re.search(r"\b(un)?stab(le|ly|ility)\b", self.text):
            raise ValueError(
                f"`final` does not say that a curve is stable: that takes {summaries.DWELL} steps "
                "above the level; ask `summary: stable(LEVEL), of: proportion` beside it"
            )
        reads_prompts = summaries.parse(estimand.summary).prompts is not None
        if estimand.unit == "model":
            self._check_models(estimand, reads_prompts=reads_prompts)
        elif reads_prompts != (estimand.unit == "cluster"):
            reads = "a run" if estimand.unit == "cluster" else "prompts"
            raise ValueError(
                f"summary '{estimand.summary}' reads {reads}, which is not unit: {estimand.unit}"
            )
        if reads_prompts:
            self._check_prompts(estimand)
            return
        selects = self.select is not None and self.select.metric is not None
        if summaries.parse(estimand.summary).reads_metric != selects:
            verb = "reads the run and takes no" if selects else "needs"
            raise ValueError(f"summary '{estimand.summary}' {verb} `select: {{metric: ...}}`")
        needs_control = estimand.of in {"difference", "paired_difference", "log_hazard_ratio"}
        needs_control |= self.test == "permutation"
        if summaries.parse(estimand.summary).reads_beside:
            if self.arms is None or self.arms.control is None:
                raise ValueError(
                    f"summary '{estimand.summary}' reads both arms and needs "
                    "`arms: {treatment: ..., control: ...}`"
                )
            if estimand.of not in {"paired_difference", "log_ratio", "kappa"}:
                raise ValueError(
                    f"summary '{estimand.summary}' pairs two arms, which of: {estimand.of} does not"
                )
        if needs_control and self.arms is not None and self.arms.control is None:
            raise ValueError(f"of: {estimand.of} needs `arms: {{treatment: ..., control: ...}}`")

    def _check_refuted_at(self, refuted_at: float) -> None:
        sides = {"greater": -1, "less": 1}
        side = sides.get(self.direction or "")
        if side is None or not isinstance(self.bound, float):
            raise ValueError(f"refuted_at fits greater and less, not '{self.direction}'")
        if side * (refuted_at - self.bound) < 0:
            raise ValueError(f"refuted_at {refuted_at} lies on the side that supports the claim")

    def _check_models(self, estimand: Estimand, *, reads_prompts: bool) -> None:
        if estimand.of not in OF_MODELS or (reads_prompts and estimand.of != "mean"):
            allowed = "mean" if reads_prompts else ", ".join(OF_MODELS)
            raise ValueError(f"of: {estimand.of} does not fit unit: model; allowed: {allowed}")
        if reads_prompts and self.select is not None and self.select.depth == "late":
            raise ValueError("unit: model takes a number as depth: late depths differ by model")

    def _check_prompts(self, estimand: Estimand) -> None:
        unit = estimand.unit
        if unit == "cluster" and estimand.of not in OF_CLUSTERS:
            allowed = ", ".join(OF_CLUSTERS)
            raise ValueError(f"of: {estimand.of} does not fit unit: cluster; allowed: {allowed}")
        if self.arms is not None and self.arms.control is not None:
            raise ValueError(f"unit: {unit} takes one arm: its rows hold the clean run too")
        if self.select is None or (self.select.set is None and self.select.intervention is None):
            raise ValueError(f"unit: {unit} needs `select: {{ablation: ..., set: ...}}`")
        reads_depths = summaries.parse(estimand.summary).prompts == "depths"
        if reads_depths != (self.select.depth is not None):
            verb = "needs" if reads_depths else "reads no depths and takes no"
            raise ValueError(f"summary '{estimand.summary}' {verb} `select: {{depth: ...}}`")


def by_construction(claim: Claim) -> tuple[Literal["refuted", "supported (vacuous)"], str] | None:
    """What is proved about a claim without data, with the proof; None where nothing is.

    A claim that no possible value meets is refuted. One that every possible value meets says
    nothing about models: it is vacuous, and counts as nothing.

    Example:
        >>> impossible = {"high": 0.9375, "by": "the best predictor"}
        >>> atom = {
        ...     "id": "X", "source": "own", "text": "x", "arms": {"treatment": "control"},
        ...     "estimand": {"summary": "end", "of": "mean"}, "select": {"metric": "accuracy.all"},
        ...     "direction": "greater", "bound": 0.95, "test": "t", "family": "x", "status": "own",
        ... }
        >>> by_construction(Claim.model_validate(atom | {"proved": impossible}))
        ('refuted', 'by construction: it can be at most 0.9375 (the best predictor)')
        >>> by_construction(Claim.model_validate(atom)) is None
        True
    """
    proved = claim.proved
    if proved is None:
        return None
    low = -math.inf if proved.low is None else proved.low
    high = math.inf if proved.high is None else proved.high
    match claim.direction, claim.bound:
        case "greater", float(bound):
            never, always = high <= bound, low > bound
        case "less", float(bound):
            never, always = low >= bound, high < bound
        case direction, (least, most):
            apart, within = high < least or low > most, least <= low and high <= most
            never, always = (apart, within) if direction == "inside" else (within, apart)
        case _:
            return None
    if not never and not always:
        return None
    least = "" if proved.low is None else f"at least {proved.low:g}"
    most = "" if proved.high is None else f"at most {proved.high:g}"
    reason = f"by construction: it can be {' and '.join(filter(None, (least, most)))} ({proved.by})"
    return ("refuted" if never else "supported (vacuous)"), reason


def across_models(claims: Sequence[Claim]) -> set[str]:
    """Ids of claims about models in general: atoms with `unit: model`, and compounds of them."""
    found: set[str] = set()
    for claim in claims:
        of_models = claim.estimand is not None and claim.estimand.unit == "model"
        if of_models or not found.isdisjoint(claim.all_of):
            found.add(claim.id)
    return found
