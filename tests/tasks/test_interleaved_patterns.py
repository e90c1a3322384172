"""Interleaved patterns against counting, a written-out Bayes rule, and published closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def task():
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns

    return InterleavedPatterns(seed=0, n_val=256, n_calibration=4096, n_contexts=4)


@pytest.fixture(scope="module")
def many(task):
    """20,000 sequences at full size, and the best predictor's answers."""
    from allostasis.tasks.interleaved_patterns import bayes_oracle

    sequences = task.sequences("test", range(20_000))
    tokens = torch.cat([sequences.tokens, sequences.targets[:, -1:]], dim=1)
    return sequences, bayes_oracle(tokens, vocab_size=4096, period_low=2, period_high=7)


def test_streams_repeat_with_their_period(task) -> None:
    tokens, periods = task._draw("train", range(200))
    assert set(periods.flatten().tolist()) == set(range(2, 8))
    for item, both in zip(tokens, periods.tolist(), strict=True):
        for stream, period in zip((item[0::2], item[1::2]), both, strict=True):
            assert torch.equal(stream[period:], stream[:-period])


def test_iid_fixture_has_ceiling_one_over_vocab() -> None:
    from allostasis.tasks.interleaved_patterns import bayes_oracle

    noise = torch.randint(64, (500, 17), generator=torch.Generator().manual_seed(0))
    guess = bayes_oracle(noise, vocab_size=64, period_low=9, period_high=9)
    assert guess.confidence.max() == pytest.approx(1 / 64)
    assert guess.entropy.min() == pytest.approx(math.log(64))
    assert (guess.token == noise[:, 1:]).double().mean() < 0.03


def test_splits_are_disjoint_and_items_do_not_depend_on_workers(task) -> None:
    alone = [task.item("train", index) for index in (7, 3, 11)]
    together = task.sequences("train", [7, 3, 11])
    assert all(torch.equal(a[:-1], b) for a, b in zip(alone, together.tokens, strict=True))
    splits = [
        {tuple(item.tolist()) for item in task._draw(split, range(300))[0]}
        for split in ("train", "test", "calibration", "probe", "classes")
    ]
    assert all(not a & b for a, b in itertools.combinations(splits, 2))
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns

    assert not torch.equal(InterleavedPatterns(seed=1).item("train", 0), task.item("train", 0))


def test_the_batch_of_an_update_is_a_function_of_its_number() -> None:
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns

    settings = {"seed": 3, "seq_len": 32, "vocab_size": 64, "n_train": 96, "batch_size": 32}
    for fresh in (True, False):
        one, other = (InterleavedPatterns(fresh=fresh, **settings) for _ in range(2))
        there = {step: one.train_batch(step).tokens for step in range(7)}
        for step in (5, 0, 6, 2):
            assert torch.equal(other.train_batch(step).tokens, there[step])
        epochs = [torch.cat([there[s] for s in steps]) for steps in ((0, 1, 2), (3, 4, 5))]
        seen = [{tuple(row.tolist()) for row in epoch} for epoch in epochs]
        assert (seen[0] == seen[1]) == (not fresh)


def test_the_oracle_meets_the_closed_forms(many) -> None:
    sequences, best = many
    hits = (best.token == sequences.targets).double()
    assert hits.mean() == pytest.approx(0.9375, abs=0.001)
    assert best.confidence.mean() == pytest.approx(0.9375, abs=0.001)
    floor = (8 * math.log(4096) + 2 * math.log(6)) / 128
    assert best.entropy.mean() == pytest.approx(floor, abs=0.005)
    by_position = [0, 0, 0, 1 / 6, 1 / 6, 2 / 6, 2 / 6, 3 / 6, 3 / 6, 4 / 6, 4 / 6, 5 / 6, 5 / 6, 1]
    assert hits.mean(dim=0)[:14].tolist() == pytest.approx(by_position, abs=0.012)
    assert hits[:, 13:].mean() > 0.9999  # but for tokens that are equal by chance
    predictable = sequences.groups["predictable"]
    assert hits[predictable].mean() > 0.9999
    assert predictable.double().mean() == pytest.approx(118 / 128, abs=0.002)


