"""Whatever lies in metrics/ says what it is, adds up, and obeys the laws that it declares."""

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor
from torch.testing import assert_close

from allostasis.core.spaces import LayerWeights, Weights
from allostasis.instrument import (
    FIRST_EXAMPLE,
    SCALE,
    halves,
    law_deviation,
    observe,
    on_two_devices,
    perturbed,
    read,
    regauged,
    specimen,
)
from allostasis.metrics.amplitude_param import AmplitudeParam
from allostasis.metrics.base import GAUGES, Coding, Metric, Reading, Snapshot, discover
from allostasis.metrics.fourier_gini import gini
from allostasis.metrics.routing_drift import jensen_shannon, routing_drift

METRICS = discover()
LAWS = {*GAUGES, "resid", "logit_scale", "logit_shift"}
UNITS = {"1", "bit", "nat", "logit", "resid", "rad", "deg", "step", "param"}
AUDIT_KEYS = {
    *("psi_accuracy", "psi_logit_diff", "A_learned", "A_activation", "A_param"),
    *("sigma_sq", "G", "G_entropy"),
}
PSEUDO_NEEDS = {
    *("foils", "clean_logits"),
    *("logits", "labels", "classes", "params", "before", "grads"),
    *("modulus", "grid_logits", "train_pairs", "key_frequencies", "ablated_losses", "features"),
    *("coding", "members", "matches", "decoder", "other_decoders", "truth", "token_losses"),
    "targets",
}

every_metric = pytest.mark.parametrize("name", METRICS)


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    model = specimen()
    return observe(model, earlier=perturbed(model))


def _functions(name: str) -> Iterator[Callable[..., object]]:
    module = importlib.import_module(METRICS[name].__module__)
    for function in vars(module).values():
        is_own = getattr(function, "__module__", "") == module.__name__
        if is_own and inspect.isfunction(function) and not function.__name__.startswith("_"):
            yield function


# ---- what a metric says of itself


@every_metric
def test_a_metric_names_its_symbol_unit_needs_and_axes(name: str) -> None:
    cls = METRICS[name]
    assert cls.symbol in {"Psi", "G", "A", "sigma2", "other"}
    assert {*cls.part_symbols.values()} <= {"Psi", "G", "A", "sigma2", "other"}
    for unit in (cls.unit, *cls.part_units.values()):
        assert {re.sub(r"\^-?\d+$", "", factor) for factor in re.split(r"[*/]", unit)} <= UNITS
    assert {*cls.axes} <= {"layer", "head", "position"}
    assert cls.needs
    for need in cls.needs:
        assert need in PSEUDO_NEEDS or "hook_" in need, need
    assert cls.direction
    assert cls.source
    assert cls.name == name


@every_metric
def test_a_metric_declares_its_parts_and_their_laws(name: str) -> None:
    cls = METRICS[name]
    assert cls.audit_key is None or cls.audit_key in AUDIT_KEYS
    for part in (*cls.part_symbols, *cls.part_units):
        assert any(re.fullmatch(declared.replace("*", ".*"), part) for declared in cls.parts)
    for key, law in cls.scale_law.items():
        part, _, known = key.rpartition(".")
        assert not part or part in cls.parts, key
        assert known in LAWS, key
        assert isinstance(law, int) or law in {"invariant", "changes"}, key
    assert cls.scale_law
    gauges = [cls.scale_law[gauge] for gauge in GAUGES if gauge in cls.scale_law]
    assert cls.functional == all(law == "invariant" for law in gauges)


@every_metric
def test_the_docstrings_have_range_direction_source_and_example(name: str) -> None:
    cls = METRICS[name]
    symbol = {"sigma2": "sigma^2", "other": ""}.get(cls.symbol, cls.symbol)
    first = (importlib.import_module(cls.__module__).__doc__ or "").splitlines()[0]
    assert f"({symbol})" in first or not symbol, first
    sources = []
    for function in _functions(name):
        doc = inspect.getdoc(function) or ""
        for section in ("Args", "Returns", "Source", "Example"):
            assert f"\n{section}:\n" in doc, f"{function.__name__} has no {section}"
        returns = doc.split("\nReturns:\n")[1].split("\n\n")[0]
        assert re.search(r"[\[(]-?\w.*, .*[\])]|>= 0|any real", returns), returns
        direction = "better|high|low|direction|: |larger|positive"
        assert re.search(direction, returns, re.IGNORECASE), returns
        sources.append(" ".join(doc.split("\nSource:\n")[1].split("\n\n")[0].split()))
    assert any(cls.source.rstrip(".") in source for source in sources), (cls.source, sources)
    listed = inspect.getdoc(cls) or ""
    for part in cls.parts:
        assert part.replace("_*", "_<group>") in listed, f"{part} is not in the class's docstring"


