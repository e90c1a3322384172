"""Instrument gates: exact statements that the measurements must meet before they are believed.

The numbers are those of the specification of observables. Each gate takes what it tests as an
argument, so that a test can hand it a broken one and see it fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from scipy.spatial.distance import jensenshannon
from torch import Tensor
from torch.nn import functional

from allostasis.analysis.matching import match_latents
from allostasis.core.spaces import LayerWeights, Weights
from allostasis.metrics.accuracy import accuracy
from allostasis.metrics.alignment import alignment
from allostasis.metrics.base import GAUGES, Coding, Metric, Snapshot, discover, given
from allostasis.metrics.calibration import Calibration
from allostasis.metrics.cross_entropy import cross_entropy, log_probabilities
from allostasis.metrics.dprime import Separation, dprime
from allostasis.metrics.logit_scale import logit_scale
from allostasis.metrics.margin import margin
from allostasis.metrics.residual_variance import residual_variance
from allostasis.metrics.routing_drift import jensen_shannon
from allostasis.models.modular_transformer import ModularTransformer

VISIBLE = 1e-3  # a law that says "changes" is blind below this relative change
SCALE = 2.0  # the factor c of every law of scale
FIRST_EXAMPLE = ("routing_stability", "published")  # reads the first example of its batch


@dataclass(frozen=True)
class GateResult:
    """What a gate found.

    Attributes:
        name: The gate's number and statement.
        worst: Largest deviation from the statement.
        tolerance: Largest deviation that is round-off.
    """

    name: str
    worst: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the statement holds."""
        return self.worst <= self.tolerance


def run_gates() -> list[GateResult]:
    """Pass every gate on this machine's CPU, in float64, in seconds.

    Example:
        >>> all(result.passed for result in run_gates())
        True
    """
    return [gate() for gate in GATES]


# ---- what a gate is tried on


def specimen() -> ModularTransformer:
    """A small model without norms, trained for a moment so that many answers are right."""
    model = ModularTransformer(seed=0, p=7, d_model=24, n_heads=2, d_mlp=32).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens, answers = _questions(model.p)
    for _ in range(20):
        optimiser.zero_grad()
        functional.cross_entropy(model(tokens)[:, 2], answers).backward()
        optimiser.step()
    return model.requires_grad_(False)


def _questions(p: int) -> tuple[Int[Tensor, "pair 3"], Int[Tensor, " pair"]]:
    numbers = torch.arange(p)
    tokens = torch.cartesian_prod(numbers, numbers, torch.tensor([p]))
    return tokens, tokens[:, :2].sum(dim=1) % p


def observe(model: ModularTransformer, *, earlier: ModularTransformer) -> Snapshot:
    """Everything that any metric may ask of a model, on pairs in random order."""
    p = model.p
    tokens, answers = _questions(p)
    order = torch.randperm(2 * p * p, generator=_generator(2))[:96] % (p * p)
    tokens, answers = tokens[order], answers[order]
    (logits, acts), (_, past) = (m.run_with_cache(tokens) for m in (model, earlier))
    return Snapshot(
        step=500,
        logits=logits[:, 2],
        labels=answers,
        foils=(answers + 1) % p,
        clean_logits=earlier(tokens)[:, 2],
        classes=answers,
        n_classes=p,
        acts=dict(acts),
        earlier=dict(past),
        initial=dict(past),
        weights=model.weights(),
        before=dict(earlier.named_parameters()),
        grads=dict(earlier.named_parameters()),
        grid_logits=model.grid_logits()[..., :p],
        train_pairs=torch.rand(p, p, generator=_generator(3)) < 0.5,
        key_frequencies=(1, 3),
        readout=2,
        ceiling={"": 1.0},
        floor=0.0,
        losses=_losses(model, tokens, answers),
        ablated_losses=_ablated_losses(model, tokens, answers),
        features=model.W_U[:, :p],
        feature_density=0.25,
        token_losses={
            kind: functional.cross_entropy(scale * logits[:, 2], answers, reduction="none")
            for kind, scale in (("clean", 1.0), ("sae", 0.5), ("zero", -1.0), ("mean", -0.5))
        },
        targets=torch.arange(logits.shape[-1]) < 2,
        controls=torch.arange(logits.shape[-1]) == 3,
        **_coded(answers, d=16),
    )


