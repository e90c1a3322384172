"""What a metric may look at (Snapshot), what it gives (Reading), and how it adds up (Metric)."""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import torchmetrics
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from allostasis.analysis.matching import Matches
from allostasis.core.spaces import Weights

Axis = Literal["layer", "head", "position"]
T = TypeVar("T")

# changes of the parameters that leave the model's function as it is
GAUGES = ("vo", "qk", "relu", "gain", "stream", "rotation")


class Score(NamedTuple):
    """How a group of tokens was answered.

    Attributes:
        correct: Whether the largest logit was the true answer's.
        loss: Cross-entropy in nats.
        floor: Lowest mean cross-entropy in nats that any model can expect on them.
    """

    correct: Bool[Tensor, " token"]
    loss: Float[Tensor, " token"]
    floor: float


@dataclass(frozen=True, kw_only=True)
class Coding:
    """What a sparse autoencoder makes of activations.

    Attributes:
        x: The activations, in their own units.
        reconstruction: What it gives back, in the same units.
        codes: Its latents, >= 0: parents first, then the children of each in turn.
        n_parents: How many of them are parents; 0 where there are no levels.
        parents_only: What it gives back without its children, where it has any.
    """

    x: Float[Tensor, "row d"]
    reconstruction: Float[Tensor, "row d"]
    codes: Float[Tensor, "row latent"]
    n_parents: int = 0
    parents_only: Float[Tensor, "row d"] | None = None

    @property
    def levels(self) -> dict[str, slice]:
        """Latents by part: all of them, and where there are levels, `parents` and `children`."""
        m = self.n_parents
        parts = {"parents": slice(m), "children": slice(m, None)} if m else {}
        return {"": slice(None), **parts}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One model at one step on one batch: all that a metric may look at.

    What was not recorded is None or empty. A metric names what it reads in `needs`, so a field is
    only filled when a chosen metric asks for it.

    Attributes:
        step: Optimiser updates done; 0 is the model before the first one.
        split: `train`, `test`, `probe`, `all` (every pair), or None where only weights are read.
        logits: Logits at the readout position.
        labels: The true answer of each example.
        foils: The wrong answer that each example's true one is asked against.
        clean_logits: Logits at the readout position of the model without the intervention.
        classes: The class of each example, for variance between and within classes.
        n_classes: How many classes there are, seen in this batch or not; given with `classes`.
        acts: Activations by hook name, at all positions.
        earlier: The same probe's activations at step t - tau; empty before there are any.
        initial: The same probe's activations at step 0.
        weights: The model's parameters.
        before: Parameters by name at the start of the last stretch of training.
        grads: Gradients by parameter name.
        modulus: Modular addition: p, where the weights are indexed by residues.
        grid_logits: Modular addition: logits of all pairs (a, b) over the p answers.
        train_pairs: Modular addition: which pairs were trained on.
        key_frequencies: Modular addition: the frequencies that the finished model uses.
        readout: Index of the readout position in `acts`.
        normalised_sites: Hook names whose value has just left a norm.
        scores: Right or wrong, and loss, of groups of tokens beside those that `logits` are of.
        hits: Right or wrong of every position of every sequence, where positions are told apart.
        ceiling: Highest accuracy that any model can reach, by part; the main value's key is "".
        floor: Lowest cross-entropy in nats that any model can reach.
        losses: Mean loss of each sequence in nats, with every head in place.
        ablated_losses: The same with one head replaced.
        features: Directions of features in the hidden space, one column each.
        feature_density: Share of examples in which a feature is active, the same for all.
        coding: What a sparse autoencoder makes of rows of activations.
        members: Whether each of these rows is of each concept.
        known: Whether that is known; where it is not, the row says nothing about the concept.
        matches: Which latent is which concept, decided on training rows.
        decoder: Directions that the autoencoder's latents write.
        other_decoders: The same of autoencoders of other seeds.
        truth: Directions of the concepts, where they were planted.
        truth_parent: Of each of these concepts, the one above it, or -1.
        token_losses: Cross-entropy in nats of the same tokens with the activations as they are
            (`clean`), reconstructed (`sae`), and replaced by 0 (`zero`) and by their mean (`mean`).
        targets: Which tokens of the vocabulary a steering vector is for.
        controls: Other tokens, as frequent as these.
    """

    step: int
    split: str | None = None
    logits: Float[Tensor, "batch vocab"] | None = None
    labels: Int[Tensor, " batch"] | None = None
    foils: Int[Tensor, " batch"] | None = None
    clean_logits: Float[Tensor, "batch vocab"] | None = None
    classes: Int[Tensor, " batch"] | None = None
    n_classes: int | None = None
    acts: Mapping[str, Tensor] = field(default_factory=dict)
    earlier: Mapping[str, Tensor] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Weights | None = None
    before: Mapping[str, Tensor] = field(default_factory=dict)
    grads: Mapping[str, Tensor] = field(default_factory=dict)
    modulus: int | None = None
    grid_logits: Float[Tensor, "p p p"] | None = None
    train_pairs: Bool[Tensor, "p p"] | None = None
    key_frequencies: tuple[int, ...] | None = None
    readout: int = -1
    normalised_sites: frozenset[str] = frozenset()
    scores: Mapping[str, Score] = field(default_factory=dict)
    hits: Bool[Tensor, "sequence position"] | None = None
    ceiling: Mapping[str, float] = field(default_factory=dict)
    floor: float | None = None
    losses: Float[Tensor, " sequence"] | None = None
    ablated_losses: Float[Tensor, "layer head sequence"] | None = None
    features: Float[Tensor, "d feature"] | None = None
    feature_density: float | None = None
    coding: Coding | None = None
    members: Bool[Tensor, "row concept"] | None = None
    known: Bool[Tensor, "row concept"] | None = None
    matches: Matches | None = None
    decoder: Float[Tensor, "latent width"] | None = None
    other_decoders: tuple[Float[Tensor, "_ width"], ...] = ()
    truth: Float[Tensor, "concept width"] | None = None
    truth_parent: tuple[int, ...] = ()
    token_losses: Mapping[str, Float[Tensor, " token"]] = field(default_factory=dict)
    targets: Bool[Tensor, " vocab"] | None = None
    controls: Bool[Tensor, " vocab"] | None = None
    _known: dict[tuple[Callable[..., Any], tuple[str, ...]], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.classes is not None and self.n_classes is None:
            raise ValueError("a snapshot with `classes` needs `n_classes`, the number of classes")

    def once(self, function: Callable[..., T], *fields: str) -> T:
        """Apply a pure function to some fields, once for all metrics that ask for it.

        Args:
            function: What to compute.
            fields: Names of the fields that are its arguments, in order.

        Raises:
            ValueError: The snapshot does not hold one of the fields.

        Example:
            >>> Snapshot(step=0, logits=torch.eye(2)).once(torch.sum, "logits").item()
            2.0
        """
        key = (function, fields)
        if key not in self._known:
            self._known[key] = function(*(given(getattr(self, name), name) for name in fields))
        return self._known[key]

    def layers(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (layer, activation) for each recorded `blocks.{layer}.{name}`, in order of layer.

        Args:
            name: The hook's name within its block, for example `attn.hook_pattern`.
        """
        wanted = re.compile(rf"blocks\.(\d+)\.{re.escape(name)}")
        matches = ((wanted.fullmatch(hook), hook) for hook in self.acts)
        found = {int(match[1]): self.acts[hook] for match, hook in matches if match}
        yield from sorted(found.items(), key=lambda item: item[0])

    def pairs(
        self, name: str, *, then: Literal["earlier", "initial"] = "earlier"
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (layer, now, before) where the hook was recorded both now and `then`.

        Args:
            name: The hook's name within its block, for example `attn.hook_pattern`.
            then: `earlier`, one lag ago, or `initial`, step 0.
        """
        reference = self.earlier if then == "earlier" else self.initial
        for layer, now in self.layers(name):
            hook = f"blocks.{layer}.{name}"
            if hook in reference:
                yield layer, now, reference[hook]


class Reading(NamedTuple):
    """One row of what a metric gives.

    Attributes:
        part: Which of the metric's numbers; "" is the main one.
        value: The number.
        n: How many items it is the mean of; 1 for what is read from weights alone.
        layer: Layer index, or None.
        head: Head index, or None.
        position: Token position, or a frequency for a metric indexed by frequency, or None.
        symbol: The part's symbol.
        unit: The part's unit.
    """

    part: str
    value: float
    n: int
    layer: int | None
    head: int | None
    position: int | None
    symbol: str
    unit: str


class Place(NamedTuple):
    """Where in the records a tensor of values belongs.

    Attributes:
        part: Which of the metric's numbers; "" is the main one.
        layer: Layer index; the index of the first value where `over` has `layer`.
        head: Head index; likewise.
        position: Position or frequency; likewise.
        over: The axis of each dimension of the tensor.
    """

    part: str = ""
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    over: tuple[Axis, ...] = ()

    def indices(self, sizes: Sequence[int]) -> Iterator[dict[Axis, int | None]]:
        """Yield layer, head and position of each value of the tensor, in row-major order."""
        start: dict[Axis, int | None] = {
            "layer": self.layer,
            "head": self.head,
            "position": self.position,
        }
        for offsets in itertools.product(*map(range, sizes)):
            index = dict(start)
            for axis, offset in zip(self.over, offsets, strict=True):
                index[axis] = (start[axis] or 0) + offset
            yield index


class Mean(NamedTuple):
    """Means that belong to one place, and how many items each was taken over.

    Attributes:
        value: The means, one dimension for each axis of the place.
        n: Items under each mean; where it is 0 the value is undefined and gives no row.
        otherwise: Why a value is undefined, or None where a missing row needs no reason.
    """

    value: Tensor
    n: Tensor | int
    otherwise: str | None = None


class Metric(torchmetrics.Metric):
    """A quantity that adds up over batches and devices, and gives rows for the records.

    A subclass says what it is in class attributes and implements `update`, which calls `add`. What
    is added must depend on the model's shape only, never on the data: a value that is undefined is
    added with `n=0`, so that every process holds the same states and their sums can be exchanged.

    Attributes:
        symbol: `Psi`, `G`, `A`, `sigma2` or `other`.
        unit: `1`, `bit`, `nat`, `logit`, `resid`, `rad`, `deg`, `step`, `param`, or products.
        needs: Hook patterns in TransformerLens names, and `logits`, `labels`, `classes`, `params`,
            `before`, `grads`, `modulus`, `grid_logits`, `train_pairs`, `key_frequencies`,
            `ablated_losses`, `features`, `coding`, `members`, `matches`, `decoder`,
            `other_decoders`, `truth`, `token_losses`, `targets`, `earlier.<hook>`,
            `initial.<hook>`.
        reads_also: Hook patterns that are read where the model has them.
        axes: What the values are indexed by, of `layer`, `head`, `position`.
        parts: Names of the numbers beside the main one; `*` stands for any parameter's name.
        part_symbols: Symbols of the parts whose symbol is not the metric's.
        part_units: Units of the parts whose unit is not the metric's.
        audit_key: The metric's key in audit.json, or None where it has none.
        scale_law: What the value does under a change of scale or gauge: an exponent, `invariant`
            or `changes`, by law; a part with a law of its own has the key `<part>.<law>`. Laws:
            `resid` (r -> c r at the site read), `logit_scale` (l -> c l), `logit_shift` (l + const)
            and the gauges `vo`, `qk`, `relu`, `gain`, `stream`, `rotation`.
        functional: False where a gauge that leaves the model's function alone moves the value.
        direction: What high and low values mean, in a few words.
        source: Where the definition comes from.
    """

    name: ClassVar[str]
    symbol: ClassVar[str]
    unit: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    reads_also: ClassVar[tuple[str, ...]] = ()
    axes: ClassVar[tuple[Axis, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    part_symbols: ClassVar[Mapping[str, str]] = {}
    part_units: ClassVar[Mapping[str, str]] = {}
    audit_key: ClassVar[str | None] = None
    scale_law: ClassVar[Mapping[str, int | str]]
    functional: ClassVar[bool] = True
    direction: ClassVar[str]
    source: ClassVar[str]

    # the states of a place are made when it is first seen, which torchmetrics can only replay
    full_state_update = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__module__.rpartition(".")[2]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.skipped: Counter[str] = Counter()
        self._otherwise: dict[Place, str | None] = {}
        self._kept: dict[tuple[str, int | None], str] = {}

    def add(
        self,
        value: Tensor | float,
        *,
        n: Tensor | int,
        part: str = "",
        over: tuple[Axis, ...] = (),
        layer: int | None = None,
        head: int | None = None,
        position: int | None = None,
        otherwise: str | None = "undefined",
    ) -> None:
        """Add a mean, or a tensor of them, with its weight.

        Args:
            value: The mean over `n` items; ignored where `n` is 0.
            n: Items under each mean, one number or one for each value.
            part: Which of the metric's numbers; "" is the main one.
            over: The axis of each dimension of `value`.
            layer: Index of the value, or of the first one where `over` has `layer`.
            head: Likewise.
            position: Likewise.
            otherwise: Why a value with `n=0` is undefined, as counted in `skipped`; None leaves a
                row out without counting it.
        """
        assert not part or any(fnmatchcase(part, declared) for declared in self.parts), part
        assert {*over} <= {*self.axes}, over
        if isinstance(value, Tensor):
            mean = precise(value)
        else:
            mean = torch.tensor(value, dtype=widest(self.device), device=self.device)
        assert mean.ndim == len(over), (mean.shape, over)
        place = Place(part, layer, head, position, over)
        self._otherwise[place] = otherwise
        if isinstance(n, int) and n > 0:  # most means, in fewer steps
            self._sum(str(place), torch.stack([mean * n, torch.full_like(mean, n)]))
            return
        weight = torch.as_tensor(n, dtype=mean.dtype, device=mean.device).expand(mean.shape)
        total = torch.where(weight > 0, mean * weight, torch.zeros_like(mean))
        self._sum(str(place), torch.stack([total, weight]))

    def accumulate(self, name: str, value: Tensor, *, layer: int | None = None) -> None:
        """Add to a state that is summed over batches and devices; the first call makes it.

        Args:
            name: What the state holds. For metrics that are no plain mean: counts, histograms and
                sums of moments.
            value: What to add, of one shape whatever the batch.
            layer: The layer it belongs to, if any.
        """
        self._kept[name, layer] = f"{name}.{layer}"
        self._sum(f"{name}.{layer}", value)

    def collect(self, name: str, rows: Tensor, *, layer: int | None = None) -> None:
        """Add rows to a state that is joined over batches and devices; the first call makes it.

        Only for what no sum of known size can give, and then for a bounded number of rows.

        Args:
            name: What the state holds.
            rows: One row for each example.
            layer: The layer it belongs to, if any.
        """
        state = f"{name}.{layer}"
        if not hasattr(self, state):
            self.add_state(state, [], dist_reduce_fx="cat")
        self._kept[name, layer] = state
        getattr(self, state).append(rows)

    def kept(self, name: str) -> Iterator[tuple[int | None, Tensor]]:
        """Yield (layer, state) for what was accumulated or collected under a name since reset."""
        for (known, layer), state in self._kept.items():
            if known == name:
                yield layer, dim_zero_cat(getattr(self, state))

    def _sum(self, state: str, value: Tensor) -> None:
        if not hasattr(self, state):
            self.add_state(state, torch.zeros_like(value), dist_reduce_fx="sum")
        getattr(self, state).add_(value)

    def compute(self) -> dict[Place, Mean]:
        """Give the means over all batches and devices."""
        return self.means()

    def means(self) -> dict[Place, Mean]:
        """Give the mean of everything added to this process's states, weighted by `n`.

        A metric that is no plain mean adds to this what it derives from its own states.
        """
        means = {}
        for place, otherwise in self._otherwise.items():
            total, n = getattr(self, str(place))
            means[place] = Mean(total / n.clamp(min=1), n, otherwise)
        return means

    def readings(self) -> list[Reading]:
        """Give one reading for each defined value, and count the others in `skipped`.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            means = self.means()
        self.skipped = Counter()
        readings = []
        every = _on_host([mean.value for mean in means.values()])
        weights = _on_host([_as_many(mean.n, mean.value) for mean in means.values()])
        for (place, (value, _, otherwise)), values, counts in zip(
            means.items(), every, weights, strict=True
        ):
            for index, number, count in zip(
                place.indices(value.shape), values, counts, strict=True
            ):
                if count == 0:
                    if otherwise is not None:
                        self.skipped[otherwise] += 1
                    continue
                if not math.isfinite(number):
                    raise ValueError(
                        f"{self.name}: {place.part or 'the main value'} is {number} at {index}. "
                        "A quantity that is undefined must be added with n=0."
                    )
                readings.append(
                    Reading(
                        part=place.part,
                        value=number,
                        n=int(count),
                        symbol=self.part_symbols.get(place.part, self.symbol),
                        unit=self.part_units.get(place.part, self.unit),
                        **index,
                    )
                )
        return readings

    def reset(self) -> None:
        """Forget everything added."""
        super().reset()
        self._otherwise.clear()
        self._kept.clear()


def invariant(*laws: str) -> dict[str, int | str]:
    """Say of each law that the value does not move under it.

    Example:
        >>> invariant("vo", "qk")
        {'vo': 'invariant', 'qk': 'invariant'}
    """
    return dict.fromkeys(laws, "invariant")


def _on_host(tensors: Sequence[Tensor]) -> list[list[float | int]]:
    """Each tensor's numbers in row-major order; a device is waited for once, not once for each."""
    if len({(tensor.device, tensor.dtype) for tensor in tensors}) != 1:
        return [tensor.flatten().tolist() for tensor in tensors]
    numbers = iter(torch.cat([tensor.reshape(-1) for tensor in tensors]).tolist())
    return [[*itertools.islice(numbers, tensor.numel())] for tensor in tensors]


def _as_many(n: Tensor | int, values: Tensor) -> Tensor:
    """A weight for each value."""
    weight = torch.tensor(n, dtype=widest(values.device)) if isinstance(n, int) else n
    return weight.expand(values.shape)


def widest(device: torch.device) -> torch.dtype:
    """The widest float of a device.

    Example:
        >>> widest(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


def precise(values: Tensor, *, copy: bool = False) -> Tensor:
    """Cast to the widest float of the device that the values are on.

    Args:
        values: Of any type.
        copy: Whether the result is new memory even where the type is right already.

    Example:
        >>> precise(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float64
    """
    return values.to(widest(values.device), copy=copy)


def given(value: T | None, name: str) -> T:
    """Return what a snapshot holds, or say that it does not hold it.

    Raises:
        ValueError: The snapshot was taken without it.

    Example:
        >>> given(3, "floor")
        3
    """
    if value is None:
        raise ValueError(
            f"this snapshot has no `{name}`, which the metric needs. "
            "Whoever takes the snapshot must provide what the metric lists in `needs`."
        )
    return value


def held_out(
    snapshot: Snapshot,
) -> tuple[Coding, Bool[Tensor, "row concept"], Bool[Tensor, "row concept"], Matches]:
    """Codes of rows that chose nothing, with what is known of these rows and the matches.

    Raises:
        ValueError: The rows are those that the matches were made on, or there are no labels.
    """
    if snapshot.split == "train":
        raise ValueError(
            "concepts were matched to latents on the split `train`; scored on it they would be "
            "scored on what chose them. Take rows of `val` or `test`"
        )
    members = given(snapshot.members, "members")
    known = torch.ones_like(members) if snapshot.known is None else snapshot.known
    return given(snapshot.coding, "coding"), members, known, given(snapshot.matches, "matches")


def discover(package: str = "allostasis.metrics") -> dict[str, type[Metric]]:
    """Import every metric there is.

    Args:
        package: Where to look. Each of its files but `base.py` holds one metric.

    Returns:
        Metric classes by name, which is the file's name.

    Raises:
        TypeError: A file does not hold exactly one metric.

    Example:
        >>> discover()["routing_drift"].unit
        'bit'
    """
    found = {}
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if entry.name == "base":
            continue
        module = importlib.import_module(f"{package}.{entry.name}")
        metrics = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Metric)
            and value.__module__ == module.__name__
        ]
        if len(metrics) != 1:
            raise TypeError(
                f"{module.__file__} holds {len(metrics)} metrics. "
                "A file in metrics/ holds exactly one subclass of Metric, named after the file."
            )
        found[entry.name] = metrics[0]
    return found
