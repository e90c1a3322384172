import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from allostasis.experiments.grokking.phases import Hold, Phases


def train(
    optimiser: str, *, p: int, steps: int, lr: float, d_model: int = 32
) -> tuple[float, float]:
    """Loss and accuracy on the training pairs after plain full-batch updates."""
    from allostasis.experiments.grokking.module import Grokking
    from allostasis.models.modular_transformer import ModularTransformer
    from allostasis.tasks.modular_addition import ModularAddition

    task = ModularAddition(seed=0, p=p, train_frac=0.5, probe_size=8)
    model = ModularTransformer(seed=0, p=p, d_model=d_model, n_heads=2, d_mlp=4 * d_model)
    module = Grokking(model=model, task=task, max_steps=steps, lr=lr, optimiser=optimiser)
    update = module.configure_optimizers()
    for _ in range(steps):
        update.zero_grad()
        model.loss(task.train).backward()
        update.step()
    hits = model.logits(task.train).argmax(-1) == task.train.answer
    return float(model.loss(task.train).detach()), float(hits.double().mean())


def test_adamw_memorises_where_coupled_l2_stays_at_log_p() -> None:
    _, decoupled = train("adamw", p=13, steps=300, lr=3e-3)
    coupled_loss, coupled = train("adam_l2", p=13, steps=300, lr=3e-3)
    assert decoupled > 0.99
    assert coupled < 0.3
    assert coupled_loss == pytest.approx(math.log(14), abs=0.1)


@pytest.mark.slow
def test_adamw_memorises_where_coupled_l2_stays_at_log_p_at_full_size() -> None:
    _, decoupled = train("adamw", p=113, steps=400, lr=1e-3, d_model=128)
    coupled_loss, coupled = train("adam_l2", p=113, steps=400, lr=1e-3, d_model=128)
    assert decoupled > 0.99
    assert coupled < 0.05
    assert coupled_loss == pytest.approx(math.log(114), abs=0.02)


def test_float64_loss_below_float32_floor() -> None:
    from allostasis.models.modular_transformer import cross_entropy

    logits = torch.zeros(4, 114)
    logits[:, 7] = 25.0
    logits.requires_grad_()
    answer = torch.full((4,), 7)
    loss = cross_entropy(logits, answer)
    # a difference of two numbers near 25, which are known to an ulp
    expected = math.log1p(113 * math.exp(-25))
    assert_close(float(loss.detach()), expected, rtol=0, atol=math.ulp(25.0))
    assert float(torch.nn.functional.cross_entropy(logits.detach(), answer)) == 0
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[:, 7].lt(0).all()


def test_a_treatment_that_changes_nothing_is_refused() -> None:
    from allostasis.experiments.grokking.module import Grokking
    from allostasis.models.modular_transformer import ModularTransformer
    from allostasis.tasks.modular_addition import ModularAddition

    task = ModularAddition(seed=0, p=7, train_frac=0.5, probe_size=8)
    model = ModularTransformer(seed=0, p=7, d_model=8, n_heads=2, d_mlp=16)
    effect = Grokking(model=model, task=task).prove_effect()
    assert effect["gradient_norm"] > 0.01
    largest = max(float(tensor.detach().abs().max()) for tensor in model.parameters())
    # three updates of the warm-up, at 0.1, 0.2 and 0.3 times the learning rate
    assert effect["weight_decay_change"] == pytest.approx(0.6e-3 * largest, rel=5e-3)
    assert effect["treatment_change"] == 0
    assert (
        Grokking(model=model, task=task, weight_decay=0.0).prove_effect()["weight_decay_change"]
        == 0
    )
    with pytest.raises(RuntimeError, match="is inert"):
        Grokking(model=model, task=task, weight_decay=1e-30).prove_effect()
    with torch.no_grad():
        model.W_U.zero_()
        model.W_out.zero_()
        model.W_O.zero_()
        model.W_E.zero_()
        model.W_pos.zero_()
    with pytest.raises(RuntimeError, match="cannot train"):
        Grokking(model=model, task=task).prove_effect()


