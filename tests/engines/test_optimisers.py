"""Optimisers of a block against torch's own, one model at a time."""

import pytest
import torch
from torch.testing import assert_close

P, SIZES = 11, {"d_model": 16, "n_heads": 2, "d_mlp": 24}
LR, DECAY = 1e-2, 0.3


def start(seed: int = 0):
    from allostasis.models.modular_step import Parameters, initial_parameters

    drawn = initial_parameters(seed, p=P, **SIZES)
    return Parameters(*(tensor.double() + 0.01 for tensor in drawn))


def gradients(n: int) -> list[torch.Tensor]:
    """The same for every optimiser: noise whose size changes from update to update."""
    generator = torch.Generator().manual_seed(5)
    size = sum(tensor.numel() for tensor in start())
    return [(k + 1) * torch.randn(size, generator=generator).double() for k in range(n)]


def rows(rule, n: int = 6, **how):
    from allostasis.engines.optimisers import Updates
    from allostasis.models.modular_replicas import Layout

    layout = Layout(start())
    theta = layout.flat([start()] * 2)
    two = torch.ones(2, dtype=torch.float64)
    updates = Updates(rule, layout, theta, lr=LR * two, weight_decay=DECAY * two, **how)
    for grad in gradients(n):
        updates.apply(torch.stack([grad, grad]))
    assert torch.equal(theta[0], theta[1])
    return theta[0]


def torch_row(make, n: int = 6) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.cat([tensor.flatten() for tensor in start()]))
    optimiser = make([parameter])
    for grad in gradients(n):
        parameter.grad = grad
        optimiser.step()
    return parameter.detach()


def rule(**how):
    from allostasis.engines.optimisers import Rule

    return Rule(**{"warmup_steps": 0} | how)


def test_adamw_is_torchs() -> None:
    expected = torch_row(
        lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=DECAY, betas=(0.9, 0.98))
    )
    assert_close(rows(rule()), expected, rtol=1e-12, atol=1e-14)


def test_coupled_adam_is_torchs() -> None:
    expected = torch_row(
        lambda p: torch.optim.Adam(p, lr=LR, weight_decay=DECAY, betas=(0.9, 0.98))
    )
    assert_close(rows(rule(optimiser="adam_l2")), expected, rtol=1e-12, atol=1e-14)


def test_momentum_is_torchs_with_its_decay_taken_out_of_the_gradient() -> None:
    from allostasis.engines.optimisers import Updates
    from allostasis.models.modular_replicas import Layout

    layout, none = Layout(start()), torch.zeros(1, dtype=torch.float64)
    theta = layout.flat([start()])
    own = rule(optimiser="sgdm", momentum=0.9)
    updates = Updates(own, layout, theta, lr=none + LR, weight_decay=none)
    for grad in gradients(6):
        updates.apply(grad[None])
    assert_close(theta[0], torch_row(lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9)))
    decayed = rows(own, n=1)
    before = torch.cat([tensor.flatten() for tensor in start()])
    assert_close(decayed, before * (1 - LR * DECAY) - LR * gradients(1)[0])


def test_muon_steps_hidden_matrices_as_torchs_does_and_the_others_as_adamw() -> None:
    from allostasis.engines.optimisers import HIDDEN, joined
    from allostasis.models.modular_replicas import Layout

    theta = Layout(start()).views(rows(rule(optimiser="muon", muon_lr=0.05))[None])
    adamw = Layout(start()).views(rows(rule())[None])
    for name in theta._fields:
        if name not in HIDDEN:
            assert torch.equal(getattr(theta, name), getattr(adamw, name))
    # torch rounds to bfloat16 inside, so that its direction is known to about 1 %
    for name in ("W_Q", "W_O", "W_in"):
        own = torch.nn.Parameter(joined(name, getattr(start(), name)[None])[0].mT.clone())
        optimiser = torch.optim.Muon([own], lr=0.05, weight_decay=0.0, momentum=0.95)
        for grad in gradients(1):
            views = Layout(start()).views(grad[None])
            own.grad = joined(name, getattr(views, name))[0].mT.clone()
            optimiser.step()
        first = Layout(start()).views(rows(rule(optimiser="muon", muon_lr=0.05), n=1)[None])
        ours = joined(name, getattr(first, name))[0].mT
        before = joined(name, getattr(start(), name)[None])[0].mT
        step, theirs = before * (1 - 0.05 * DECAY) - ours, before - own.detach()
        cosine = (step * theirs).sum() / step.norm() / theirs.norm()
        assert cosine > 0.999
        assert_close(float(step.norm()), float(theirs.norm()), rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (10, 6)])
