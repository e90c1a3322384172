"""Concept vectors and their nulls against closed forms, scikit-learn and planted truth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf as reference
from torch.testing import assert_close

WIDTH = 64


def noise(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, dtype=torch.float64, generator=generator)


def by_lemma(rows: torch.Tensor, start: int = 0) -> Any:
    from allostasis.models.concept_directions import Lemmas

    keys = np.arange(start, start + len(rows))
    return Lemmas(keys, rows, torch.ones(len(rows), dtype=torch.float64))


@pytest.mark.parametrize("n", [30, 200])
def test_lda_equals_a_shrunk_covariance_and_its_pseudoinverse(n: int) -> None:  # T-04
    from allostasis.models.concept_directions import lda_vector

    rows = noise(n) * torch.linspace(0.5, 2, WIDTH) + 0.5
    covariance, _ = reference(rows.numpy())
    mean = rows.mean(dim=0).numpy()
    along = np.linalg.pinv(covariance) @ mean
    along /= np.linalg.norm(along)
    found = lda_vector(rows)
    np.testing.assert_allclose(found.numpy(), (along @ mean) * along, rtol=1e-6, atol=1e-9)
    assert_close(found @ found, found @ rows.mean(dim=0))


def test_nulls_are_within_their_closed_forms() -> None:  # T-07
    from allostasis.models import concept_directions as d

    whole, independent, disjoint, random = [], [], [], []
    rng = np.random.default_rng(0)
    n_child, n_parent, share = 60, 200, 0.7
    for seed in range(40):
        rows = noise(n_parent, seed)
        drawn = [rows[rng.choice(n, int(share * n), replace=False)] for n in (n_child, n_parent)]
        child, parent = (d.lda_vector(r) for r in (rows[:n_child], rows))
        rest, other = d.lda_vector(rows[n_child:]), d.lda_vector(noise(n_parent, 1000 + seed))
        own = [d.lda_vector(r) for r in drawn]
        whole.append(float(d.cosine(child - parent, parent)))
        independent.append(float(d.cosine(own[0] - own[1], own[1])))
        disjoint.append(float(d.cosine(child - rest, rest)))
        null = d.null_random_parent(*(v.norm()[None].numpy() for v in (child, other)))
        random.append(float(d.cosine(child - other, other)) - float(null[0]))
    assert abs(np.mean(whole)) < 0.05
    assert abs(np.mean(random)) < 0.05
    closed = d.null_independent(share, n_child, n_parent)
    assert np.mean(independent) == pytest.approx(closed, abs=0.05)
    closed = d.null_disjoint(n_child, n_parent - n_child)
    assert np.mean(disjoint) == pytest.approx(closed, abs=0.05)


def test_closed_forms_lie_within_the_interval_of_what_noise_gives() -> None:  # T-07
    """For means of tokens, of which the forms are exact; 99 % intervals over 200 draws."""
    from allostasis.models import concept_directions as d

    rng, off = np.random.default_rng(0), []
    n_child, n_parent, share = 60, 200, 0.7
    for seed in range(200):
        rows = noise(n_parent, seed)
        drawn = [rng.choice(n, int(share * n), replace=False) for n in (n_child, n_parent)]
        child, parent, rest, other, own_child, own_parent = (
            some.mean(dim=0)
            for some in (
                rows[:n_child], rows, rows[n_child:], noise(n_parent, 1000 + seed),
                rows[drawn[0]], rows[drawn[1]],
            )
        )  # fmt: skip
        random = d.null_random_parent(*(v.norm()[None].numpy() for v in (child, other)))
        pairs = (
            (child, parent, 0.0),
            (own_child, own_parent, d.null_independent(share, n_child, n_parent)),
            (child, rest, d.null_disjoint(n_child, n_parent - n_child)),
            (child, other, float(random[0])),
        )
        off.append([float(d.cosine(c - p, p)) - closed for c, p, closed in pairs])
    error = np.std(off, axis=0, ddof=1) / len(off) ** 0.5
    assert (error < 0.01).all()
    assert (np.abs(np.mean(off, axis=0)) < 2.6 * error).all()


def test_the_published_angle_is_never_below_90_degrees() -> None:  # T-07
    from allostasis.models.concept_directions import cosine, published_unit

    child, parent = noise(50, 1), noise(50, 2)
    theta = torch.rad2deg(torch.arccos(cosine(child, parent)))
    assert_close(published_unit(child, parent), 90 + theta / 2, atol=1e-9, rtol=0)


def planted(cosine_of_children: float, seed: int) -> tuple[Any, list[Any]]:
    """A parent of four children with differences at some cosine to it, which sum to 0."""
    axes = torch.eye(WIDTH, dtype=torch.float64)
    parts = []
    for child in range(4):
        sign = 1 if child % 2 else -1
        delta = 4 * (
            sign * cosine_of_children * axes[0]
            + (1 - cosine_of_children**2) ** 0.5 * sign * axes[1 + child // 2]
        )
        parts.append(noise(60, seed + child) * 0.5 + 5 * axes[0] + delta)
    rows = torch.cat(parts)
    return by_lemma(rows), [by_lemma(part, 60 * child) for child, part in enumerate(parts)]


def rms(pairs: list[tuple[Any, Any]]) -> float:
    from allostasis.models.concept_directions import disjoint

    rng = np.random.default_rng(0)
    found = [disjoint(child, parent, rng) for child, parent in pairs]
    squares = [one.num_squared / (one.pp * one.dd) for one in found]
    return max(0.0, float(np.mean(squares))) ** 0.5


def test_disjoint_lemmas_tell_orthogonal_from_slanted_children() -> None:  # T-06
    parent, children = planted(0.0, 0)
    assert rms([(child, parent) for child in children]) < 0.1
    slanted, others = planted(0.4, 100)
    assert rms([(child, slanted) for child in others]) > 0.3
    own = [float(c.sums.mean(dim=0)[0] - slanted.sums.mean(dim=0)[0]) for c in others]
    assert abs(np.mean(own)) < 0.2  # though they cancel in the signed mean


def test_the_largest_slant_of_two_children_is_what_was_planted() -> None:
    """Differences of children at cosines of -c and c: (2 c) / |difference|, by hand."""
    from allostasis.models.concept_directions import largest_slant

    assert largest_slant(*planted(0.0, 0)) == pytest.approx(0, abs=0.06)
    wanted = 0.8 / (0.64 + 2 * (1 - 0.16)) ** 0.5  # of two along different axes
    assert largest_slant(*planted(0.4, 100)) == pytest.approx(wanted, abs=0.05)
    children = [by_lemma(noise(60, seed), 60 * seed) for seed in range(3)]
    products = [one.inner(other) for one in children for other in children if one is not other]
    assert np.abs(products).max() < 4 * WIDTH**0.5 / 60  # noise: 0, give or take


def test_noise_has_no_parent_to_measure_an_angle_with() -> None:  # T-06
    rng = np.random.default_rng(0)
    bounds = [by_lemma(noise(120, seed)).lower_bound(rng, n_boot=200) for seed in range(40)]
    assert np.mean(np.array(bounds) > 0) <= 0.1
    parent, _ = planted(0.0, 0)
    assert parent.lower_bound(rng, n_boot=200) > 0
    assert parent.square() == pytest.approx(25, rel=0.05)


def test_levels_find_children_at_different_levels() -> None:
    from allostasis.models.concept_directions import levels

    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    flat = rng.normal(1, 0.2, 90)
    found = levels(flat, labels, rng, n_perm=500)
    assert found.eta == pytest.approx(found.eta_null, abs=0.05)
    assert found.eta_null == pytest.approx(2 / 89, abs=0.01)  # (k - 1) / (n - 1)
    assert levels(flat + labels, labels, rng, n_perm=500).p < 0.01


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gpt_neox", "gemma3_text"])
def test_logits_are_the_unembedding_of_what_is_captured(  # T-03, T-08
    checkpoint: Callable[[Any], Path], arch: str
) -> None:
    from allostasis.models import lens

    model = lens.pretrained(source=str(checkpoint(arch)))
    ids = torch.tensor([model.encode("When Mary and John went")])
    read = lens.unembed_input(model, ids)
    clean: Any = model.hf(ids)
    assert_close(model.decoder.unembed(read), clean.logits, atol=1e-4, rtol=0)
    step = torch.randn(model.decoder.d_model, generator=torch.Generator().manual_seed(0))
    with lens.adding(model, "unembed_input", step):
        moved: Any = model.hf(ids)
    expected = (step @ model.decoder.W_U).expand_as(clean.logits)
    assert_close(moved.logits - clean.logits, expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("own_cache")
def test_a_hook_that_nothing_goes_through_raises(
    checkpoint: Callable[[Any], Path],
) -> None:
    from allostasis.models import lens

    model = lens.pretrained(source=str(checkpoint("llama")))
    step = torch.ones(model.decoder.d_model)
    with pytest.raises(RuntimeError, match="no pass of the model went through it"):  # noqa: SIM117
        with lens.adding(model, "unembed_input", step):
            pass
    with (
        pytest.raises(ValueError, match=r"there is no hook 'blocks\.99"),
        lens.adding(model, "blocks.99.hook_resid_post", step),
    ):
        pass


def test_a_teacher_is_read_by_synset_whatever_the_order_of_the_file(tmp_path: Path) -> None:  # T-17
    from allostasis.core.spaces import UnembVec, causal_metric
    from allostasis.models.teacher import Teacher, read_teacher, write_teacher

    metric = causal_metric(UnembVec(noise(2000)))
    vectors, deltas = noise(3, 1), noise(6, 2).view(3, 2, WIDTH).clone()
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    deltas[1, 1] = 0
    synsets, children = (30, 10, 20), ((5, 4), (7,), (1, 2))
    kept = {}
    for name, order in (("one", [0, 1, 2]), ("other", [2, 0, 1])):
        teacher = Teacher(
            UnembVec(vectors[order]), UnembVec(deltas[order]), mask[order],
            tuple(synsets[i] for i in order), tuple(children[i] for i in order), metric, "t", "w",
        )  # fmt: skip
        write_teacher(tmp_path / name, teacher)
        kept[name] = read_teacher(tmp_path / name)
    assert kept["one"].synsets == kept["other"].synsets == (10, 20, 30)
    assert kept["one"].child_synsets == ((7,), (1, 2), (4, 5))
    assert_close(kept["one"].parents.values, kept["other"].parents.values)
    assert_close(kept["one"].deltas.values, kept["other"].deltas.values)
    assert_close(kept["one"].parents.values, vectors[[1, 2, 0]])
    assert_close(kept["one"].deltas.values[2], deltas[0].flip(0))
