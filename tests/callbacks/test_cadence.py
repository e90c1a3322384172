import pytest
from hypothesis import given
from hypothesis import strategies as st

from allostasis.callbacks.cadence import Cadence, Plan


def recorded(accuracies: list[float], cadence: Cadence | None = None) -> list[int]:
    cadence = cadence or Cadence()
    return [10 * i for i, accuracy in enumerate(accuracies) if cadence.is_due(10 * i, accuracy)]


def test_number_of_records_for_a_scripted_curve() -> None:
    # 30 probes flat, 12 inside the band, 58 after it: sparse steps 0, 100, ..., the band, 5 more
    curve = [0.05] * 30 + [0.2 + 0.05 * i for i in range(12)] + [0.99] * 58
    inside = list(range(300, 420, 10))
    after = [420, 430, 440, 450, 460]
    sparse = [step for step in range(0, 1000, 100) if step not in inside + after]
    assert recorded(curve) == sorted(sparse + inside + after)


def test_a_jump_over_the_whole_band_is_recorded_on_its_far_side() -> None:
    steps = recorded([0.1] * 15 + [0.9] * 15)
    assert steps == [0, 100, 150, 160, 170, 180, 190, 200]


@pytest.mark.parametrize("edge", [0.15, 0.85])
def test_an_accuracy_on_the_edge_is_outside_the_band(edge: float) -> None:
    assert recorded([edge] * 10) == [0]


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=2, max_size=60), st.data())
def test_a_resumed_cadence_decides_as_an_uninterrupted_one(
    curve: list[float], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(curve) - 1))
    whole, first, second = Cadence(), Cadence(), Cadence()
    expected = [whole.is_due(10 * i, accuracy) for i, accuracy in enumerate(curve)]
    got = [first.is_due(10 * i, accuracy) for i, accuracy in enumerate(curve[:cut])]
    second.load_state_dict(first.state_dict())
    got += [second.is_due(10 * i, accuracy) for i, accuracy in enumerate(curve[cut:], start=cut)]
    assert got == expected


def test_only_steps_that_are_probed_can_be_due() -> None:
    with pytest.raises(ValueError, match="sparse_every=105 is no multiple of dense_every=10"):
        Cadence(sparse_every=105)
    with pytest.raises(ValueError, match="drift_lag=55 is no multiple"):
        Plan(record=["*"], evaluate=[], drift_lag=55)
    with pytest.raises(ValueError, match="low=0.9 is not below high=0.5"):
        Cadence(low=0.9, high=0.5)


def test_only_held_out_probe_is_used() -> None:
    import torch

    from allostasis.experiments.grokking.module import Grokking
    from allostasis.models.modular_transformer import ModularTransformer
    from allostasis.tasks.modular_addition import ModularAddition

    task = ModularAddition(seed=0, p=13, train_frac=0.5, probe_size=40)
    model = ModularTransformer(seed=0, p=13, d_model=32, n_heads=2, d_mlp=128)
    module = Grokking(model=model, task=task, lr=3e-3, weight_decay=0.0)
    optimiser = module.configure_optimizers()
    for _ in range(300):
        optimiser.zero_grad()
        model.loss(task.train).backward()
        optimiser.step()

    def accuracy(pairs: object) -> float:
        return float((model.logits(pairs).argmax(-1) == pairs.answer).double().mean())

    trained = set(zip(task.train.a.tolist(), task.train.b.tolist(), strict=True))
    probed = set(zip(task.probe.a.tolist(), task.probe.b.tolist(), strict=True))
    assert not trained & probed
    assert accuracy(task.train) == 1.0
    assert module.probe_accuracy() == accuracy(task.probe) < 0.9
    assert module.probe_accuracy(is_followed=True) == accuracy(task.probe)
    model.W_U.data.zero_()  # the grid kept for the snapshots is theirs only, once
    assert next(module.snapshots((), full=False)).logits.any()
    assert not next(module.snapshots((), full=False)).logits.any()
    assert torch.equal(task.probe.answer, (task.probe.a + task.probe.b) % 13)
