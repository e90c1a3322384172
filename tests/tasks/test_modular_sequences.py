"""Modular addition as sequences: scored at '=' only, and the answer is not in the input."""

import pytest
import torch


@pytest.fixture(scope="module")
def task():
    from allostasis.tasks.modular_sequences import ModularSequences

    return ModularSequences(seed=0, p=11, vocab_size=12, probe_size=8)


def test_the_answer_is_scored_at_the_last_position_alone_and_not_read(task) -> None:
    batch = task.train_batch(0)
    assert batch.scored.tolist() == [[False, False, True]] * len(batch)
    a, b, equals = batch.tokens.T
    assert set(equals.tolist()) == {11}
    assert torch.equal(batch.targets[:, -1], (a + b) % 11)
    assert set(batch.targets[:, -1].tolist()) == set(range(11))
    assert not {*map(tuple, batch.tokens.tolist())} & {*map(tuple, task.held_out.tokens.tolist())}


def test_batches_are_a_function_of_the_update() -> None:
    from allostasis.tasks.modular_sequences import ModularSequences

    one, other = (
        ModularSequences(seed=1, p=11, vocab_size=12, probe_size=8, batch_size=16) for _ in range(2)
    )
    first = one.train_batch(3)
    one.train_batch(4)
    assert torch.equal(first.tokens, other.train_batch(3).tokens)
    assert not torch.equal(first.tokens, other.train_batch(4).tokens)


def test_sizes_that_do_not_fit_are_refused() -> None:
    from allostasis.tasks.modular_sequences import ModularSequences

    with pytest.raises(ValueError, match="p \\+ 1 = 12 tokens and 3 positions"):
        ModularSequences(seed=0, p=11, vocab_size=11)