def _coded(answers: Int[Tensor, " row"], *, d: int) -> dict[str, Any]:
    """A random hierarchical autoencoder of noisy answers; concepts are these, and their halves."""
    m, c = 2, 3
    x = _random(8, d, seed=4)[answers] + _random(len(answers), d, seed=8) / 2
    atoms = _random(m * (1 + c), d, seed=5)
    codes = (x @ atoms.T - x.norm(dim=1, keepdim=True)).clamp(min=0)
    members = torch.stack([answers < 3, answers >= 3, *(answers == k for k in (0, 1, 4))], dim=1)
    parent = (-1, -1, 0, 0, 1)
    known = torch.ones_like(members)
    arrays = (codes.numpy(), members.numpy(), known.numpy())
    return {
        "coding": Coding(
            x=x,
            reconstruction=codes @ atoms / d,
            codes=codes,
            n_parents=m,
            parents_only=codes[:, :m] @ atoms[:m] / d,
        ),
        "members": members,
        "known": known,
        "matches": match_latents(*arrays, parent=parent, n_parents=m),
        "decoder": atoms,
        "other_decoders": (_random(5, d, seed=6),),
        "truth": _random(len(parent), d, seed=7),
        "truth_parent": parent,
    }


def _losses(model: ModularTransformer, tokens: Tensor, answers: Tensor) -> Tensor:
    return functional.cross_entropy(model(tokens)[:, 2], answers, reduction="none")


def _ablated_losses(model: ModularTransformer, tokens: Tensor, answers: Tensor) -> Tensor:
    """Losses with each head zeroed alone."""
    found = []
    for head in range(model.n_heads):

        def silence(z: Tensor, hook: object, head: int = head) -> Tensor:
            del hook
            return torch.where(torch.arange(z.shape[2])[:, None] == head, 0.0, z)

        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", silence)]):
            found.append(_losses(model, tokens, answers))
    return torch.stack(found)[None]


def perturbed(model: ModularTransformer) -> ModularTransformer:
    """A model close by, to stand for the same one earlier."""
    twin, generator = deepcopy(model), _generator(4)
    for parameter in twin.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.1 * noise
    return twin


def regauged(model: ModularTransformer, gauge: str) -> ModularTransformer:
    """The same function in other parameters.

    Args:
        model: A model without norms.
        gauge: `vo`: W_V -> W_V M, W_O -> M^-1 W_O; `qk`: W_Q -> W_Q M, W_K -> W_K M^-T; `relu`:
            each neuron's input times c, its output times 1/c; `stream`: all writes times c, all
            reads times 1/c; `rotation` of the stream.
    """
    twin = deepcopy(model)
    at = {name: parameter.data for name, parameter in twin.named_parameters()}
    mix = torch.eye(twin.d_head) + 0.3 * _random(twin.n_heads, twin.d_head, twin.d_head, seed=5)
    if gauge == "vo":
        at["W_V"].copy_(at["W_V"] @ mix)
        at["W_O"].copy_(mix.inverse() @ at["W_O"])
    elif gauge == "qk":
        at["W_Q"].copy_(at["W_Q"] @ mix)
        at["W_K"].copy_(at["W_K"] @ mix.inverse().mT)
    elif gauge == "relu":
        factor = _random(twin.d_mlp, seed=6).mul(0.5).exp()
        at["W_in"] *= factor
        at["b_in"] *= factor
        at["W_out"] /= factor[:, None]
    else:
        rotation = torch.linalg.qr(_random(twin.d_model, twin.d_model, seed=7)).Q
        write = {"stream": SCALE * torch.eye(twin.d_model).double(), "rotation": rotation}[gauge]
        for name in ("W_E", "W_pos", "W_O", "W_out", "b_out"):
            at[name].copy_(at[name] @ write)
        for name in ("W_Q", "W_K", "W_V", "W_in", "W_U"):
            at[name].copy_(write.inverse() @ at[name])
    return twin


def _normed(*, shift: float) -> Snapshot:
    """Weights that stand behind norms, with some of each gain handed on to them."""
    read, write, gain = _random(3, 2, 8, 4), _random(2, 4, 8, seed=1), _random(2, 8, seed=2)
    handed = _random(8, seed=3).mul(shift).exp()
    W_Q, W_K, W_V = read / handed[:, None]
    layer = LayerWeights(W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=write, gain=gain[0] * handed)
    W_U, final_gain = _random(8, 5, seed=4) / handed[:, None], gain[1] * handed
    named = {"W_Q": W_Q, "W_K": W_K, "W_V": W_V, "W_O": write, "W_U": W_U, "gain": final_gain}
    groups = {"qk": ("W_Q", "W_K"), "ov": ("W_V", "W_O"), "unembed": ("gain", "W_U")}
    return Snapshot(step=0, weights=Weights((layer,), W_U, final_gain, named, groups))


