"""The blockwise readout loss against torch's own cross-entropy and autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close


@given(
    seed=st.integers(0, 1_000), rows=st.integers(1, 40), vocab=st.integers(2, 70),
    cells=st.integers(1, 600), scale=st.sampled_from([0.1, 1.0, 60.0]),
)  # fmt: skip
def test_loss_and_gradients_equal_autograd_whatever_the_blocks(
    seed: int, rows: int, vocab: int, cells: int, scale: float
) -> None:
    from allostasis.models import readout

    generator = torch.Generator().manual_seed(seed)
    states = scale * torch.randn(2, rows, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, vocab, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (2, rows), generator=generator)
    scored = torch.rand(2, rows, generator=generator) > 0.3
    scored[0, 0] = True
    states.requires_grad_()
    weight.requires_grad_()
    before, readout.CELLS = readout.CELLS, {"cpu": cells}
    try:
        ours = readout.readout_loss(states, weight, targets, scored)
        found = torch.autograd.grad(3 * ours, (states, weight))
    finally:
        readout.CELLS = before
    plain = torch.nn.functional.cross_entropy((states @ weight)[scored], targets[scored])
    wanted = torch.autograd.grad(3 * plain, (states, weight))
    assert_close(ours, plain)
    assert_close(found, wanted)


def test_confident_logits_give_a_finite_loss() -> None:
    from allostasis.models.readout import readout_loss

    states = torch.full((1, 1, 1), 500.0)
    weight = torch.tensor([[1.0, -1.0]])
    everything = torch.ones(1, 1, dtype=torch.bool)
    right = readout_loss(states, weight, torch.tensor([[0]]), everything)
    wrong = readout_loss(states, weight, torch.tensor([[1]]), everything)
    assert right.item() == 0.0
    assert wrong.item() == pytest.approx(1000.0)
