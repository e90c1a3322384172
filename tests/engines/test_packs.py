"""Common beginnings run once, against each prompt run by itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allostasis.engines.budget import Budget
from allostasis.engines.packs import LIMIT, pack_rows
from allostasis.engines.prompts import Prompt, Rows
from allostasis.engines.readouts import READOUTS
from allostasis.engines.suffix import sweep
from allostasis.engines.verify import Oracle
from allostasis.interventions.ablate import Unit
from allostasis.models.lens import pretrained
from allostasis.models.zoo import LanguageModel

ARCHS = ("gpt2", "gpt_neox", "llama", "mistral", "gemma", "gemma3_text", "qwen2")
EXACT = 1e-5


def _rows(prompts: list[Prompt]) -> Rows:
    n = len(prompts)
    return Rows(prompts=prompts, target=list(range(10, 10 + n)), foil=list(range(40, 40 + n)))


ALIKE = _rows([
    (7, 8, 9, 10),
    (7, 8, 9, 11, 12, 13),
    (7, 8),  # ends where others go on
    (20, 8, 9, 10),  # the same tokens behind another beginning
    (7, 8, 9, 10),  # equal to the first
    (7, 8, 9, 11, 12, 14),
    (20, 8, 30, 31, 32, 33, 34),
])
UNITS = [
    *(Unit(members=((layer, 1),)) for layer in range(3)),
    Unit(members=((0, 1), (2, 2)), scale=0.5),
    Unit(members=((1, 0), (1, 3)), scale=-1.0),
    Unit(site="mlp_out", op="scale", members=((1, None),)),
    Unit(site="attn_out", op="scale", members=((2, None),)),
]


@pytest.fixture(scope="module", params=ARCHS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    model = pretrained(arch=request.param)
    if getattr(model.decoder.config, "sliding_window", None):  # as wide as no prompt is long
        model.decoder.config.sliding_window = 64
    return model


@pytest.mark.parametrize("tokens", [1, 40, 1000])
def test_a_pack_gives_what_each_prompt_gives_by_itself(model: LanguageModel, tokens: int) -> None:
    assert pack_rows(ALIKE, model.decoder) is not None
    shared = sweep(model.decoder, ALIKE, UNITS, shares_prefixes=True, budget=Budget(tokens))
    apart = sweep(model.decoder, ALIKE, UNITS, shares_prefixes=False)
    for name in READOUTS:
        np.testing.assert_allclose(shared.clean[name], apart.clean[name], atol=EXACT)
        np.testing.assert_allclose(shared.values[name], apart.values[name], atol=EXACT)
    assert shared.profile.forward_tokens < apart.profile.forward_tokens
    assert shared.profile.n_unique == apart.profile.n_unique == 6


@pytest.mark.slow
def test_a_pack_equals_transformer_lens_prompt_by_prompt(model: LanguageModel) -> None:
    swept, oracle = sweep(model.decoder, ALIKE, UNITS, full=False), Oracle(model)
    for unit, row in itertools.product(range(len(UNITS)), range(len(ALIKE))):
        logits = oracle.logits(ALIKE.prompts[row], UNITS[unit], ()).double()
        want = float(logits[ALIKE.target[row]] - logits[ALIKE.foil[row]])
        assert swept.values["ld"][unit, row] == pytest.approx(want, abs=EXACT)


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return pretrained(arch="llama")


words = st.lists(st.integers(4, 6), min_size=1, max_size=8).map(tuple)


@given(prompts=st.lists(words, min_size=1, max_size=40))
def test_packs_hold_every_prompt_once_and_no_beginning_twice(
    llama: LanguageModel, prompts: list[Prompt]
) -> None:
    groups = pack_rows(_rows(prompts), llama.decoder)
    unique = {*prompts}
    tree = {prompt[:n] for prompt in unique for n in range(1, len(prompt) + 1)}
    if groups is None:  # three tokens at every place: packs of 128 tokens lose little
        assert sum(map(len, unique)) < 1.2 * len(tree)
        return
    found: list[Prompt] = []
    for group in groups:
        assert group.mask is not None
        assert group.positions is not None
        assert group.ids.shape[1] <= LIMIT
        for row, kind in zip(group.rows, group.kind, strict=True):
            sees = group.mask[0, 0, group.last[0, kind]] == 0
            own = group.ids[0, sees]
            assert tuple(own.tolist()) == prompts[row]
            assert group.positions[0, sees].tolist() == list(range(len(own)))
            assert group.target[group.rows.tolist().index(row)] == 10 + row
        ends = group.last[0].tolist()
        assert ends == sorted(set(ends))
        found += [prompts[row] for row in group.rows]
    assert sorted(found) == sorted(prompts)
    if len(groups) == 1:
        assert groups[0].ids.shape[1] == len(tree)


def test_prompts_that_share_little_run_by_length(llama: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(p) for p in torch.randint(4, 100, (9, 7), generator=generator).tolist()]
    assert pack_rows(_rows(prompts), llama.decoder) is None


def test_prompts_longer_than_a_sliding_window_are_not_packed() -> None:
    model = pretrained(arch="mistral")
    model.decoder.config.sliding_window = 7
    assert pack_rows(ALIKE, model.decoder) is not None
    model.decoder.config.sliding_window = 6
    assert pack_rows(ALIKE, model.decoder) is None


@pytest.mark.parametrize(
    "given",
    [
        {"units": [Unit(members=((0, 1),), positions="last")]},
        {"units": [Unit(members=((0, 1),), positions=(0,))]},
        {"units": UNITS, "trajectory": True},
        {"units": UNITS, "pad": "left"},
    ],
)
def test_what_differs_between_prompts_or_positions_is_not_shared(
    llama: LanguageModel, given: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="prefixes can be shared only by units that scale"):
        sweep(llama.decoder, ALIKE, shares_prefixes=True, **given)  # pyright: ignore[reportArgumentType, reportCallIssue]
