"""Patches at every granularity and kind of positions, and latents, against TransformerLens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from allostasis.engines.budget import Budget
from allostasis.engines.prompts import Prompt, Rows
from allostasis.engines.suffix import sweep
from allostasis.engines.verify import HOOKS, Oracle
from allostasis.interventions.ablate import Unit
from allostasis.interventions.latent import Latents
from allostasis.models.blocks import Decoder
from allostasis.models.lens import bridge, pretrained
from allostasis.models.zoo import LanguageModel

ARCHS = (
    pytest.param("gpt_neox", marks=pytest.mark.slow),
    pytest.param("llama", marks=pytest.mark.slow),
    "gemma3_text",
)
EXACT = 1e-5
SAME = 1e-6
LENGTH = 8  # longer than the window of local attention


@pytest.fixture(scope="module", params=ARCHS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return pretrained(arch=request.param)


def _prompts(n: int, *, seed: int = 0, length: int = LENGTH) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(row) for row in torch.randint(4, 100, (n, length), generator=generator).tolist()]


def _rows(prompts: list[Prompt]) -> Rows:
    n = len(prompts)
    return Rows(prompts=prompts, target=list(range(10, 10 + n)), foil=list(range(40, 40 + n)))


def _patches(decoder: Decoder) -> list[Unit]:
    units = []
    for positions in ("all", "last", (2, 5), "aligned:here"):
        for layer in range(decoder.n_layers):
            members = {
                "z": ((layer, 1),), "mlp_post": ((layer, 3), (layer, 40)), "mlp_out": None,
                "attn_out": None, "resid_post": None,
            }  # fmt: skip
            units += [
                Unit(site=site, op="patch", members=some or ((layer, None),), positions=positions)  # pyright: ignore[reportArgumentType]
                for site, some in members.items()
            ]
        for site in ("mlp_out", "attn_out"):
            for window in ((0, 1), (1, 2), (0, 1, 2)):
                members = tuple((layer, None) for layer in window)
                units.append(Unit(site=site, op="patch", members=members, positions=positions))
    units.append(Unit(site="mlp_post", op="patch", members=((1, None),)))
    return units


def test_every_patch_equals_transformer_lens_one_hook_at_a_time(model: LanguageModel) -> None:
    """Granularities, windows and positions, with roles that stand elsewhere in the other run."""
    rows, sources = _rows(_prompts(2)), {"patch": [(p,) for p in _prompts(2, seed=1)]}
    roles = {"here": [[(1, 4), (2, 2)], [(LENGTH - 1, 3)]]}
    units, oracle = _patches(model.decoder), Oracle(model)
    swept = sweep(
        model.decoder, rows, units, sources=sources, roles=roles, closeness="patch",
        budget=Budget(100),
    )  # fmt: skip
    there = [oracle.logits(p) for (p,) in sources["patch"]]
    for row, prompt in enumerate(rows.prompts):
        target, foil = rows.target[row], rows.foil[row]
        clean = oracle.logits(prompt).log_softmax(-1)
        other = there[row].log_softmax(-1)
        assert swept.source["ld"][row] == pytest.approx(
            float(other[target] - other[foil]), abs=EXACT
        )
        for index, unit in enumerate(units):
            logp = oracle.logits(
                prompt, unit, sources["patch"][row], places=roles["here"][row]
            ).log_softmax(-1)
            found = {name: column[index, row] for name, column in swept.values.items()}
            want = {
                "ld": logp[target] - logp[foil],
                "kl": torch.sum(clean.exp() * (clean - logp)),
                "kl_source": torch.sum(other.exp() * (other - logp)),
            }
            for name, value in want.items():
                assert found[name] == pytest.approx(float(value), abs=2 * EXACT), (unit.key, name)


def test_patching_everything_with_itself_changes_nothing(model: LanguageModel) -> None:
    rows = _rows(_prompts(3))
    own = {"patch": [(prompt,) for prompt in rows.prompts]}
    roles = {"here": [[(at, at) for at in range(LENGTH)]] * 3}
    units = _patches(model.decoder)
    swept = sweep(model.decoder, rows, units, sources=own, roles=roles, closeness="patch")
    scale = 1 + np.abs(swept.clean["ld"]).max()
    assert np.abs(swept.values["ld"] - swept.clean["ld"]).max() <= SAME * scale
    assert swept.values["kl"].max() <= SAME
    assert swept.values["kl_source"].max() <= SAME


def test_all_positions_of_the_last_layer_give_the_other_run_exactly(model: LanguageModel) -> None:
    rows, others = _rows(_prompts(3)), _prompts(3, seed=5)
    source = {"patch": [(prompt,) for prompt in others]}
    last = model.decoder.n_layers - 1
    units = [
        Unit(site="resid_post", op="patch", members=((last, None),), positions=positions)
        for positions in ("all", "last")
    ]
    swept = sweep(model.decoder, rows, units, sources=source, closeness="patch")
    for found in swept.values["ld"]:
        assert np.array_equal(found, swept.source["ld"])
    for name in ("logp_target", "entropy", "pred_id"):  # of logits rounded in batches of two sizes
        for found in swept.values[name]:
            np.testing.assert_allclose(found, swept.source[name], atol=4 * SAME, err_msg=name)
    assert swept.values["kl_source"].max() <= SAME


def test_all_neurons_of_a_layer_are_its_write(model: LanguageModel) -> None:
    rows, source = _rows(_prompts(3)), {"patch": [(p,) for p in _prompts(3, seed=5)]}
    units = [
        Unit(site=site, op="patch", members=((1, None),), positions=positions)  # pyright: ignore[reportArgumentType]
        for site in ("mlp_post", "mlp_out")
        for positions in ("all", "last")
    ]
    found = sweep(model.decoder, rows, units, sources=source, full=False).values["ld"]
    np.testing.assert_allclose(found[:2], found[2:], atol=EXACT)


def test_site_shapes_and_names(model: LanguageModel) -> None:
    """Trap 11: mlp_post, mlp_out, z and the others are what TransformerLens calls so."""
    decoder, ids = model.decoder, torch.tensor(_prompts(2))
    _, cache = bridge(model).run_with_cache(ids)
    found, layer = decoder.capture(ids), 1
    mid = found.resid_pre[layer]
    mid = mid if decoder.is_parallel else mid + found.attn_write[layer]
    ours = {
        "z": found.z[layer], "attn_out": found.attn_write[layer],
        "mlp_post": decoder.mlp_post(layer, mid), "mlp_out": found.mlp_write[layer],
        "resid_pre": found.resid_pre[layer], "resid_post": found.resid_pre[layer + 1],
    }  # fmt: skip
    d_mlp = decoder.W_down(layer).shape[0]
    assert ours["mlp_post"].shape == (2, LENGTH, d_mlp)
    assert ours["z"].shape == (2, LENGTH, decoder.n_heads, decoder.d_head)
    assert d_mlp not in {decoder.d_model, decoder.n_heads}
    for site, hook in HOOKS.items():
        there = cache[f"blocks.{layer}.{hook}"]
        torch.testing.assert_close(ours[site], there, atol=2 * EXACT, rtol=EXACT, msg=site)


class Dictionary:
    """A random ReLU dictionary, which reconstructs nothing well."""

    n_latents = 11

    def __init__(self, site: Any, layer: int, d_model: int) -> None:
        generator = torch.Generator().manual_seed(layer)
        self.site, self.layer = site, layer
        self.into = torch.randn(d_model, self.n_latents, generator=generator)
        self.out = torch.randn(self.n_latents, d_model, generator=generator)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.into).relu()

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.out


def test_latents_keep_the_reconstruction_error_and_equal_transformer_lens(
    model: LanguageModel,
) -> None:
    rows, oracle = _rows(_prompts(2)), Oracle(model)
    for site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        for layer in range(model.decoder.n_layers):
            latents = Dictionary(site, layer, model.decoder.d_model)
            assert isinstance(latents, Latents)
            sae: dict[str, Any] = {"site": "sae_latent"}
            one, two = ((layer, 4),), ((layer, 4), (layer, 7))
            units = [
                Unit(members=one, scale=1.0, **sae),
                Unit(members=one, **sae),
                Unit(members=two, scale=2.0, positions="last", **sae),
                Unit(members=one, op="set", scale=1.5, positions=(1, 3), **sae),
                Unit(members=((layer, None),), op="reconstruct", **sae),
            ]
            swept = sweep(model.decoder, rows, units, latents=[latents], budget=Budget(50))
            identity = np.abs(swept.values["ld"][0] - swept.clean["ld"]).max()
            assert identity <= SAME * (1 + np.abs(swept.clean["ld"]).max())
            for row, prompt in enumerate(rows.prompts):
                for index, unit in enumerate(units):
                    logits = oracle.logits(prompt, unit, latents=latents)
                    want = float(logits[rows.target[row]] - logits[rows.foil[row]])
                    assert swept.values["ld"][index, row] == pytest.approx(want, abs=2 * EXACT)
            assert [unit.key for unit in units] == [
                f"scale1:sae_latent@{layer}:4", f"zero:sae_latent@{layer}:4",
                f"scale2:sae_latent@{layer}:4+7[last]", f"set1.5:sae_latent@{layer}:4[1,3]",
                f"reconstruct:sae_latent@{layer}",
            ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": ((3, 9),), "site": "mlp_post"}, "the model has layers 0 to 2, not 3"),
        ({"members": ((0, 96),), "site": "mlp_post"}, "layer 0 has neurons 0 to 95, not 96"),
        ({"members": ((0, 2),), "site": "sae_latent"}, "no dictionary that reads layer 0 is given"),
        ({"members": ((0, 2),), "positions": "aligned:S"}, "no positions are given for role 'S'"),
        ({"members": ((0, 2),), "positions": "first"}, "allowed are all, last, aligned:ROLE"),
        ({"members": ((0, 2), (1, 2)), "site": "mlp_post"}, "pairs of one layer"),
        ({"members": ((0, 1),), "op": "set"}, "op set is for site sae_latent, not z"),
        ({"members": ((0, 1),), "site": "sae_latent", "op": "patch"}, "does not fit latents"),
    ],
)
def test_a_unit_without_a_place_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(pretrained(arch="llama").decoder, _rows(_prompts(2)), [Unit(**changes)])


def test_a_role_outside_its_prompt_is_refused() -> None:
    unit = Unit(members=((0, 0),), positions="aligned:S")
    with pytest.raises(ValueError, match=r"role 'S', row 1: places \[\(8, 0\)\] do not all lie"):
        sweep(
            pretrained(arch="llama").decoder, _rows(_prompts(2)), [unit],
            roles={"S": [[(0, 0)], [(8, 0)]]},
        )  # fmt: skip