# ---- that it adds up


@every_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_reading_is_finite_in_half_precision(
    name: str, dtype: torch.dtype, snapshot: Snapshot
) -> None:
    metric = METRICS[name]()
    metric.update(_cast(snapshot, dtype))
    readings = metric.readings()
    assert readings
    assert all(math.isfinite(reading.value) and reading.n > 0 for reading in readings)
    assert {reading.part for reading in readings} - {""} <= _declared(METRICS[name], readings)


def _declared(cls: type[Metric], readings: list[Reading]) -> set[str]:
    patterns = [part.replace("*", ".*") for part in cls.parts]
    return {r.part for r in readings if any(re.fullmatch(p, r.part) for p in patterns)}


def _cast(snapshot: Snapshot, dtype: torch.dtype) -> Snapshot:
    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {name: cast(tensor) for name, tensor in value.items()}
        if isinstance(value, Weights | LayerWeights | Coding):
            return type(value)(**{field: cast(entry) for field, entry in vars(value).items()})
        if isinstance(value, tuple):
            return tuple(cast(entry) for entry in value)
        return value

    fields = {name: value for name, value in vars(snapshot).items() if not name.startswith("_")}
    return Snapshot(**{name: cast(value) for name, value in fields.items()})


@every_metric
@pytest.mark.parametrize("devices", [1, 2])
def test_halves_equal_whole(name: str, devices: int, snapshot: Snapshot) -> None:
    cls, (first, second) = METRICS[name], halves(snapshot)
    whole = read(cls(), snapshot)
    apart = read(cls(), first, second) if devices == 1 else read(on_two_devices(cls, first, second))
    assert whole.keys() == apart.keys()
    for place, value in whole.items():
        if (name, place[0]) != FIRST_EXAMPLE:
            assert apart[place] == pytest.approx(value, rel=1e-6, abs=1e-12), place


@every_metric
def test_a_metric_forgets_on_reset(name: str, snapshot: Snapshot) -> None:
    metric = METRICS[name]()
    fresh = read(metric, snapshot)
    metric.reset()
    assert metric.readings() == []
    assert read(metric, snapshot) == fresh


# ---- the laws that it declares


@every_metric
def test_the_declared_laws_of_scale_hold(name: str, snapshot: Snapshot) -> None:
    cls = METRICS[name]
    before = read(cls(), snapshot)
    for law in ("resid", "logit_scale", "logit_shift"):
        if law in cls.scale_law:
            after = read(cls(), _changed(snapshot, law))
            assert law_deviation(cls, law, before, after) < 1e-9, law


@every_metric
@pytest.mark.parametrize("gauge", sorted({*GAUGES} - {"gain"}))
def test_the_declared_gauges_hold(name: str, gauge: str, snapshot: Snapshot) -> None:
    model = specimen()
    moved = observe(regauged(model, gauge), earlier=regauged(perturbed(model), gauge))
    before, after = (read(METRICS[name](), seen) for seen in (snapshot, moved))
    assert law_deviation(METRICS[name], gauge, before, after) < 1e-9


def _changed(snapshot: Snapshot, law: str) -> Snapshot:
    assert snapshot.logits is not None
    assert snapshot.grid_logits is not None
    if law == "resid":
        acts = {k: _scaled(k, v) for k, v in snapshot.acts.items()}
        assert snapshot.coding is not None
        assert snapshot.matches is not None
        tensors = {k: SCALE * v for k, v in vars(snapshot.coding).items() if k != "n_parents"}
        matches = replace(snapshot.matches, threshold=SCALE * snapshot.matches.threshold)
        coding = replace(snapshot.coding, **tensors)
        return replace(snapshot, acts=acts, coding=coding, matches=matches)
    if law == "logit_scale":
        factor, shift = SCALE, 0.0
    else:
        factor, shift = 1.0, 3.0
    logits, grid = factor * snapshot.logits + shift, factor * snapshot.grid_logits + shift
    return replace(snapshot, logits=logits, grid_logits=grid)


def _scaled(hook: str, activation: Tensor) -> Tensor:
    return SCALE * activation if "resid" in hook else activation


# ---- no row for what is undefined


