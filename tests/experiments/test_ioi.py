"""The audit against closed forms, a planted backup head, and the engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from allostasis.engines.prompts import Rows
from allostasis.engines.suffix import sweep
from allostasis.engines.trace import clean_trace, trace
from allostasis.experiments.ioi.effects import Answers, Effects
from allostasis.experiments.ioi.module import IOIAudit
from allostasis.interventions.ablate import Unit
from allostasis.models import tiny
from allostasis.models.lens import pretrained
from allostasis.models.zoo import LanguageModel, tokenizer_facts
from allostasis.tasks.ioi import IOI

ARCHS = ("gpt2", "gpt_neox", "llama", "gemma", "gemma2", "gemma3_text", "qwen2")
N = 4
LENGTH = 8


@pytest.fixture(scope="module", params=ARCHS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return pretrained(arch=request.param)


def _ids() -> torch.Tensor:
    return torch.randint(4, 100, (N, LENGTH), generator=torch.Generator().manual_seed(3))


def _effects(model: LanguageModel) -> Effects:
    last = torch.full((N,), LENGTH - 1)
    answers = Answers(last=last, target=torch.arange(10, 10 + N), foil=torch.arange(40, 40 + N))
    return Effects(model.decoder, answers, clean_trace(model.decoder, _ids()))


def test_direct_effects_sum_to_logit_difference(model: LanguageModel) -> None:
    effects = _effects(model)
    logits = model.decoder.unembed(
        model.decoder.final_norm(effects.clean.resid_pre[-1][:, -1])
    ).double()
    row = torch.arange(N)
    want = logits[row, effects.answers.target] - logits[row, effects.answers.foil]
    assert_close(effects.writes.logit_difference, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("members", [((0, 1),), ((0, 2), (1, 3)), ((2, 0), (2, 1))])
def test_shapley_values_sum_to_the_total_effect_and_the_trace_is_the_sweep(
    model: LanguageModel, members: tuple[tuple[int, int], ...]
) -> None:
    effects, unit = _effects(model), Unit(members=members)
    columns = effects.columns(unit, trace(model.decoder, effects.clean, unit))
    whole = sum(columns[f"phi_{p}"] for p in ("own", "routing", "content", "mlps", "scale"))
    np.testing.assert_allclose(whole, columns["te"], atol=2e-5)
    rows = Rows(
        prompts=[tuple(ids) for ids in _ids().tolist()],
        target=effects.answers.target.tolist(),
        foil=effects.answers.foil.tolist(),
    )
    swept = sweep(model.decoder, rows, [unit])
    np.testing.assert_allclose(columns["ld"], swept.values["ld"][0], atol=1e-5)
    np.testing.assert_allclose(columns["kl"], swept.values["kl"][0], atol=1e-5)
    np.testing.assert_allclose(columns["sr"], columns["te"] + columns["drop"], atol=1e-12)


def test_routing_is_dummy_where_no_later_layer_attends(model: LanguageModel) -> None:
    """Heads of the last layer are taken out: no other attention can react."""
    effects, unit = _effects(model), Unit(members=((2, 1),))
    columns = effects.columns(unit, trace(model.decoder, effects.clean, unit))
    np.testing.assert_allclose(columns["phi_routing"], 0, atol=1e-5)
    np.testing.assert_allclose(columns["phi_content"], 0, atol=1e-5)


def test_null_ratio_closed_form() -> None:
    """Trap 14: without a reaction the norm is that of the stream less the write."""
    model = pretrained(arch="llama")
    effects, unit = _effects(model), Unit(members=((1, 2),))
    found = trace(model.decoder, effects.clean, unit)
    depths = effects.depths(unit, found, {})
    resid = effects.clean.resid_pre[3][:, -1].double()
    write = model.decoder.head_writes(1, effects.clean.z[1])[:, -1, 2].double()
    np.testing.assert_allclose(
        depths[-1]["norm_end_null"], (resid - write).norm(dim=1).numpy(), rtol=1e-5
    )
    assert [int(row["depth"][0]) for row in depths] == [1, 2, 3]
    np.testing.assert_array_equal(depths[0]["norm_end"], depths[0]["norm_end_clean"])
    np.testing.assert_array_equal(depths[0]["norm_end_null"], depths[0]["norm_end_clean"])


def test_the_first_position_never_reacts_to_a_change_after_it() -> None:
    model = pretrained(arch="llama")
    clean = clean_trace(model.decoder, _ids())
    unit = Unit(members=((0, 1),), positions=(3, 4))
    rows = Rows(prompts=[tuple(ids[:3]) for ids in _ids().tolist()], target=[10] * N, foil=[40] * N)
    swept = sweep(model.decoder, rows, [unit], full=False)
    np.testing.assert_allclose(swept.values["ld"][0], swept.clean["ld"], atol=1e-6)
    with pytest.raises(ValueError, match="only heads are traced, at all positions"):
        trace(model.decoder, clean, unit)


# ---------------------------------------------------------------- planted self-repair


def _planted(backup: float, *, noise: float = 0.02) -> LanguageModel:
    """A GPT-2 of two layers whose head 0.0 answers, and whose head 1.0 does if 0.0 is silent.

    Head 0.0 spreads its attention evenly and writes against every name it reads; the subject is
    read twice, so that the indirect object leads. It also raises a flag. Head 1.0 looks at the
    first token, where there is no name, as long as the flag is up; without it, it spreads its
    attention too and writes `backup` times what head 0.0 wrote. One large
    fixed component keeps the norms' scale where it is. Heads 0.1 and 1.1 add noise.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny.word_tokenizer("gpt2")
    n_vocab, d_head, flag, first, big = len(tokenizer), 150, 290, 291, (292, 293)
    d_model = 2 * d_head
    assert n_vocab < flag
    config = GPT2Config(
        vocab_size=n_vocab, n_embd=d_model, n_layer=2, n_head=2, n_positions=64,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    hf = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        for module in hf.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
        size = 1000.0
        sigma = size * (2 / d_model) ** 0.5
        hf.transformer.wte.weight[:, :n_vocab] = torch.eye(n_vocab)
        hf.transformer.wpe.weight[:, big[0]], hf.transformer.wpe.weight[:, big[1]] = size, -size
        hf.transformer.wpe.weight[0, first] = 10.0
        words = tokenizer.get_vocab()
        names = [i for word, i in words.items() if word[1:].istitle() and word[0] == "▁"][:100]
        for layer, strength in ((0, 1.0), (1, backup)):
            attn = hf.transformer.h[layer].attn
            for index, name in enumerate(names):
                attn.c_attn.weight[name, 2 * d_model + index] = sigma
                attn.c_proj.weight[index, name] = -strength
        head = hf.transformer.h[0].attn
        head.c_attn.bias[2 * d_model + d_head - 1] = 1.0
        head.c_proj.weight[d_head - 1, flag] = 10.0
        for layer in (0, 1):
            _add_noise(hf.transformer.h[layer].attn, n_vocab, d_head, sigma * noise, generator)
        head = hf.transformer.h[1].attn
        head.c_attn.weight[flag, 0] = sigma / 10 * 20 * d_head**0.5
        head.c_attn.weight[first, d_model] = sigma / 10
        hf.lm_head.weight[:, :n_vocab] = 40 * sigma * torch.eye(n_vocab)
    facts = tokenizer_facts(tokenizer)
    identity: dict[str, Any] = {
        "name": "planted", "prepend_bos": True, "weights_sha256": f"planted {backup}",
    }  # fmt: skip
    return LanguageModel(hf, tokenizer, title="planted", identity=identity, facts=facts)


def _add_noise(
    attn: Any, n_vocab: int, d_head: int, scale: float, generator: torch.Generator
) -> None:
    """Give the second head of a layer random values and outputs."""
    d_model = 2 * d_head
    value = torch.randn(n_vocab, d_head, generator=generator) / d_head**0.5
    attn.c_attn.weight[:n_vocab, 2 * d_model + d_head :] = scale * value
    attn.c_proj.weight[d_head:, :n_vocab] = torch.randn(d_head, n_vocab, generator=generator)


def _audit(model: LanguageModel, **settings: Any) -> tuple[IOIAudit, pd.DataFrame]:
    task = IOI(seed=0, n_examples=40, n_discovery=24, n_reference=8)
    arguments = {"sets": "critical", "k": 1, "ablations": ["zero", "mean"], "sweep": False}
    module = IOIAudit(model=model, task=task, **{**arguments, **settings})
    return module, module.test_step(task, 0)["tables"]["examples"]


def _interval(table: pd.DataFrame) -> tuple[float, float, float]:
    """Self-repair over drop as a ratio of sums, with a plain cluster bootstrap of our own."""
    sums = table.groupby("cluster")[["sr", "drop"]].sum().to_numpy()
    rng = np.random.default_rng(0)
    drawn = sums[rng.integers(0, len(sums), (2000, len(sums)))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)


def test_planted_name_mover_is_found_and_its_planted_backup_too() -> None:
    module, table = _audit(_planted(0.6))
    assert module.facts["discovery"]["selected"] == ["0.0"]
    assert module.summary()["does_task"]
    zero = table[table["ablation"] == "zero"]
    estimate, low, high = _interval(zero)
    assert low <= 0.6 <= high
    assert estimate == pytest.approx(0.6, abs=0.1)
    # head 1.0 looks elsewhere than before: its pattern repairs, and no scale does
    repair = zero[["phi_routing", "phi_content", "phi_mlps", "phi_scale"]].sum()
    assert repair["phi_routing"] / repair.sum() > 0.8
    assert abs(repair["phi_scale"]) / repair.sum() < 0.05


def test_without_a_backup_the_interval_of_the_repair_includes_zero() -> None:
    _, table = _audit(_planted(0.0))
    estimate, low, high = _interval(table[table["ablation"] == "zero"])
    assert low <= 0 <= high
    assert abs(estimate) < 0.1


def test_a_set_whose_ablation_changes_nothing_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"change no logit difference: zero:0\.1"):
        _audit(_planted(0.6, noise=0.0), heads=["0.1"], ablations=["zero"])