def test_orthonormal_keeps_singular_vectors_and_brings_values_near_1(
    shape: tuple[int, int],
) -> None:
    from allostasis.engines.optimisers import orthonormal

    matrix = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.mT @ orthonormal(matrix) @ right.mT
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert_close(inner, torch.diag_embed(diagonal), rtol=0, atol=1e-8)
    small = values / values.norm(dim=1, keepdim=True) < 0.05  # too small for five steps
    assert diagonal[~small].min() > 0.6
    assert diagonal.max() < 1.3


def test_an_orthogonal_gradient_has_no_part_along_the_tensor_and_its_old_length() -> None:
    from allostasis.engines.optimisers import orthogonal

    generator = torch.Generator().manual_seed(2)
    weight, grad = (torch.randn(3, 50, generator=generator).double() for _ in range(2))
    found = orthogonal(weight, grad)
    assert_close((found * weight).sum(dim=1), torch.zeros(3).double(), atol=1e-12, rtol=0)
    assert_close(found.norm(dim=1), grad.norm(dim=1))
    assert torch.equal(orthogonal(torch.zeros_like(weight), grad), grad)


def test_grokfast_adds_the_running_mean() -> None:
    from allostasis.engines.optimisers import Updates
    from allostasis.models.modular_replicas import Layout

    layout, none = Layout(start()), torch.zeros(1, dtype=torch.float64)
    theta = layout.flat([start()])
    own = rule(optimiser="sgdm", momentum=0.0, grokfast=2.0, grokfast_alpha=0.9)
    updates = Updates(own, layout, theta, lr=none + LR, weight_decay=none)
    expected, slow = theta[0].clone(), torch.zeros_like(theta[0])
    for grad in gradients(5):
        updates.apply(grad[None])
        slow = 0.9 * slow + 0.1 * grad
        expected -= LR * (grad + 2.0 * slow)
    assert_close(theta[0], expected)


def test_a_held_norm_is_held() -> None:
    theta = rows(rule(), norm=torch.full((2,), 7.0))
    assert_close(float(theta.norm()), 7.0)


def test_a_single_model_steps_as_a_row_does_and_goes_on_from_its_state() -> None:
    from allostasis.engines.optimisers import RowOptimiser
    from allostasis.models.modular_replicas import Layout

    own = rule(optimiser="muon", grokfast=2.0)
    layout = Layout(start())

    def step(optimiser: RowOptimiser, grads: list[torch.Tensor]) -> None:
        for grad in grads:
            for parameter, row in zip(optimiser.own, layout.views(grad[None]), strict=True):
                parameter.grad = row[0]
            optimiser.step()

    def fresh(values) -> RowOptimiser:
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        return RowOptimiser(parameters, own, lr=LR, weight_decay=DECAY)

    whole = fresh(start())
    step(whole, gradients(6))
    assert_close(
        torch.cat([p.detach().flatten() for p in whole.own]), rows(own), rtol=1e-12, atol=1e-14
    )
    first = fresh(start())
    step(first, gradients(6)[:3])
    second = fresh(first.own)
    second.load_state_dict(first.state_dict())
    step(second, gradients(6)[3:])
    for ours, theirs in zip(second.own, whole.own, strict=True):
        assert torch.equal(ours, theirs)