def _constant_logits(snapshot: Snapshot) -> Snapshot:
    assert snapshot.logits is not None
    assert snapshot.grid_logits is not None
    return replace(
        snapshot,
        logits=torch.ones_like(snapshot.logits),
        grid_logits=torch.ones_like(snapshot.grid_logits),
    )


def _one_visible_key(snapshot: Snapshot) -> Snapshot:
    def first(acts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v[:, :, :1, :1] if "pattern" in k else v for k, v in acts.items()}

    return replace(
        snapshot, **{k: first(getattr(snapshot, k)) for k in ("acts", "earlier", "initial")}
    )


def _one_example_a_class(snapshot: Snapshot) -> Snapshot:
    assert snapshot.classes is not None
    alone = torch.arange(len(snapshot.classes))
    return replace(snapshot, classes=alone, n_classes=len(alone))


def _one_class(snapshot: Snapshot) -> Snapshot:
    assert snapshot.classes is not None
    return replace(snapshot, classes=torch.zeros_like(snapshot.classes))


def _zero_weights(snapshot: Snapshot) -> Snapshot:
    model = specimen()
    for parameter in model.parameters():
        parameter.zero_()
    return replace(snapshot, weights=model.weights())


def _equal_residuals(snapshot: Snapshot) -> Snapshot:
    acts = {k: torch.zeros_like(v) if "resid" in k else v for k, v in snapshot.acts.items()}
    return replace(snapshot, acts=acts)


def _norm_output(snapshot: Snapshot) -> Snapshot:
    sites = frozenset(f"blocks.0.hook_resid_{site}" for site in ("mid", "post"))
    return replace(snapshot, normalised_sites=sites)


def _no_features(snapshot: Snapshot) -> Snapshot:
    assert snapshot.features is not None
    return replace(snapshot, features=torch.zeros_like(snapshot.features))


def _one_row(snapshot: Snapshot) -> Snapshot:
    assert snapshot.coding is not None
    coding = {k: v if k == "n_parents" else v[:1] for k, v in vars(snapshot.coding).items()}
    return replace(snapshot, coding=replace(snapshot.coding, **coding))


def _useless_site(snapshot: Snapshot) -> Snapshot:
    losses = snapshot.token_losses
    return replace(snapshot, token_losses=losses | {"zero": losses["clean"]})


def _no_members(snapshot: Snapshot) -> Snapshot:
    assert snapshot.members is not None
    return replace(snapshot, members=torch.zeros_like(snapshot.members))


UNDEFINED: dict[tuple[str, str], tuple[Callable[[Snapshot], Snapshot], str]] = {
    ("alignment", ""): (_constant_logits, "all logits are equal"),
    ("log_margin", ""): (_constant_logits, "no example has a positive margin"),
    ("cosine_fve", ""): (_constant_logits, "the logits do not differ between answers"),
    ("key_frequencies", ""): (_constant_logits, "no frequency explains any of the logits"),
    ("restricted_loss", ""): (lambda s: replace(s, key_frequencies=()), "no key frequency"),
    ("excluded_loss", ""): (lambda s: replace(s, key_frequencies=()), "no key frequency"),
    ("routing_drift", ""): (lambda s: replace(s, earlier={}), "no snapshot one lag earlier"),
    ("routing_drift", "from_init"): (lambda s: replace(s, initial={}), "no snapshot at step 0"),
    ("routing_drift", "content"): (_one_visible_key, "no row sees two keys"),
    ("routing_stability", ""): (lambda s: replace(s, earlier={}), "no snapshot one lag earlier"),
    ("attention_entropy", ""): (_one_visible_key, "no row sees two keys"),
    ("amplitude_activation", ""): (
        _norm_output,
        "amplitude cannot move here: the site is a norm's output",
    ),
    ("amplitude_activation", "max_share"): (_equal_residuals, "every residual vector is 0"),
    ("residual_variance", ""): (
        _norm_output,
        "amplitude cannot move here: the site is a norm's output",
    ),
    ("residual_variance", "between"): (
        _one_example_a_class,
        "too few classes with two examples",
    ),
    ("residual_variance", "between_unbiased"): (
        _one_class,
        "too few classes with two examples",
    ),
    ("dprime", "accuracy_pred"): (
        _one_class,
        "no two adjacent answers have two examples in each fold",
    ),
    ("dprime", ""): (
        _equal_residuals,
        "no two adjacent answers have two examples in each fold",
    ),
    ("activation_entropy", ""): (_equal_residuals, "all readout vectors are equal"),
    ("amplitude_learned", "published"): (lambda s: s, "the model has no final norm"),
    ("amplitude_param", "imbalance"): (_zero_weights, "W_V or W_O is 0"),
    ("margin", "geometric"): (
        _zero_weights,
        "the runner-up shares the answer's unembedding column",
    ),
    ("fourier_gini", ""): (_zero_weights, "no Fourier power"),
    ("weight_update", ""): (lambda s: replace(s, before={}), "no earlier parameters, or all 0"),
    ("weight_update", "cosine"): (lambda s: replace(s, grads={}), "no gradient"),
    ("feature_dimensionality", ""): (_no_features, "the feature is not represented"),
    ("feature_interference", "signal_ratio"): (_no_features, "no other feature interferes"),
    ("features_per_dimension", "polysemanticity"): (_no_features, "no feature is represented"),
    ("explained_variance", ""): (_one_row, "the activations do not vary"),
    ("ce_recovered", ""): (_useless_site, "the replacement costs no more than 0.01 nats"),
    ("dead_fraction", ""): (lambda s: s, "fewer than 100000 rows"),
    ("purity", ""): (_no_members, "no concept with 3 rows"),
    ("leakage", ""): (_no_members, "no concept's latent fires"),
    ("absorption", ""): (_no_members, "no child concept can be judged"),
    ("feature_split", "f1"): (_no_members, "no row is of a concept with a latent"),
    ("steering_leakage", "logit_share"): (
        lambda s: replace(s, logits=s.clean_logits),
        "the targets' logits did not move",
    ),
}


