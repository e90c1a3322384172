"""Replicas against single runs, against each other, and against themselves after a stop."""

import pytest
import torch
from torch.testing import assert_close

P, SIZES = 23, {"d_model": 32, "n_heads": 2, "d_mlp": 64}


def replica(seed: int, dtype: torch.dtype = torch.float32, train_frac: float = 0.5, **how: float):
    from allostasis.engines.replicas import Replica
    from allostasis.models.modular_step import Parameters, initial_parameters
    from allostasis.tasks.modular_pairs import pairs_of, split

    theta = initial_parameters(seed, p=P, **SIZES)
    train = pairs_of(split(seed, p=P, train_frac=train_frac).train, p=P)
    return Replica(Parameters(*(tensor.to(dtype) for tensor in theta)), train, **how)


def block(replicas, **how):
    from allostasis.engines.optimisers import Rule
    from allostasis.engines.replicas import Block

    return Block(replicas, **{"width": len(replicas), "rule": Rule()} | how)


def losses(trained, n_updates: int) -> torch.Tensor:
    curve = []
    for _ in range(n_updates):
        trained.advance(1)
        curve.append(trained.losses.clone())
    return torch.stack(curve)


def single_losses(seed: int, dtype: torch.dtype, n_updates: int) -> torch.Tensor:
    """The package's single run: its own engine, fused AdamW, the warm-up of its module."""
    from allostasis.experiments.grokking.module import Grokking
    from allostasis.models.modular_transformer import ModularTransformer
    from allostasis.tasks.modular_addition import ModularAddition

    task = ModularAddition(seed=seed, p=P, train_frac=0.5, probe_size=8)
    model = ModularTransformer(seed=seed, p=P, **SIZES).to(dtype)
    optimiser = Grokking(model=model, task=task).configure_optimizers()
    curve = []
    for step in range(n_updates):
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 10)
        optimiser.zero_grad()
        loss = model.loss(task.train)
        loss.backward()
        optimiser.step()
        curve.append(loss.detach())
    return torch.stack(curve)


def test_init_and_split_equal_solo() -> None:
    from allostasis.models.modular_transformer import ModularTransformer
    from allostasis.tasks.modular_addition import ModularAddition

    seeds = (0, 1, 7)
    trained = block([replica(seed) for seed in seeds], width=4)
    for slot, seed in enumerate(seeds):
        model = ModularTransformer(seed=seed, p=P, **SIZES)
        for name, values in trained.parameters._asdict().items():
            assert torch.equal(values[slot], getattr(model, name))
        train = ModularAddition(seed=seed, p=P, train_frac=0.5, probe_size=8).train
        assert torch.equal(trained.questions.a[slot], train.a)
        assert torch.equal(trained.questions.b[slot], train.b)
        assert torch.equal(trained.questions.answer[slot], train.answer)


@pytest.mark.parametrize(("dtype", "steps", "rtol"), [
    (torch.float64, 100, 1e-9),
    (torch.float32, 50, 1e-4),  # rounding grows from there: AdamW divides noise by its own size
])  # fmt: skip
def test_losses_equal_those_of_single_runs(dtype: torch.dtype, steps: int, rtol: float) -> None:
    found = losses(block([replica(seed, dtype) for seed in (0, 3)], width=3), steps)
    for slot, seed in enumerate((0, 3)):
        assert_close(found[:, slot], single_losses(seed, dtype, steps), rtol=rtol, atol=0)


def test_slot_and_neighbours_do_not_change_bits() -> None:
    first = block([replica(5), replica(1)], width=4)
    second = block([replica(2), replica(9), replica(3), replica(5)], width=4)
    first.advance(30)
    second.advance(30)
    assert torch.equal(first.theta[0], second.theta[3])


def test_a_block_goes_on_from_its_state_bit_by_bit() -> None:
    whole, halves = (block([replica(0), replica(1)]) for _ in range(2))
    whole.advance(40)
    halves.advance(20)
    later = block([replica(0), replica(1)])
    later.load_state_dict(halves.state_dict())
    later.advance(20)
    assert torch.equal(later.theta, whole.theta)
    assert torch.equal(later.losses, whole.losses)


def test_each_replica_has_its_own_hyperparameters() -> None:
    """Each slot of a mixed block is what a block of that setting alone gives."""
    settings = [
        {"lr": 3e-3, "norm": 20.0},
        {"weight_decay": 0.0, "norm": 15.0},
        {"temperature": 0.5, "norm": 25.0},
    ]
    mixed = block([replica(0, **how) for how in settings])
    mixed.advance(20)
    for slot, how in enumerate(settings):
        alone = block([replica(0, **{"temperature": 1.0} | how)] * 3)
        alone.advance(20)
        assert_close(mixed.theta[slot], alone.theta[0], rtol=1e-5, atol=1e-6)
        assert_close(float(mixed.theta[slot].norm()), how["norm"], rtol=1e-5, atol=0)


def test_evaluation_counts_each_replicas_own_pairs() -> None:
    from allostasis.models.modular_loss import pair_losses

    trained = block([replica(0), replica(4)])
    trained.advance(60)
    found, grid = trained.evaluate(), trained.grid_logits()
    for slot, seed in enumerate((0, 4)):
        train = replica(seed).train
        logits = grid[slot][train.a, train.b]
        accuracy = (logits.argmax(dim=-1) == train.answer).double().mean()
        assert_close(found.train_accuracy[slot], accuracy)
        assert_close(found.train_loss[slot], pair_losses(logits, train.answer).mean())
        is_test = torch.ones(P, P, dtype=torch.bool)
        is_test[train.a, train.b] = False
        a, b = is_test.nonzero().T
        hits = grid[slot][a, b].argmax(dim=-1) == (a + b) % P
        assert_close(found.test_accuracy[slot], hits.double().mean())


@pytest.mark.parametrize("variant", ["plain", "sphere", "uniform_attention"])
def test_logits_are_those_of_the_three_position_forward(variant: str) -> None:
    from allostasis.models.modular_replicas import grid_logits, logits
    from allostasis.models.modular_transformer import ModularTransformer

    trained = block([replica(0, torch.float64), replica(1, torch.float64)])
    how = {"sphere": variant == "sphere", "is_uniform": variant == "uniform_attention"}
    asked = logits(trained.parameters, trained.questions, **how)
    grid = grid_logits(trained.parameters, **how)
    for slot in range(2):
        model = ModularTransformer(seed=slot, p=P, **SIZES).double()
        model.sphere, model.uniform_attention = how["sphere"], how["is_uniform"]
        train = replica(slot).train
        expected = model(train.tokens)[:, -1]
        assert_close(asked[slot], expected, rtol=1e-10, atol=1e-12)
        assert_close(grid[slot][train.a, train.b], expected, rtol=1e-10, atol=1e-12)
        assert_close(model.loss(train), model.loss(train, engine="naive"), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("replicas", "how", "message"),
    [
        ([], {"width": 2}, "0 replicas do not fit in width=2"),
        ([{}, {}, {}], {"width": 2}, "3 replicas do not fit in width=2; take 1 to 2"),
        ([{}, {"train_frac": 0.4}], {}, "replicas train on 211, 264 pairs"),
        ([{}, {"norm": 3.0}], {}, "some replicas hold their norm and some do not"),
        ([{}], {"is_captured": True}, "device=cpu has no CUDA graphs"),
    ],
)
def test_what_does_not_fit_is_refused(replicas, how, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block([replica(0, **own) for own in replicas], **how)
