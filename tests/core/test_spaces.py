"""Two spaces that are never mixed, and an inner product that knows no unit."""

import inspect

import pytest
import torch
from torch.testing import assert_close


def rows(n: int = 800, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, dtype=torch.float64, generator=generator)
    return torch.randn(n, width, dtype=torch.float64, generator=generator) @ mixing + 1


def test_whitening_keeps_the_pairing_and_makes_rows_isotropic() -> None:  # T-01
    from allostasis.core.spaces import ResidVec, UnembVec, causal_metric

    gamma = rows()
    metric = causal_metric(UnembVec(gamma))
    white = metric.whiten_points(UnembVec(gamma))
    unit = torch.eye(12, dtype=torch.float64)
    assert_close(white.T @ white / len(gamma), unit, atol=1e-8, rtol=0)
    resid = torch.randn(5, 12, dtype=torch.float64)
    paired = metric.whiten_resid(ResidVec(resid)) @ white.T
    expected = resid @ (gamma - gamma.mean(dim=0)).T
    assert_close(paired, expected, atol=1e-9, rtol=1e-9)
    swapped = metric.whiten_unemb(UnembVec(resid)) @ white.T
    assert (swapped - expected).abs().max() > 0.1
    there = UnembVec(gamma[:4])
    assert_close(metric.to_unemb(metric.to_resid(there)).values, there.values)
    assert_close(metric.from_white(metric.whiten_unemb(there)).values, there.values)


def test_vectors_of_two_spaces_do_not_mix() -> None:  # T-01
    from allostasis.core.spaces import (
        CausalMetric,
        ResidVec,
        SpaceError,
        UnembVec,
        causal_metric,
    )

    # the tests' own check of types would come first
    metric = causal_metric(UnembVec(rows()))
    unemb, resid = UnembVec(torch.ones(12)), ResidVec(torch.ones(12))
    with pytest.raises(SpaceError, match=r"takes UnembVec, got ResidVec"):
        inspect.unwrap(CausalMetric.whiten_unemb)(metric, resid)
    with pytest.raises(SpaceError, match=r"UnembVec and ResidVec is not"):
        inspect.unwrap(CausalMetric.inner)(metric, unemb, resid)


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize("shrinkage", ["auto", "ledoit_wolf", 0.1])
def test_the_scale_of_the_unembedding_changes_no_cosine(scale: float, shrinkage) -> None:  # T-02
    from allostasis.core.spaces import UnembVec, causal_metric

    gamma = rows()
    cosines = []
    for factor in (1.0, scale):
        metric = causal_metric(UnembVec(factor * gamma), shrinkage=shrinkage)
        left, right = UnembVec(factor * gamma[:50]), UnembVec(factor * gamma[50:100])
        cosines.append(metric.cosine(left, right))
    assert_close(cosines[0], cosines[1], atol=1e-6, rtol=0)


def test_few_tokens_are_shrunk_and_many_are_not() -> None:
    from sklearn.covariance import ledoit_wolf_shrinkage

    from allostasis.core.spaces import UnembVec, causal_metric

    gamma = rows(100)
    found = causal_metric(UnembVec(gamma)).shrinkage
    assert found == pytest.approx(ledoit_wolf_shrinkage(gamma.numpy()), rel=1e-9)
    assert causal_metric(UnembVec(rows(800))).shrinkage == 0


def test_a_metric_is_read_as_it_was_written(tmp_path) -> None:
    from allostasis.core.spaces import CausalMetric, UnembVec, causal_metric

    metric = causal_metric(UnembVec(rows(100)))
    metric.save(tmp_path / "metric.safetensors")
    again = CausalMetric.load(tmp_path / "metric.safetensors")
    assert_close(again.sigma, metric.sigma)
    assert again.shrinkage == metric.shrinkage