@pytest.mark.parametrize("case", UNDEFINED, ids=".".join)
def test_an_undefined_value_has_a_reason_and_no_row(
    case: tuple[str, str], snapshot: Snapshot
) -> None:
    (name, part), (change, reason) = case, UNDEFINED[case]
    metric = METRICS[name]()
    metric.update(change(snapshot))
    assert part not in {reading.part for reading in metric.readings()}
    assert metric.skipped[reason] > 0


# ---- three numbers that were once wrong


def test_amplitude_param_is_positive_and_equals_hand_sum() -> None:
    fused = torch.randn(6, 3 * 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W_Q, W_K, W_V = (part.view(6, 2, 3).transpose(0, 1) for part in fused.split(6, dim=1))
    W_O = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer = LayerWeights(W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=W_O)
    weights = Weights((layer, layer), torch.eye(6), None, {"qkv": fused}, {})
    readings = read(AmplitudeParam(), Snapshot(step=0, weights=weights))
    by_hand = fused[:, 12:].square().sum().sqrt()
    assert readings["published", None, None, None] == pytest.approx(2 * by_hand.item(), rel=1e-12)
    for head in range(2):
        product = W_V[head] @ W_O[head]
        assert readings["", 1, head, None] == pytest.approx(product.norm().item(), rel=1e-12)
        assert readings["", 1, head, None] > 0


def test_amplitude_param_refuses_a_model_that_shows_no_values() -> None:
    weights = Weights((), torch.eye(3), None, {}, {})
    with pytest.raises(ValueError, match="found no value weights"):
        AmplitudeParam().update(Snapshot(step=0, weights=weights))


def test_jsd_disjoint_is_one_bit() -> None:
    left, right = torch.eye(4, dtype=torch.float64)[[0, 1]], torch.eye(4).double()[[2, 3]]
    assert_close(jensen_shannon(left, right), torch.ones(2).double(), rtol=0, atol=1e-15)
    assert routing_drift(left, right).item() == 1.0
    assert jensenshannon(left[0], right[0]) == pytest.approx(math.sqrt(math.log(2)))


@pytest.mark.parametrize("n", [2, 3, 56])
def test_gini_bounds(n: int) -> None:
    assert gini(torch.ones(n)).item() == pytest.approx(0, abs=1e-15)
    assert gini(torch.eye(n)[0]).item() == pytest.approx(1 - 1 / n, rel=1e-15)
    random = torch.rand(n, generator=torch.Generator().manual_seed(n)).double()
    gaps = (random[:, None] - random).abs()
    assert gini(random).item() == pytest.approx((gaps.mean() / (2 * random.mean())).item())
    assert gini(7 * random.flip(0)).item() == pytest.approx(gini(random).item(), rel=1e-14)


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, 2.0]])
def test_gini_refuses_what_it_is_not_defined_for(values: list[float]) -> None:
    with pytest.raises(ValueError, match="numbers >= 0 that are not all 0"):
        gini(torch.tensor(values))
