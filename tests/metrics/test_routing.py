"""Measures of attention against scipy and by hand."""

import math

import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import Tensor
from torch.testing import assert_close

from allostasis.instrument import read
from allostasis.metrics.attention_entropy import AttentionEntropy, attention_entropy, visible_keys
from allostasis.metrics.base import Snapshot
from allostasis.metrics.routing_drift import RoutingDrift, jensen_shannon
from allostasis.metrics.routing_stability import RoutingStability, published_stability

HOOK = "blocks.0.attn.hook_pattern"


def _causal(batch: int, heads: int, length: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(batch, heads, length, length, generator=generator).double()
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


def test_divergence_is_scipys_squared_distance_in_bits() -> None:
    p, q = _causal(4, 2, 5), _causal(4, 2, 5, seed=1)
    found = jensen_shannon(p, q).flatten()
    rows = zip(p.flatten(0, 2).numpy(), q.flatten(0, 2).numpy(), strict=True)
    distance = torch.tensor([jensenshannon(*row, base=2) for row in rows])
    assert_close(found, distance.square(), rtol=0, atol=1e-12)


def test_row_entropy_equals_scipys_and_reaches_the_log_of_the_keys() -> None:
    pattern = _causal(3, 2, 6)
    expected = torch.from_numpy(stats.entropy(pattern.numpy(), axis=-1))
    assert_close(attention_entropy(pattern), expected, rtol=0, atol=1e-12)
    assert attention_entropy(torch.full((1, 8), 0.125)).item() == pytest.approx(math.log(8))


def test_attention_entropy_leaves_out_rows_that_see_one_key() -> None:
    length = 4
    visible = torch.arange(1, length + 1).double()
    uniform = torch.ones(length, length).tril().double() / visible[:, None]
    sharp = torch.zeros(length, length).double()
    sharp[:, 0] = 1
    pattern = torch.stack([uniform, sharp]).expand(5, 2, length, length)
    readings = read(AttentionEntropy(), Snapshot(step=0, acts={HOOK: pattern}))
    assert readings["", 0, 0, None] == pytest.approx(1, rel=1e-14)
    assert readings["", 0, 1, None] == 0
    nats = sum(math.log(keys) for keys in (2, 3, 4)) / 3
    assert readings["nats", 0, 0, None] == pytest.approx(nats, rel=1e-14)


def test_published_entropy_calls_two_sharp_heads_wide() -> None:
    """The entropy of averaged heads is at least the average entropy, here 1 bit against 0."""
    left, right = torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)
    left[:, :, 0] = 1
    right[:, :, 2] = 1  # reads the future too, so that every row sees three keys
    pattern = torch.stack([left, right], dim=1)
    readings = read(AttentionEntropy(), Snapshot(step=0, acts={HOOK: pattern}))
    assert readings["nats", 0, 0, None] == readings["nats", 0, 1, None] == 0
    assert readings["published", 0, None, None] == pytest.approx(math.log(2))


def test_visible_keys_are_all_of_them_without_a_mask() -> None:
    assert visible_keys(_causal(2, 2, 4)).tolist() == [1, 2, 3, 4]
    assert visible_keys(torch.full((2, 2, 4, 4), 0.25)).tolist() == [4, 4, 4, 4]


def test_a_pattern_averaged_over_heads_is_refused() -> None:
    averaged = _causal(2, 2, 4).mean(dim=1)
    for cls in (AttentionEntropy, RoutingDrift):
        snapshot = Snapshot(step=0, acts={HOOK: averaged}, earlier={HOOK: averaged})
        with pytest.raises(Exception, match="batch head query key|averaged over heads"):
            cls().update(snapshot)


def test_drift_is_taken_for_each_head_over_rows_with_a_choice() -> None:
    now, before = _causal(6, 2, 4), _causal(6, 2, 4)
    before[:, 1] = _causal(6, 2, 4, seed=1)[:, 1]  # only head 1 has moved
    snapshot = Snapshot(step=0, acts={HOOK: now}, earlier={HOOK: before}, initial={HOOK: now})
    readings = read(RoutingDrift(), snapshot)
    assert readings["", 0, 0, None] == pytest.approx(0, abs=1e-15)
    rows = jensen_shannon(now[:, 1, 1:], before[:, 1, 1:])
    assert readings["", 0, 1, None] == pytest.approx(rows.mean().item(), rel=1e-12)
    assert readings["from_init", 0, 1, None] == pytest.approx(0, abs=1e-15)
    neighbours = jensen_shannon(now[0::2, 1, 1:], now[1::2, 1, 1:]).mean().item()
    assert readings["content", 0, 1, None] == pytest.approx(neighbours, rel=1e-12)
    ratio = readings["", 0, 1, None] / neighbours
    assert readings["relative", 0, 1, None] == pytest.approx(ratio, rel=1e-12)
    stability = read(RoutingStability(), snapshot)
    assert stability["", 0, 1, None] == pytest.approx(1 - readings["", 0, 1, None], rel=1e-12)


def test_published_stability_equals_scipys_distance_of_whole_matrices() -> None:
    now, before = _causal(3, 2, 5), _causal(3, 2, 5, seed=1)
    distance = jensenshannon(now[0, 0].flatten().numpy(), before[0, 0].flatten().numpy())
    snapshot = Snapshot(step=500, acts={HOOK: now}, earlier={HOOK: before})
    readings = read(RoutingStability(), snapshot)
    assert readings["published", 0, 0, None] == pytest.approx(1 - distance, rel=1e-12)
    assert [place for place in readings if place[0] == "published"] == [("published", 0, 0, None)]


def test_published_stability_cannot_fall_below_one_minus_the_root_of_ln_2() -> None:
    left, right = torch.eye(3).double()[:1], torch.eye(3).double()[1:2]
    assert published_stability(left, right).item() == pytest.approx(1 - math.sqrt(math.log(2)))
    assert published_stability(left, left).item() == 1


def test_published_stability_is_one_at_the_first_step_and_absent_off_the_lags_grid() -> None:
    acts = {HOOK: _causal(3, 2, 4)}
    first = read(RoutingStability(), Snapshot(step=0, acts=acts))
    assert first == {("published", 0, 0, None): 1.0}
    assert read(RoutingStability(), Snapshot(step=510, acts=acts)) == {}