def halves(snapshot: Snapshot) -> tuple[Snapshot, Snapshot]:
    """The first and the second half of a snapshot's examples."""
    assert snapshot.labels is not None
    middle = len(snapshot.labels) // 2
    return _examples(snapshot, slice(middle)), _examples(snapshot, slice(middle, None))


def _examples(snapshot: Snapshot, chosen: slice) -> Snapshot:
    names = ("logits", "labels", "foils", "clean_logits", "classes", "losses", "members", "known")
    rows = {name: getattr(snapshot, name) for name in names}
    acts = {name: getattr(snapshot, name) for name in ("acts", "earlier", "initial")}
    return replace(
        snapshot,
        **{name: None if value is None else value[chosen] for name, value in rows.items()},
        ablated_losses=given(snapshot.ablated_losses, "ablated_losses")[..., chosen],
        token_losses={kind: loss[chosen] for kind, loss in snapshot.token_losses.items()},
        coding=_rows(given(snapshot.coding, "coding"), chosen),
        **{
            name: {hook: value[chosen] for hook, value in hooks.items()}
            for name, hooks in acts.items()
        },
    )


def _rows(coding: Coding, chosen: slice) -> Coding:
    names = ("x", "reconstruction", "codes", "parents_only")
    return replace(coding, **{name: given(getattr(coding, name), name)[chosen] for name in names})


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


# ---- how a metric's readings are compared


def read(metric: Metric, *snapshots: Snapshot) -> dict[tuple[object, ...], float]:
    """The value of each place in the records."""
    for snapshot in snapshots:
        metric.update(snapshot)
    return {reading[:1] + reading[3:6]: reading.value for reading in metric.readings()}