def test_an_induction_rule_misses_the_first_repeat_too(many) -> None:
    from allostasis.tasks.interleaved_patterns import induction_oracle

    sequences, _ = many
    tokens = torch.cat([sequences.tokens, sequences.targets[:, -1:]], dim=1)[:4_000]
    hits = induction_oracle(tokens) == sequences.targets[:4_000]
    assert hits.double().mean() == pytest.approx(0.9215, abs=0.002)


@given(
    seed=st.integers(0, 10_000), vocab=st.integers(2, 5), low=st.integers(1, 3),
    extra=st.integers(0, 2),
)  # fmt: skip
def test_the_oracle_is_bayes_rule_written_out(seed: int, vocab: int, low: int, extra: int) -> None:
    from allostasis.tasks.interleaved_patterns import bayes_oracle

    high = low + extra
    generator = torch.Generator().manual_seed(seed)
    item = torch.randint(vocab, (1, 9), generator=generator)
    found = bayes_oracle(item, vocab_size=vocab, period_low=low, period_high=high)
    stream = item[0, 0::2].tolist()
    for place in range(1, len(stream)):
        # all patterns of all periods, each as likely as 1 / V^L: enumerate what comes next
        weight = [0.0] * vocab
        for period in range(low, high + 1):
            for pattern in itertools.product(range(vocab), repeat=period):
                said = [pattern[k % period] for k in range(place + 1)]
                if said[:place] == stream[:place]:
                    weight[said[place]] += 1 / vocab**period
        total = sum(weight)
        if total == 0:  # the stream is none that the task can draw
            continue
        shares = [w / total for w in weight]
        at = 2 * place - 1
        assert found.confidence[0, at] == pytest.approx(max(shares), abs=1e-9)
        surprise = -sum(p * math.log(p) for p in shares if p > 0)
        assert found.entropy[0, at] == pytest.approx(surprise, abs=1e-9)


def test_no_predictor_that_sees_the_past_is_above_the_ceiling_of_predictable_positions() -> None:
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns, bayes_oracle

    small = InterleavedPatterns(seed=0, seq_len=32, vocab_size=8)
    sequences = small.sequences("test", range(4_000))
    tokens = torch.cat([sequences.tokens, sequences.targets[:, -1:]], dim=1)
    best = bayes_oracle(tokens, vocab_size=8, period_low=2, period_high=7, is_over=True)
    mask = sequences.groups["predictable"]
    hits = (best.token == sequences.targets)[mask].double().mean()
    assert small.ceiling(sequences)["predictable"].accuracy == pytest.approx(float(hits), abs=0.004)


def test_the_class_probe_ends_with_its_class_and_still_repeats(task) -> None:
    probe = task.class_probe
    assert probe.classes is not None
    assert torch.equal(probe.targets[:, -1], probe.classes)
    assert torch.bincount(probe.classes).tolist() == [4] * 32
    whole = torch.cat([probe.tokens[:, :1], probe.targets], dim=1)
    for item in whole[:16]:
        repeats = [
            any(torch.equal(s[period:], s[:-period]) for period in range(2, 8))
            for s in (item[0::2], item[1::2])
        ]
        assert all(repeats)


def test_periods_that_do_not_fit_are_refused() -> None:
    from allostasis.tasks.interleaved_patterns import InterleavedPatterns

    with pytest.raises(ValueError, match="period_low=5 is above period_high=3"):
        InterleavedPatterns(seed=0, period_low=5, period_high=3)
    with pytest.raises(ValueError, match="would not repeat; take seq_len of at least 16"):
        InterleavedPatterns(seed=0, seq_len=14)