def test_a_run_that_diverges_says_so_with_its_rate() -> None:
    import lightning as L

    from allostasis.experiments.grokking.module import Grokking
    from allostasis.models.modular_transformer import ModularTransformer
    from allostasis.tasks.modular_addition import ModularAddition

    task = ModularAddition(seed=0, p=7, train_frac=0.5, probe_size=8)
    model = ModularTransformer(seed=0, p=7, d_model=8, n_heads=2, d_mlp=16)
    module = Grokking(model=model, task=task, optimiser="sgdm", lr=1e30, warmup_steps=0)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=-1,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"diverged: the loss of update \d+ is \w+\..*1e\+30"):
        trainer.fit(module, datamodule=task)


def test_evaluations_that_no_chunk_reaches_are_refused() -> None:
    from allostasis.experiments.grokking.module import Grokking
    from allostasis.models.modular_transformer import ModularTransformer
    from allostasis.tasks.modular_addition import ModularAddition

    task = ModularAddition(seed=0, p=7, train_frac=0.5, probe_size=8)
    model = ModularTransformer(seed=0, p=7, d_model=8, n_heads=2, d_mlp=16)
    with pytest.raises(ValueError, match="eval_every=25 is no multiple of chunk=10"):
        Grokking(model=model, task=task, eval_every=25)


def follow(curve: list[tuple[float, float, float]], **settings: float) -> Phases:
    phases = Phases(**settings)
    for i, (train, test, loss) in enumerate(curve):
        phases.update(50 * i, train_accuracy=train, test_accuracy=test, test_loss=loss)
    return phases


def test_dwell_and_censoring() -> None:
    blip = [(0.2, 0.01, 5.0)] * 6 + [(1.0, 0.96, 9.0)] * 4 + [(1.0, 0.90, 9.0)] * 10
    phases = follow(blip)
    assert phases.times == {"t_mem": 300, "t_clean": None, "t_grok": None, "t_loss": None}
    held = blip + [(1.0, 0.96, 4.0)] * 5
    assert follow(held).times == {"t_mem": 300, "t_clean": 1000, "t_grok": 1000, "t_loss": None}


def test_no_detector_fires_within_its_first_dwell_evaluations() -> None:
    perfect = [(1.0, 1.0, 0.01)] * 5
    assert set(follow(perfect).times.values()) == {None}
    times = follow(perfect + [(1.0, 1.0, 0.01)]).times
    assert (times["t_mem"], times["t_grok"], times["t_loss"]) == (0, 0, 250)


def test_cleanup_is_measured_against_the_highest_loss_so_far() -> None:
    curve = [(0.5, 0.0, 4.0)] * 6 + [(1.0, 0.0, 20.0)] * 3 + [(1.0, 0.3, 9.9)] * 5
    assert follow(curve).times["t_clean"] == 450
    above = curve[:-5] + [(1.0, 0.3, 10.1)] * 5
    assert follow(above).times["t_clean"] is None


def test_a_low_test_loss_counts_without_being_held() -> None:
    curve = [(1.0, 0.5, 1.0)] * 8 + [(1.0, 0.97, 0.09), (1.0, 0.9, 0.3)]
    assert follow(curve).times["t_loss"] == 400


@given(st.lists(st.booleans(), max_size=40), st.integers(1, 6))
def test_a_hold_is_the_first_run_that_is_long_enough(holds: list[bool], dwell: int) -> None:
    hold = Hold(dwell)
    for step, value in enumerate(holds):
        hold.update(step, value)
    starts = [
        start
        for start in range(len(holds))
        if (start == 0 or not holds[start - 1])
        and any(
            all(holds[start : end + 1]) and end - start + 1 >= dwell and end >= dwell
            for end in range(start, len(holds))
        )
    ]
    assert hold.confirmed == (starts[0] if starts else None)


@pytest.mark.parametrize("cut", [3, 8, 12])
def test_a_resumed_detector_finds_the_same_phases(cut: int) -> None:
    curve = [(0.5, 0.0, 4.0)] * 6 + [(1.0, 0.2, 20.0)] * 3 + [(1.0, 0.97, 0.05)] * 8
    first = follow(curve[:cut])
    second = Phases()
    second.load_state_dict(first.state_dict())
    for i, (train, test, loss) in enumerate(curve[cut:], start=cut):
        second.update(50 * i, train_accuracy=train, test_accuracy=test, test_loss=loss)
    assert second.times == follow(curve).times
