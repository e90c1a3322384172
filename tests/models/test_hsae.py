"""The hierarchical SAE: one function in five forms, its gates, its norms, its losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.testing import assert_close

if TYPE_CHECKING:
    from allostasis.models.hsae import HierarchicalSAE
    from allostasis.models.hsae_kernels import Kernel

SHAPES = [
    # m, c, s, k
    (8, 3, 2, 2),
    (5, 1, 4, 5),
    (16, 4, 4, 1),
    (12, 8, 3, 7),
    (1, 2, 2, 1),
    (32, 5, 12, 4),
]
KERNELS: list[Kernel] = ["naive", "hybrid", "sampled", "grouped", "dense_masked"]
D = 12


def drawn(shape: tuple[int, int, int, int], *, k_child: int = 1, seed: int = 0) -> HierarchicalSAE:
    """A float64 SAE whose weights are far from how they start."""
    from allostasis.models.hsae import HierarchicalSAE

    m, c, s, k = shape
    sae = HierarchicalSAE(seed=seed, d_model=D, m=m, c=c, s=s, k=k, k_child=k_child).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in sae.parameters():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor += 0.3 * noise
        sae.scale.fill_(1.7)
    return sae


def tokens(n: int = 24, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=torch.float64)


def all_gradients(sae: HierarchicalSAE, x: torch.Tensor, kernel: Kernel) -> list[torch.Tensor]:
    sae.kernel = kernel
    run = sae.run(x)
    value = run.residual.square().sum() + (run.x0 - run.of_parents).square().sum()
    grads = torch.autograd.grad(value, list(sae.parameters()))
    return [value, run.of_parents, run.of_children, sae.encode(x).dense(), *grads]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k_child", [1, 2])
def test_every_kernel_computes_the_same_values_and_gradients(
    shape: tuple[int, int, int, int], k_child: int
) -> None:
    if k_child > shape[1]:
        pytest.skip("fewer children than that")
    sae, x = drawn(shape, k_child=k_child), tokens()
    with torch.no_grad():
        sae.b_E[: shape[0] // 2] -= 3.0  # tokens with fewer than k positive parents, or none
        x[0] = sae.b / sae.scale
        sae.b_E.clamp_(max=-0.1)
    wanted = all_gradients(sae, x, "naive")
    assert (wanted[3][0] == 0).all(), "the first token turns nothing on"
    for kernel in KERNELS[1:]:
        for found, expected in zip(all_gradients(sae, x, kernel), wanted, strict=True):
            assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [4, 1100])  # few tokens a parent, and many
def test_the_kernel_that_is_chosen_computes_the_same(n: int) -> None:
    sae, x = drawn((16, 4, 4, 1)), tokens(n)
    wanted = all_gradients(sae, x, "naive")
    sae.kernel = "auto"
    run = sae.run(x)
    value = run.residual.square().sum() + (run.x0 - run.of_parents).square().sum()
    assert_close(value, wanted[0], rtol=1e-12, atol=0)
    assert_close(sae(x), (sae.b + wanted[1] + wanted[2]) / sae.scale, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_in_half_precision_change_little(kernel: Kernel) -> None:
    sae, x = drawn((8, 4, 4, 2)).float(), tokens(64).float()
    sae.kernel = kernel

    def gradients(*, is_half: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            run = sae.run(x)
        value = run.residual.float().square().mean()
        return list(torch.autograd.grad(value, list(sae.parameters())))

    for half, single in zip(gradients(is_half=True), gradients(is_half=False), strict=True):
        assert half.dtype == torch.float32
        assert (half - single).norm() <= 0.2 * single.norm()  # a few tokens choose otherwise


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k_child", [1, 2])
def test_the_flat_form_is_the_same_function(shape: tuple[int, int, int, int], k_child: int) -> None:
    m, c, _, k = shape
    if k_child > c:
        pytest.skip("fewer children than that")
    sae, x = drawn(shape, k_child=k_child), tokens()
    flat = sae.flat_weights()
    hidden = (x - flat["b_dec"]) @ flat["W_enc"] + flat["b_enc"]
    codes = torch.zeros_like(hidden)
    for token, pre in enumerate(hidden):  # the definition, one token and one parent at a time
        for j in pre[:m].argsort(descending=True, stable=True)[:k].tolist():
            if pre[j] > 0:
                codes[token, j] = pre[j]
                own = slice(m + j * c, m + (j + 1) * c)
                for best in pre[own].argsort(descending=True, stable=True)[:k_child].tolist():
                    codes[token, m + j * c + best] = pre[own][best].relu()
    assert_close(sae.encode(x).dense(), codes, rtol=1e-12, atol=1e-12)
    rebuilt = codes @ flat["W_dec"] + flat["b_dec"]
    assert_close(sae(x), rebuilt, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_of_equal_parents_and_equal_children_the_lowest_is_chosen(kernel: Kernel) -> None:
    sae = drawn((40, 3, 2, 4))
    with torch.no_grad():
        sae.E.zero_()
        sae.b_E.fill_(1.0)
        sae.Ec[:, 1:] = sae.Ec[:, :1]
        sae.bc[:, 1:] = sae.bc[:, :1]
    sae.kernel = kernel
    codes = sae.encode(tokens())
    assert (codes.parent.sort(dim=1).values == torch.arange(4)).all()
    assert (codes.child == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k_child", [1, 2])
def test_gates(kernel: Kernel, k_child: int) -> None:
    m, c, _, k = shape = (16, 4, 3, 5)
    sae = drawn(shape, k_child=k_child)
    sae.kernel = kernel
    x = tokens(200)
    dense = sae.encode(x).dense()
    parents, children = dense[:, :m], dense[:, m:].view(-1, m, c)
    assert (dense >= 0).all()
    assert not (children.any(dim=-1) & (parents == 0)).any(), "no child without its parent"
    assert int((children > 0).sum(dim=-1).max()) == k_child
    assert ((dense > 0).sum(dim=-1) <= (1 + k_child) * k).all()
    run = sae.run(x[:3])
    run.residual.square().sum().backward()
    on = run.found.parent[run.found.z > 0].unique()
    off = torch.ones(m, dtype=torch.bool)
    off[on] = False
    assert off.any()
    for name in ("E", "b_E", "D", "Pi_down", "Pi_up", "Ec", "bc", "Dc"):
        assert (getattr(sae, name).grad[off] == 0).all(), name


def test_renormalising_keeps_the_function_and_what_is_frozen() -> None:
    sae = drawn((6, 1, 3, 6))  # every parent is always selected: no ranking can change
    x, before = tokens(), sae(tokens())
    sae.renormalise()
    assert_close(sae(x), before, rtol=1e-12, atol=1e-12)
    assert_close(sae.atoms().norm(dim=-1), torch.ones(12, dtype=torch.float64))

    sae = drawn((16, 4, 3, 3))
    x, codes, before = tokens(400), sae.encode(tokens(400)), sae(tokens(400))
    sae.renormalise()
    after = sae.encode(x)
    same = (after.dense() > 0).eq(codes.dense() > 0).all(dim=1)
    assert 0.05 < same.double().mean() < 1, "norms of 1 +- 0.3 change a ranking now and then"
    assert_close(sae(x)[same], before[same], rtol=1e-12, atol=1e-12)

    sae = drawn((16, 4, 3, 3))
    sae.D.requires_grad_(False)
    sae.Dc.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.renormalise()
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_projected_gradients_have_no_radial_part() -> None:
    sae = drawn((16, 4, 3, 3))
    sae.run(tokens()).residual.square().sum().backward()
    sae.project_gradients()
    for rows in (sae.D, sae.Dc):
        radial = (rows.grad * rows).sum(dim=-1)
        assert rows.grad.abs().max() > 1
        assert_close(radial, torch.zeros_like(radial), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 3, 4, 2), (5, 4, 3, 2)])  # c below s, and above
def test_the_causal_loss_is_zero_where_children_are_orthogonal_to_their_parent(
    shape: tuple[int, int, int, int],
) -> None:
    from allostasis.models.hsae_losses import causal

    generator = torch.Generator().manual_seed(0)
    root = torch.randn(D, D, generator=generator, dtype=torch.float64)
    sigma = root @ root.T / D + 0.1 * torch.eye(D, dtype=torch.float64)
    sae = drawn(shape)
    with torch.no_grad():  # Sigma-orthogonal: take the parent's part out of every row of Pi_up
        along = torch.einsum("msd,de,me->ms", sae.Pi_up, sigma, sae.D)
        own = torch.einsum("md,de,me->m", sae.D, sigma, sae.D)
        sae.Pi_up -= (along / own[:, None])[..., None] * sae.D[:, None]
    value = causal(sae.D, sae.Pi_up, sae.Dc, sigma)
    assert value < 1e-24
    # a parent subtracted a second time would not be orthogonal
    moved = sae.Pi_up + 0.5 * sae.D[:, None]
    off = causal(sae.D, moved, sae.Dc, sigma)
    assert off > 1e-3
    assert_close(causal(7.0 * sae.D, moved, 0.1 * sae.Dc, 3.0 * sigma), off)
    euclidean = causal(sae.D, sae.Pi_up, sae.Dc, None)
    assert euclidean > 1e-6, "what is orthogonal under Sigma is not without it"
    root = torch.linalg.cholesky(sigma)
    for up, metric, found in (
        (sae.Pi_up, torch.eye(D, dtype=torch.float64), euclidean),
        (moved, root, off),
    ):
        whole = torch.einsum("mcs,msd->mcd", sae.Dc, up)
        cosine = torch.nn.functional.cosine_similarity(
            whole @ metric, sae.D[:, None] @ metric, dim=-1
        )
        expected = cosine.square().mean()
        assert_close(found, expected)
        for one, other in zip(*(
            torch.autograd.grad(value, [sae.Dc, sae.D, sae.Pi_up], retain_graph=True)
            for value in (found, expected)
        ), strict=True):  # fmt: skip
            assert_close(one, other)


def test_the_losses_on_the_dictionary_have_their_closed_forms() -> None:
    from allostasis.models.hsae_losses import ortho

    rows = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    # cosines 0, 1/sqrt 2 and 1/sqrt 2 over six ordered pairs
    assert_close(ortho(rows), torch.tensor(2 * (0.5 + 0.5) / 6))


def test_dead_latents_get_a_gradient_and_living_ones_none() -> None:
    from allostasis.models.hsae_losses import Dead, auxiliary

    sae, x = drawn((6, 3, 4, 2)), tokens()
    dead_parents = torch.zeros(6, dtype=torch.bool)
    dead_children = torch.zeros(6, 3, dtype=torch.bool)
    dead_parents[4] = True
    with torch.no_grad():
        sae.b_E[4] = -50.0
    alive = int(sae.run(x).found.parent[0, 0])
    dead_children[alive, 2] = True
    value = auxiliary(sae, sae.run(x), Dead(dead_parents, dead_children, 1, 1))
    value.backward()
    moved = {name: tensor.grad.flatten(1).any(dim=1) for name, tensor in
             [("E", sae.E), ("D", sae.D), ("Dc", sae.Dc)]}  # fmt: skip
    assert moved["E"].tolist() == moved["D"].tolist() == dead_parents.tolist()
    assert moved["Dc"].nonzero().flatten().tolist() == [alive]
    assert not sae.Dc.grad[alive, :2].any()
    none = Dead(torch.zeros_like(dead_parents), torch.zeros_like(dead_children), 0, 0)
    assert auxiliary(sae, sae.run(x), none) == 0


@pytest.mark.parametrize("n_parents", [1, 8])  # all that are dead, and more than half of d
def test_every_kernel_makes_the_same_of_what_is_dead(n_parents: int) -> None:
    from allostasis.models.hsae_losses import Dead, auxiliary

    sae, x = drawn((16, 3, 4, 2)), tokens(40)
    used = sae.run(x).found.parent.unique()
    assert len(used) > 8
    dead_parents = torch.zeros(16, dtype=torch.bool)
    dead_parents[used[:n_parents]] = True
    dead_children = torch.zeros(16, 3, dtype=torch.bool)
    dead_children[used[n_parents:], :2] = True
    dead = Dead(dead_parents, dead_children, n_parents, int(dead_children.sum()))
    found: dict[Kernel, list[torch.Tensor]] = {}
    for kernel in KERNELS:
        sae.kernel = kernel
        value = auxiliary(sae, sae.run(x), dead)
        grads = torch.autograd.grad(value, list(sae.parameters()))
        found[kernel] = [value, *grads]
    assert all(tensor.any() for tensor in found["naive"])
    for kernel in KERNELS[1:]:
        for one, other in zip(found[kernel], found["naive"], strict=True):
            assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_planted_directions_become_the_first_atoms() -> None:
    from allostasis.models.hsae import HierarchicalSAE

    generator = torch.Generator().manual_seed(3)
    parents = torch.randn(3, D, generator=generator)
    children = torch.randn(3, 4, D, generator=generator)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    sae = HierarchicalSAE(seed=0, d_model=D, m=5, c=4, s=4, k=2)
    assert sae.plant(parents, children, mask) == 5 * 5 - 3 - 7
    atoms = sae.atoms().detach()
    cosine = torch.nn.functional.cosine_similarity
    assert_close(cosine(atoms[:3], parents), torch.ones(3))
    planted = atoms[5:].view(5, 4, D)[:3][mask]
    assert_close(cosine(planted, children[mask]), torch.ones(7))
    assert_close(atoms.norm(dim=-1), torch.ones(25))


def test_a_child_begins_with_what_a_random_subspace_holds_of_it() -> None:
    from allostasis.models.hsae import HierarchicalSAE

    generator = torch.Generator().manual_seed(3)
    parents = torch.randn(3, D, generator=generator)
    children = torch.randn(3, 2, D, generator=generator)
    sae = HierarchicalSAE(seed=0, d_model=D, m=3, c=2, s=4, k=2)
    drawn_up, drawn_down = sae.Pi_up.clone(), sae.Pi_down.clone()
    sae.plant(parents, children, torch.ones(3, 2, dtype=torch.bool), is_turned=False)
    assert torch.equal(sae.Pi_up, drawn_up)
    assert torch.equal(sae.Pi_down, drawn_down)
    atoms = sae.atoms().detach()
    assert_close(torch.nn.functional.cosine_similarity(atoms[:3], parents), torch.ones(3))
    # the nearest direction of a subspace is the projection on it
    projector = drawn_up.mT @ torch.linalg.inv(drawn_up @ drawn_up.mT) @ drawn_up
    nearest = torch.einsum("mde,mce->mcd", projector, children).detach()
    nearest = nearest / nearest.norm(dim=-1, keepdim=True)
    assert_close(atoms[3:].view(3, 2, D), nearest, rtol=0, atol=1e-5)


def test_a_loss_that_can_move_nothing_is_refused() -> None:
    from allostasis.models.hsae_losses import ConfigError, check_stage

    literal = {"D", "Pi_up", "Dc"}
    with pytest.raises(ConfigError) as refused:
        check_stage("A", {"mse": 1.0, "causal_ortho": 2e-4}, literal)
    assert str(refused.value) == (
        "stage A enables 'causal' but no trainable parameter receives its gradient (frozen: D, "
        "Pi_up, Dc); set stage_a.causal_ortho=0 or unfreeze Pi_up or Dc"
    )
    check_stage("A", {"mse": 1.0, "causal_ortho": 0.0}, literal)
    check_stage("A", {"mse": 1.0, "causal_ortho": 2e-4}, {"D"})
    with pytest.raises(ConfigError, match=r"enables 'ortho' .* unfreeze D$"):
        check_stage("A", {"ortho": 5e-4}, {"D"})
