"""Freezing against what an optimiser with momentum and decay does to weights without gradient."""

import pytest
import torch


def model(seed: int = 0):
    from allostasis.models.toy_transformer import ToyTransformer

    return ToyTransformer(seed=seed, vocab_size=12, seq_len=8, d_model=16, n_layers=2)


def train(net, freeze, steps: int = 6, *, warm: bool = True) -> None:
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        tokens = torch.randint(12, (4, 8), generator=generator)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        if not (warm and step == 0):  # the first update fills the moments of frozen slices too
            freeze.zero_gradients()
        optimiser.step()
        freeze.restore()


@pytest.mark.parametrize("kind", ["heads", "routing", "module"])
def test_frozen_slices_are_bit_identical_and_the_free_head_moves(kind: str) -> None:
    from allostasis.interventions.freeze import PARTS, Freeze

    net, before = model(), model()
    freeze = Freeze(dict(net.named_parameters()), kind=kind, heads=[1, 2, 3])
    train(net, freeze)
    assert freeze.largest_change() == 0.0
    assert (freeze.free_change() > 0) == (kind != "module")
    start = dict(before.named_parameters())
    for name, parameter in net.named_parameters():
        part = name.rpartition(".")[2]
        if ".attn." not in name:
            assert not torch.equal(parameter, start[name]), name
        elif part in PARTS[kind] and kind == "module":
            assert torch.equal(parameter, start[name]), name
        elif part in PARTS[kind]:
            assert torch.equal(parameter[1:], start[name][1:]), name
            assert not torch.equal(parameter[0], start[name][0]), name
        else:
            assert not torch.equal(parameter, start[name]), name


def test_without_restoring_momentum_and_decay_move_frozen_slices() -> None:
    from allostasis.interventions.freeze import Freeze

    net = model()
    freeze = Freeze(dict(net.named_parameters()), kind="heads", heads=[1])
    freeze.restore = lambda: None
    train(net, freeze)
    assert freeze.largest_change() > 0


def test_module_freeze_is_a_different_arm() -> None:
    from allostasis.interventions.freeze import Freeze

    sizes = {
        kind: Freeze(dict(model().named_parameters()), kind=kind, heads=[1, 2, 3]).n_frozen
        for kind in ("none", "routing", "heads", "module")
    }
    d, heads, d_head, layers = 16, 3, 4, 2
    routing = layers * heads * 2 * (d * d_head + d_head)
    assert sizes["none"] == 0
    assert sizes["routing"] == routing
    assert sizes["heads"] == routing + layers * heads * (2 * d * d_head + d_head)
    assert sizes["module"] == layers * (4 * d * d + 3 * d + d)


def test_routing_of_frozen_heads_drifts_when_embeddings_train() -> None:
    from allostasis.interventions.freeze import Freeze
    from allostasis.metrics.routing_drift import routing_drift

    net = model()
    freeze = Freeze(dict(net.named_parameters()), kind="routing", heads=[0, 1, 2, 3])
    tokens = torch.randint(12, (5, 8), generator=torch.Generator().manual_seed(1))
    hook = "blocks.0.attn.hook_pattern"
    _, before = net.run_with_cache(tokens, names_filter=hook)
    _, again = net.run_with_cache(tokens, names_filter=hook)
    visible = slice(1, None)  # a row that sees one key has no routing
    assert routing_drift(again[hook][..., visible, :], before[hook][..., visible, :]) <= 1e-7
    train(net, freeze, steps=30)
    _, after = net.run_with_cache(tokens, names_filter=hook)
    assert routing_drift(after[hook][..., visible, :], before[hook][..., visible, :]) > 1e-3


def test_heads_that_do_not_exist_and_models_without_heads_are_refused() -> None:
    from allostasis.interventions.freeze import Freeze

    named = dict(model().named_parameters())
    with pytest.raises(ValueError, match="head 4 does not exist; every layer has heads 0 to 3"):
        Freeze(named, kind="heads", heads=[1, 4])
    with pytest.raises(ValueError, match="freezes nothing; name heads"):
        Freeze(named, kind="heads", heads=[])
    with pytest.raises(ValueError, match="no weights blocks"):
        Freeze({"W_E": named["W_E"]}, kind="heads", heads=[1])
