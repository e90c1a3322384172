"""Each gate passes on the instrument as it is, and fails on one that is broken."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from allostasis.instrument import (
    GATES,
    GateResult,
    batch_independence,
    causality,
    device_reduction,
    divergence,
    dprime_split,
    gauges,
    inertness,
    linear_readout,
    log_identity,
    self_label,
    specimen,
    variance_split,
)
from allostasis.metrics.amplitude_param import AmplitudeParam
from allostasis.metrics.base import Metric, Snapshot, given
from allostasis.metrics.calibration import Calibration
from allostasis.metrics.dprime import Separation, dprime
from allostasis.metrics.margin import margin
from allostasis.metrics.residual_variance import residual_variance
from allostasis.metrics.routing_drift import jensen_shannon


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.__name__)
def test_the_instrument_passes_each_gate(gate: Callable[[], GateResult]) -> None:
    result = gate()
    assert result.passed, result


def _alignment_of_raw_logits(logits: Tensor, labels: Tensor) -> Tensor:
    return margin(logits, labels) / (math.sqrt(2) * logits.norm(dim=-1))


def _norm_with_eps_outside_the_root(resid: Tensor, eps: float) -> Tensor:
    return resid / (resid.square().mean(dim=-1, keepdim=True).sqrt() + eps)


def _readout_with_bias(resid: Tensor, unembed: Tensor) -> Tensor:
    return resid @ unembed + torch.arange(unembed.shape[-1])


def _split_over_all_but_one(resid: Tensor, classes: Tensor, *, n_classes: int) -> dict[str, Tensor]:
    parts = residual_variance(resid, classes, n_classes=n_classes)
    return parts | {"total": parts["total"] * len(resid) / (len(resid) - 1)}


def _dprime_with_inflated_shift(*args: Tensor) -> Separation:
    found = dprime(*args)
    return found._replace(mean_shift=found.mean_shift + 0.01)


def _dprime_without_noise(*args: Tensor) -> Separation:
    found = dprime(*args)
    return found._replace(d_prime=found.d_prime / found.noise_level.exp())


def _distance_in_place_of_divergence(p: Tensor, q: Tensor) -> Tensor:
    return jensen_shannon(p, q).clamp(min=0).sqrt()


def _margin_relative_to_the_batch(logits: Tensor, labels: Tensor) -> Tensor:
    lead = margin(logits, labels)
    return lead - lead.mean()


def _margin_of_the_row_before(logits: Tensor, labels: Tensor) -> Tensor:
    return margin(logits, labels).roll(1)


class _SelfLabelWithTruth(Calibration):
    def update(self, snapshot: Snapshot) -> None:
        super().update(snapshot)
        (_, bins), (_, own) = *self.kept("bins"), *self.kept("own")
        own.copy_(bins)


class _ParamOfValuesAlone(AmplitudeParam):
    """W_V's norm under the name, and with the laws, of the OV circuit's."""

    def update(self, snapshot: Snapshot) -> None:
        for index, layer in enumerate(given(snapshot.weights, "params").layers):
            self.add(layer.W_V.norm(dim=(-2, -1)), n=1, over=("head",), layer=index)


class _Blind(AmplitudeParam):
    """A constant, which every invariance test would pass."""

    def update(self, snapshot: Snapshot) -> None:
        assert snapshot.weights is not None
        self.add(1.0, n=1, part="v", layer=0, head=0)


class _MeanOfBatchMeans(Metric):
    symbol, unit, needs = "Psi", "logit", ("logits",)
    scale_law, direction, source = {}, "none", "a test"

    def update(self, snapshot: Snapshot) -> None:
        logits = given(snapshot.logits, "logits")
        self.add(logits.amax(dim=0).mean(), n=1)


class _Unmasked(nn.Module):
    """The specimen with its attention open to the future."""

    def __init__(self) -> None:
        super().__init__()
        self.model = specimen()

    def forward(self, tokens: Tensor) -> Tensor:
        def open_up(scores: Tensor, hook: object) -> Tensor:  # noqa: ARG001
            return torch.where(scores.isinf(), 0.0, scores)

        hook = "blocks.0.attn.hook_attn_scores"
        return self.model.run_with_hooks(tokens, fwd_hooks=[(hook, open_up)])


BROKEN: dict[str, Callable[[], GateResult]] = {
    "centring left out": lambda: log_identity(measure=_alignment_of_raw_logits),
    "eps outside the root": lambda: inertness(norms=[_norm_with_eps_outside_the_root]),
    "a bias": lambda: linear_readout(readout=_readout_with_bias),
    "a gauge-dependent value": lambda: gauges(metrics=[_ParamOfValuesAlone]),
    "a blind metric": lambda: gauges(metrics=[_Blind]),
    "Bessel's total": lambda: variance_split(split=_split_over_all_but_one),
    "terms that do not sum": lambda: dprime_split(measure=_dprime_with_inflated_shift),
    "d' without its noise": lambda: dprime_split(measure=_dprime_without_noise),
    "no mask": lambda: causality(model=_Unmasked()),
    "distance": lambda: divergence(measure=_distance_in_place_of_divergence),
    "true labels": lambda: self_label(cls=_SelfLabelWithTruth),
    "batch mean": lambda: batch_independence(measures=[_margin_relative_to_the_batch]),
    "order": lambda: batch_independence(measures=[_margin_of_the_row_before]),
    "mean of means": lambda: device_reduction(metrics=[_MeanOfBatchMeans]),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_instrument_fails_its_gate(broken: str) -> None:
    result = BROKEN[broken]()
    assert not result.passed, result
