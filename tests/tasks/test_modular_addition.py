import inspect
import itertools
from pathlib import Path

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.testing import assert_close

from allostasis.tasks.modular_addition import ModularAddition, Pairs

CONF = Path(__file__).parents[2] / "conf"


def keys(pairs: Pairs) -> set[tuple[int, int]]:
    return set(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))


def test_split_has_the_published_sizes() -> None:
    task = ModularAddition(seed=0)
    assert (len(task.train), len(task.test), len(task.all)) == (3830, 8939, 113 * 113)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    p=st.integers(3, 31),
    train_frac=st.floats(0.15, 0.85),
    op=st.sampled_from(["add", "subtract"]),
)
def test_train_and_test_are_disjoint_and_exhaust_all_pairs(seed, p, train_frac, op) -> None:
    task = ModularAddition(seed=seed, p=p, train_frac=train_frac, probe_size=1, op=op)
    train, test = keys(task.train), keys(task.test)
    assert len(task.train) == int(train_frac * p * p) == len(train)
    assert not train & test
    assert train | test == set(itertools.product(range(p), repeat=2)) == keys(task.all)
    assert keys(task.probe) <= test


@pytest.mark.parametrize("op", ["add", "subtract"])
def test_label_set_has_p_members(op) -> None:
    task = ModularAddition(seed=0, p=13, probe_size=20, op=op)
    labels, counts = task.all.answer.unique(return_counts=True)
    assert labels.tolist() == list(range(13))
    assert counts.tolist() == [13] * 13
    a, b, answer = task.all.a, task.all.b, task.all.answer
    sign = 1 if op == "add" else -1
    assert [(x + sign * y) % 13 for x, y in zip(a.tolist(), b.tolist(), strict=True)] == (
        answer.tolist()
    )


@pytest.mark.parametrize("op", ["add", "subtract"])
def test_inputs_do_not_determine_label_without_both_operands(op) -> None:
    task = ModularAddition(seed=0, p=13, probe_size=20, op=op)
    for operand in (task.all.a, task.all.b):
        for value in range(13):
            seen = task.all.answer[operand == value]
            assert seen.sort().values.tolist() == list(range(13))
    assert task.all.tokens.shape == (169, 3)
    assert (task.all.tokens[:, 2] == 13).all()
    assert_close(task.all.tokens[:, :2], torch.stack((task.all.a, task.all.b), dim=1))


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    first = ModularAddition(seed=3)
    torch.rand(7)
    again, other = ModularAddition(seed=3), ModularAddition(seed=4)
    for part in ("train", "test", "probe"):
        assert getattr(first, part).sha256 == getattr(again, part).sha256
        assert getattr(first, part).sha256 != getattr(other, part).sha256


def test_the_task_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    task = ModularAddition(seed=0)
    next(iter(task.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_pairs_are_sorted_by_their_operands_and_the_probe_is_not() -> None:
    task = ModularAddition(seed=0)
    for pairs in (task.train, task.test, task.all):
        index = pairs.a * 113 + pairs.b
        assert (index.diff() > 0).all()
    neighbours = task.probe.a.diff() == 0
    assert neighbours.float().mean() < 0.05


def test_train_loader_repeats_the_full_batch_without_end_and_test_loader_gives_it_once() -> None:
    task = ModularAddition(seed=0)
    batches = itertools.islice(task.train_dataloader(), 1000)
    assert all(batch is task.train for batch in batches)
    loader = task.test_dataloader()
    for _ in range(2):
        assert [batch is task.test for batch in loader] == [True]


def test_lightning_hands_the_very_same_batch_to_every_step() -> None:
    class Counter(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[Pairs] = []

        def training_step(self, batch: Pairs) -> torch.Tensor:
            self.seen.append(batch)
            return self.weight**2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    task, module = ModularAddition(seed=0), Counter()
    L.Trainer(
        max_steps=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=task)
    assert len(module.seen) == 5
    assert all(batch is task.train for batch in module.seen)


@pytest.mark.parametrize("part", ["train", "test", "probe", "all"])
def test_a_predictor_that_knows_the_rule_reaches_the_ceiling(part) -> None:
    task = ModularAddition(seed=0, p=13, probe_size=20)
    pairs, ceiling = getattr(task, part), task.ceiling(part)
    log_prob = torch.full((len(pairs), 14), -torch.inf)
    log_prob[torch.arange(len(pairs)), (pairs.a + pairs.b) % 13] = 0.0
    assert (log_prob.argmax(-1) == pairs.answer).double().mean().item() == ceiling.accuracy
    assert torch.nn.functional.nll_loss(log_prob, pairs.answer).item() == ceiling.cross_entropy


def test_a_probe_larger_than_the_test_set_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"probe_size=512 is more than the 35 test pairs .* 1 to 35"
    ):
        ModularAddition(seed=0, p=7)


def test_a_fraction_that_leaves_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train_frac=0.01 of the 49 pairs at p=7 leaves none"):
        ModularAddition(seed=0, p=7, train_frac=0.01)


def test_config_repeats_the_signature() -> None:
    config = OmegaConf.load(CONF / "task/modular_addition.yaml")
    parameters = inspect.signature(ModularAddition).parameters
    assert set(config) - {"_target_"} == set(parameters)
    raw = OmegaConf.to_container(config)
    assert {name: raw[name] for name in set(parameters) - {"seed"}} == {
        name: parameters[name].default for name in set(parameters) - {"seed"}
    }
