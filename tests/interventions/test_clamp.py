"""Clamps against their definitions, and against what norms and readouts do to them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close


def stream(seed: int = 0, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(shape or (3, 5, 16), generator=generator, dtype=torch.float64) + 0.3


@given(seed=st.integers(0, 100), target=st.floats(0.1, 30))
def test_token_clamps_set_their_statistic_and_keep_the_rest(seed: int, target: float) -> None:
    from allostasis.interventions.clamp import NormClamp, SpreadClamp

    resid = stream(seed)
    naive, kept = NormClamp(target)(resid), SpreadClamp(target)(resid)
    assert_close(naive.norm(dim=-1), torch.full((3, 5), target, dtype=resid.dtype))
    cosine = torch.nn.functional.cosine_similarity(naive, resid, dim=-1)
    assert_close(cosine, torch.ones_like(cosine))
    assert_close(kept.std(dim=-1, correction=0), torch.full((3, 5), target, dtype=resid.dtype))
    assert_close(kept.mean(dim=-1), resid.mean(dim=-1))


def test_batch_clamps_are_the_predecessors() -> None:
    from allostasis.interventions.clamp import NormClamp, SpreadClamp

    resid = stream()
    naive, kept = NormClamp(2.0, "batch")(resid), SpreadClamp(2.0, "batch")(resid)
    assert naive.norm(dim=-1).mean() == pytest.approx(2.0)
    ratio = naive / resid
    assert_close(ratio, ratio.mean().expand_as(ratio))
    assert_close(kept.mean(dim=(0, 1)), resid.mean(dim=(0, 1)))
    assert (kept - kept.mean(dim=(0, 1))).square().mean().sqrt() == pytest.approx(2.0)


def test_token_clamp_is_independent_of_batch_size_and_order() -> None:
    from allostasis.interventions.clamp import NormClamp, SpreadClamp

    resid = stream()
    for kind in (NormClamp, SpreadClamp):
        token, batch = kind(2.0), kind(2.0, "batch")
        assert torch.equal(token(resid).flip(0), token(resid.flip(0)))
        assert torch.equal(token(resid)[1:2], token(resid[1:2]))
        assert not torch.allclose(batch(resid)[1:2], batch(resid[1:2]))


def test_hook_calls_equal_forwards_and_norm_equals_target() -> None:
    from allostasis.interventions.clamp import Attached, NormClamp
    from allostasis.models.toy_transformer import ToyTransformer

    model = ToyTransformer(seed=0, vocab_size=20, seq_len=12, d_model=16, n_layers=2)
    attached, site = Attached(NormClamp(3.0)), "blocks.1.hook_resid_mid"
    model.add_hook(site, attached, is_permanent=True)
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    for calls in (1, 2, 3):
        _, cache = model.run_with_cache(tokens)
        assert attached.calls == calls
    assert_close(cache[site].norm(dim=-1), torch.full((2, 12), 3.0))
    attached.is_on = False
    _, cache = model.run_with_cache(tokens)
    assert not torch.allclose(cache[site].norm(dim=-1), torch.full((2, 12), 3.0), rtol=0.1)


@pytest.mark.parametrize("norm", ["pre", "post", "rms", "none"])
@pytest.mark.parametrize("kind", ["norm", "spread"])
@pytest.mark.parametrize("statistic", ["token", "batch"])
def test_site_read_only_by_norms_is_refused(norm: str, kind: str, statistic: str) -> None:
    """Refused exactly where the clamp leaves every logit as it is, tried site by site."""
    from allostasis.interventions.clamp import InertError, NormClamp, SpreadClamp, check_site
    from allostasis.models.toy_transformer import ToyTransformer

    model = ToyTransformer(seed=0, vocab_size=20, seq_len=12, d_model=16, n_layers=2, norm=norm)
    model.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # with biases: an MLP without is as linear in a scale
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(20, (4, 12), generator=generator)
    clean = model(tokens)
    clamp = {"norm": NormClamp, "spread": SpreadClamp}[kind](2.5, statistic)

    def clamped(tensor: torch.Tensor, *, hook: object) -> torch.Tensor:
        del hook
        return clamp(tensor)

    sites, refused = model.sites(), []
    for site in sites:
        with model.hooks(fwd_hooks=[(site, clamped)]):
            moved = (model(tokens) - clean).abs().max()
        if moved > 1e-3 * clean.abs().max():
            check_site(site, sites, kind=kind, norm=norm, statistic=statistic)
        else:
            with pytest.raises(InertError, match="Norm first, which undoes .* allow_inert=true"):
                check_site(site, sites, kind=kind, norm=norm, statistic=statistic)
            refused.append(site)
    sums = [f"blocks.{i}.hook_{part}_sum" for i in (0, 1) for part in ("attn", "mlp")]
    last = ["blocks.1.hook_resid_post"]
    wanted = {"pre": last, "post": [*sums, *last], "rms": last, "none": []}[norm]
    if kind == "spread" and (statistic == "batch" or norm == "rms"):
        wanted = []
    assert sorted(refused) == sorted(wanted)


def test_a_norms_output_is_called_pinned_and_an_unknown_site_names_the_known() -> None:
    from allostasis.interventions.clamp import check_site
    from allostasis.models.toy_transformer import ToyTransformer

    sizes = {"seed": 0, "vocab_size": 20, "seq_len": 12, "d_model": 16}
    post = ToyTransformer(norm="post", **sizes).sites()
    assert check_site("blocks.0.hook_resid_mid", post, kind="norm", norm="post") == ("pinned",)
    bare = ToyTransformer(norm="post", final_norm=False, **sizes).sites()
    both = check_site("blocks.0.hook_resid_post", bare, kind="norm", norm="post", statistic="batch")
    assert both == ("pinned", "argmax_inert", "batch_dependent")
    with pytest.raises(ValueError, match=r"it has blocks\.0\.hook_resid_pre"):
        check_site("blocks.9.hook_resid_mid", post, kind="norm", norm="post")


def test_scale_before_bias_free_readout_keeps_every_argmax() -> None:
    from allostasis.interventions.clamp import NormClamp, check_site
    from allostasis.models.toy_transformer import ToyTransformer

    model = ToyTransformer(seed=0, vocab_size=20, seq_len=12, d_model=16, norm="none")
    site = "blocks.0.hook_resid_post"
    assert check_site(site, model.sites(), kind="norm", norm="none") == ("argmax_inert",)
    tokens = torch.randint(20, (4, 12), generator=torch.Generator().manual_seed(0))
    clean = model(tokens)
    clamp = NormClamp(0.1)

    def hooked(tensor: torch.Tensor, *, hook: object) -> torch.Tensor:
        del hook
        return clamp(tensor)

    with model.hooks(fwd_hooks=[(site, hooked)]):
        clamped = model(tokens)
    assert torch.equal(clean.argmax(dim=-1), clamped.argmax(dim=-1))
    assert not torch.allclose(clean, clamped)


def test_class_clamp_identity_and_shuffled_label_control() -> None:
    from allostasis.interventions.clamp import ClassClamp

    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    classes = torch.randint(4, (2, 30), generator=generator)
    resid = means[classes] + 0.5 * torch.randn(2, 30, 6, generator=generator, dtype=torch.float64)

    def clamped(between: float, within: float, said: torch.Tensor) -> torch.Tensor:
        clamp = ClassClamp(means=means, mean=means.mean(dim=0), between=between, within=within)
        clamp.classes = said
        return clamp(resid)

    assert torch.equal(clamped(1.0, 1.0, classes), resid)
    shrunk = clamped(0.5, 1.0, classes)
    assert_close(shrunk - resid, 0.5 * (means.mean(dim=0) - means)[classes])
    tight = clamped(1.0, 0.5, classes)
    assert_close(tight - means[classes], 0.5 * (resid - means[classes]))
    # under wrong classes the same clamp pulls towards them: what labels alone can do
    shuffled = clamped(1.0, 0.5, (classes + 1) % 4)
    gaps = [(some - means[classes]).norm(dim=-1).mean() for some in (tight, resid, shuffled)]
    assert gaps[0] < gaps[1] < gaps[2]
    untouched = clamped(0.5, 0.5, torch.full_like(classes, -1))
    assert torch.equal(untouched, resid)


def test_a_class_clamp_without_classes_is_an_error() -> None:
    from allostasis.interventions.clamp import ClassClamp

    clamp = ClassClamp(means=torch.zeros(2, 4), mean=torch.zeros(4), between=1.0, within=1.0)
    with pytest.raises(RuntimeError, match="needs `classes`"):
        clamp(torch.zeros(1, 3, 4))


def test_a_placebo_moves_the_length_within_directions_that_are_not_read() -> None:
    from allostasis.interventions.clamp import PlaceboClamp, quiet_directions

    reader = stream(1, 8, 3)
    quiet = quiet_directions(reader @ reader.T, share=0.5)
    assert quiet.shape == (8, 4)
    assert_close(reader.T @ quiet, torch.zeros(3, 4, dtype=quiet.dtype), atol=1e-7, rtol=0)
    resid = stream(2, 2, 7, 8)
    moved = PlaceboClamp(norm=12.0, directions=quiet)(resid)
    assert_close(moved.norm(dim=-1), torch.full((2, 7), 12.0, dtype=quiet.dtype))
    assert_close(moved @ reader, resid @ reader)
    shrunk = PlaceboClamp(norm=0.01, directions=quiet)(resid)  # cannot be reached along `quiet`
    assert_close(
        (shrunk @ quiet).norm(dim=-1), torch.zeros(2, 7, dtype=quiet.dtype), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize(
    "target",
    ["7.5", "reference*-1", "reference*x", "control", "reference+1", "own", "own*0", "own+1"],
)
def test_numeric_target_is_refused(target: str) -> None:
    from allostasis.interventions.clamp import Plan

    with pytest.raises(ValueError, match=r"allowed are 'reference' and 'reference\*<factor>'"):
        Plan(kind="norm", target=target)


def test_only_a_class_clamp_takes_its_own_models_statistic() -> None:
    from allostasis.interventions.clamp import Plan

    plan = Plan(kind="class", phase="eval_only", target="own * 0.5")
    assert (plan.source, plan.factor) == ("own", 0.5)
    with pytest.raises(ValueError, match=r"'own\*0.5' fits clamp.kind=class alone, not norm"):
        Plan(kind="norm", target="own*0.5")


def test_a_class_clamp_is_not_trained_under() -> None:
    from allostasis.interventions.clamp import Plan

    with pytest.raises(ValueError, match="would hand the answer"):
        Plan(kind="class")
