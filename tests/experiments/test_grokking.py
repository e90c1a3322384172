import math

import pytest
import torch
from torch.testing import assert_close


def train(optimiser: str, *, p: int, steps: int, lr: float, d_model: int = 32) -> tuple[float, float]:
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
    return float(model.loss(task.train)), float(hits.double().mean())


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
    assert_close(float(loss), math.log1p(113 * math.exp(-25)), rtol=1e-6, atol=0)
    assert float(torch.nn.functional.cross_entropy(logits, answer)) == 0
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
    assert effect["weight_decay_change"] == pytest.approx(1e-3 * largest, rel=1e-3)
    assert Grokking(model=model, task=task, weight_decay=0.0).prove_effect()[
        "weight_decay_change"
    ] == 0
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


def test_evaluations_that_no_chunk_reaches_are_refused() -> None:
    from allostasis.experiments.grokking.module import Grokking
    from allostasis.models.modular_transformer import ModularTransformer
    from allostasis.tasks.modular_addition import ModularAddition

    task = ModularAddition(seed=0, p=7, train_frac=0.5, probe_size=8)
    model = ModularTransformer(seed=0, p=7, d_model=8, n_heads=2, d_mlp=16)
    with pytest.raises(ValueError, match="eval_every=25 is no multiple of chunk=10"):
        Grokking(model=model, task=task, eval_every=25)