def test_discovery_split_is_never_in_the_effects() -> None:
    """Trap 16."""
    module, table = _audit(_planted(0.6))
    prompts = module.task.build(module.model.encode, module.model.tokenizer)
    assert set(table["example"]) == {prompt.example for prompt in prompts.evaluation}
    assert not {p.cluster for p in prompts.discovery} & set(table["cluster"])
    assert set(table["split"]) == {"evaluation"}


def test_each_prompt_has_its_own_pair() -> None:
    """Trap 17: with the answers of another prompt the planted model would be at chance."""
    _, table = _audit(_planted(0.6))
    assert (table["ld_clean"] > 0).mean() > 0.9
    assert table.drop_duplicates("example")[["io", "s"]].drop_duplicates().shape[0] > 20


def test_resampling_averages_donors_after_the_readout() -> None:
    _, table = _audit(_planted(0.6), ablations=["resample"], n_donors=3)
    assert set(table["intervention"]) == {"none", "resample:0.0"}
    assert (table.loc[table["ablation"] == "resample", "te_donor_sd"] > 0).any()


def test_random_sets_are_others_of_the_same_layers() -> None:
    module, table = _audit(_planted(0.6), sets="random", n_random=20, ablations=["zero"])
    assert module.facts["discovery"]["selected"] == ["0.0"]
    assert set(table["intervention"]) == {"none", "zero:0.1"}