def on_two_devices(cls: type[Metric], first: Snapshot, second: Snapshot) -> Metric:
    """A metric whose states are exchanged with another process's as torchmetrics would."""
    there = cls()
    there.update(second)
    theirs: dict[int, Tensor] = {}

    def gather(mine: Tensor, group: object) -> list[Tensor]:  # noqa: ARG001
        return [mine, theirs[id(mine)]]

    here = cls(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    here.update(first)
    for name, state in here.metric_state.items():
        pairs = zip(_tensors(state), _tensors(there.metric_state[name]), strict=True)
        theirs.update((id(mine), other) for mine, other in pairs)
    return here


def _tensors(state: Tensor | list[Tensor]) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else state


def law_deviation(
    cls: type[Metric],
    law: str,
    before: Mapping[tuple[object, ...], float],
    after: Mapping[tuple[object, ...], float],
) -> float:
    """How far a metric's readings are from the law of scale that it declares.

    Args:
        cls: The metric.
        law: A key of its `scale_law`.
        before: Its readings.
        after: Its readings once the change that the law speaks of was made, by `SCALE`.

    Returns:
        Largest deviation, relative for values above 1; 1 where something that should change does
        not, or where readings appear or vanish.
    """
    if before.keys() != after.keys():
        return 1.0
    worst = 0.0
    for part in {place[0] for place in before}:
        own = f"{part}.{law}" if part else law
        expected = cls.scale_law.get(own, cls.scale_law.get(law))
        values = [(value, after[place]) for place, value in before.items() if place[0] == part]
        if expected == "changes":
            moved = any(_distance(old, new) > VISIBLE for old, new in values)
            worst = max(worst, float(own in cls.scale_law and not moved))
        elif expected is not None:
            factor = 1.0 if isinstance(expected, str) else SCALE**expected
            worst = max(worst, *(_distance(factor * old, new) for old, new in values))
    return worst


def _distance(old: float, new: float) -> float:
    return abs(new - old) / max(1.0, abs(old))


def _largest(deviations: Iterable[Tensor | float]) -> float:
    return max(float(torch.as_tensor(value).abs().max()) for value in deviations)


# ---- the gates


def log_identity(*, measure: Callable[[Tensor, Tensor], Tensor] = alignment) -> GateResult:
    """For each example log m = log A + log G, with G as the cosine that it is said to be."""
    deviations = []
    for n_answers in (2, 4, 113, 50_257):
        logits = _random(16, n_answers, seed=n_answers)
        labels = logits.argmax(dim=-1)
        lead, scale = margin(logits, labels), logit_scale(logits)
        others = logits.scatter(-1, labels[:, None], -torch.inf).argmax(dim=-1)
        directions = functional.one_hot(labels, n_answers) - functional.one_hot(others, n_answers)
        centred = logits - logits.mean(dim=-1, keepdim=True)
        cosine = functional.cosine_similarity(centred, directions.double(), dim=-1)
        aligned = measure(logits, labels)
        deviations += [lead.log() - scale.log() - aligned.log(), aligned.log() - cosine.log()]
    return GateResult("I1 log identity", _largest(deviations), 1e-12)


def _layer_norm(resid: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(resid, resid.shape[-1:], eps=eps)


def _rms_norm(resid: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(resid, resid.shape[-1:], eps=eps)


def inertness(
    *, norms: Iterable[Callable[[Tensor, float], Tensor]] = (_layer_norm, _rms_norm)
) -> GateResult:
    """A norm of c r with eps is that of r with eps / c^2; without eps it does not see c."""
    resid = _random(16, 32)
    deviations = [
        norm(c * resid, eps) - norm(resid, eps / c**2)
        for norm in norms
        for c in (0.1, 3.0, 100.0)
        for eps in (0.0, 1e-5)
    ]
    return GateResult("I3 inertness", _largest(deviations), 1e-12)


def linear_readout(*, readout: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> GateResult:
    """Behind a bias-free readout r -> c r multiplies A by c and leaves G and each answer."""
    resid, unembed = _random(64, 16), _random(16, 11, seed=1)
    logits = readout(resid, unembed)
    labels = torch.randint(11, (64,), generator=_generator(2))
    deviations: list[Tensor | float] = []
    for c in (0.1, 3.0, 100.0):
        scaled = readout(c * resid, unembed)
        deviations += [
            logit_scale(scaled) / logit_scale(logits) / c - 1,
            alignment(scaled, labels) - alignment(logits, labels),
            accuracy(scaled, labels).double() - accuracy(logits, labels).double(),
            (scaled.argmax(dim=-1) != logits.argmax(dim=-1)).double(),
        ]
    return GateResult("I5 linear readout", _largest(deviations), 1e-12)


def gauges(*, metrics: Iterable[type[Metric]] | None = None) -> GateResult:
    """Gauges leave logits and invariant metrics as they are, and move the others visibly."""
    chosen = list(discover().values() if metrics is None else metrics)
    model = specimen()
    past = perturbed(model)
    plain = observe(model, earlier=past)
    before = {cls: read(cls(), plain) for cls in chosen}
    deviations: list[Tensor | float] = []
    for gauge in set(GAUGES) - {"gain"}:
        moved = observe(regauged(model, gauge), earlier=regauged(past, gauge))
        deviations.append(given(moved.logits, "logits") - given(plain.logits, "logits"))
        deviations += [law_deviation(cls, gauge, before[cls], read(cls(), moved)) for cls in chosen]
    for cls in chosen:
        if cls.needs == ("params",) and "gain" in cls.scale_law:
            ends = (read(cls(), _normed(shift=shift)) for shift in (0.0, 0.5))
            deviations.append(law_deviation(cls, "gain", *ends))
    return GateResult("I7 gauges", _largest(deviations), 1e-9)


def variance_split(*, split: Callable[..., dict[str, Tensor]] = residual_variance) -> GateResult:
    """Between and within sum to the total; the published sigma^2 behind a norm is A^2 / (d - 1)."""
    resid = 3 + _random(50, 16)
    classes = torch.randint(7, (50,), generator=_generator(1))
    parts = split(resid, classes, n_classes=7)
    whole = parts["between"] + parts["within"]
    hook = "blocks.0.hook_resid_post"
    acts = {hook: _layer_norm(resid, 0.0)[:, None]}
    snapshot = Snapshot(step=0, acts=acts, classes=classes, n_classes=7, readout=0)
    known = discover()
    amplitude, variance = (
        read(known[name](), snapshot)["published", 0, None, None]
        for name in ("amplitude_activation", "residual_variance")
    )
    deviations = [parts["total"] / whole - 1, variance / (amplitude**2 / 15) - 1]
    return GateResult("I8 variance split", _largest(deviations), 1e-10)


def dprime_split(*, measure: Callable[..., Separation] = dprime) -> GateResult:
    """The four terms sum to log d', and the four laws of clamping hold."""
    deviations: list[Tensor] = []
    for width in (6, 16):  # without and with shrinkage
        classes, folds = torch.arange(3).repeat_interleave(16), torch.arange(48) % 2
        unembed = _random(width, 3)
        centres = 2 * unembed.T[classes]
        resid = 5 + centres + _random(48, width, seed=1)
        members = functional.one_hot(classes).double()
        means = (members.T @ resid / 16)[classes]
        middle = resid.mean(dim=0)
        found = measure(resid, classes, folds, unembed)
        terms = sum(found[1:5], torch.zeros(()))
        deviations.append((terms - found.d_prime.log())[found.positive])
        clamped = {
            1.0: (3 * resid, middle + 3 * (resid - middle)),
            2.0: (means + (resid - means) / 2, resid + (means - middle)),
        }
        for factor, rows in clamped.items():
            for changed in rows:
                ratio = measure(changed, classes, folds, unembed).d_prime / found.d_prime
                deviations.append(ratio / factor - 1)
    return GateResult("I9 d' split", _largest(deviations), 1e-10)


def causality(*, model: Callable[[Tensor], Tensor] | None = None) -> GateResult:
    """Changing later tokens leaves the logits of earlier positions bit-equal."""
    run = specimen() if model is None else model
    tokens = torch.tensor([[1, 2, 7], [3, 4, 7]])
    deviations = []
    with torch.no_grad():
        for position in range(2):
            changed = tokens.clone()
            changed[:, position + 1 :] = 5
            seen = slice(position + 1)
            deviations.append(run(changed)[:, seen] - run(tokens)[:, seen])
    return GateResult("I16 causality", _largest(deviations), 0.0)


def divergence(*, measure: Callable[[Tensor, Tensor], Tensor] = jensen_shannon) -> GateResult:
    """Disjoint rows are 1 bit apart, equal rows 0, others scipy's squared distance over ln 2."""
    p, q = _random(16, 9).softmax(dim=-1), _random(16, 9, seed=1).softmax(dim=-1)
    rows = zip(p.numpy(), q.numpy(), strict=True)
    distance = torch.tensor([jensenshannon(*row) for row in rows])
    left, right = torch.eye(2).double()
    deviations = [
        measure(left, right) - 1,
        measure(p, p),
        measure(p, q) - distance.square() / math.log(2),
    ]
    return GateResult("I17 divergence", _largest(deviations), 1e-12)


def self_label(*, cls: type[Metric] = Calibration) -> GateResult:
    """Calibration against the model's own choice between two answers is mean(min(p, 1 - p))."""
    logits = 3 * _random(256, 2)
    labels = torch.randint(2, (256,), generator=_generator(1))
    readings = read(cls(), Snapshot(step=0, logits=logits, labels=labels))
    tautology = logits.softmax(dim=-1).amin(dim=-1).mean()
    deviation = readings["published", None, None, None] - tautology
    return GateResult("I18 self-label tautology", _largest([deviation]), 1e-12)


def _surprise(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(log_probabilities(logits), labels)


def batch_independence(
    *,
    measures: Iterable[Callable[[Tensor, Tensor], Tensor]] = (margin, alignment, _surprise),
) -> GateResult:
    """An example's values do not depend on the batch that it comes in, nor on its order."""
    model = specimen().float()
    tokens, labels = _questions(model.p)

    def measured(measure: Callable[[Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
        return measure(model(tokens[rows])[:, 2], labels[rows])

    deviations = []
    everything, order = torch.arange(49), torch.randperm(49, generator=_generator(0))
    for measure in measures:
        together = measured(measure, everything)
        alone = torch.cat([measured(measure, row) for row in everything.split(1)])
        deviations += [
            _relative(alone, together),
            _relative(measured(measure, order), together[order]),
        ]
    return GateResult("I20 batch independence", _largest(deviations), 1e-5)


def _relative(value: Tensor, reference: Tensor) -> Tensor:
    return (value - reference) / reference.abs().clamp(min=1)


def device_reduction(*, metrics: Iterable[type[Metric]] | None = None) -> GateResult:
    """Two half batches, their states exchanged as between devices, give the whole batch's value."""
    model = specimen()
    whole = observe(model, earlier=perturbed(model))
    deviations: list[float] = []
    for cls in discover().values() if metrics is None else metrics:
        together, apart = read(cls(), whole), read(on_two_devices(cls, *halves(whole)))
        if together.keys() != apart.keys():
            deviations.append(1.0)
            continue
        deviations += [
            _distance(value, apart[place])
            for place, value in together.items()
            if (cls.name, place[0]) != FIRST_EXAMPLE
        ]
    return GateResult("I21 device reduction", _largest(deviations), 1e-6)


GATES: tuple[Callable[[], GateResult], ...] = (
    log_identity,
    inertness,
    linear_readout,
    gauges,
    variance_split,
    dprime_split,
    causality,
    divergence,
    self_label,
    batch_independence,
    device_reduction,
)
