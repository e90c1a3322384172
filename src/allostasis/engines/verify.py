"""A sample of a sweep, done again by TransformerLens: one unit, one prompt, one full pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from allostasis.engines.prompts import Places, Prompt, Rows
from allostasis.engines.suffix import Precision, Swept, sweep
from allostasis.interventions.ablate import Unit
from allostasis.interventions.latent import Latents, with_latents
from allostasis.models.lens import bridge
from allostasis.models.zoo import LanguageModel

Hook = tuple[str, Callable[..., Tensor]]
At = tuple[Any, Any]
"""Positions of the prompt and, one for one, of the source."""

ATOL: Mapping[Precision, float] = {"fp32": 1e-3, "bf16": 0.25}
"""By how much a logit difference may be off, in logits."""

TOP = 10
INERT = 1e-6  # nats: less than this is no effect
HOOKS: Mapping[str, str] = {
    "z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "mlp_post": "mlp.hook_post",
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
}
"""Where TransformerLens can change a site. Its bridge's `hook_resid_mid` changes what the MLP reads
and not the stream that goes past it, so that a change there is made through the attention's write.
"""


class Oracle:
    """The slow and independent way to a unit's logits.

    Args:
        model: The model, in float32.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.bridge: Any = bridge(model)
        self._seen: dict[tuple[str, Prompt], Tensor] = {}

    @torch.no_grad()
    def logits(
        self,
        prompt: Prompt,
        unit: Unit | None = None,
        sources: Sequence[Prompt] = (),
        *,
        places: Places = (),
        latents: Latents | None = None,
    ) -> Tensor:
        """Logits at the last token of one prompt.

        Args:
            prompt: Token ids.
            unit: What is done; None leaves the model as it is.
            sources: The prompts whose mean activations are put in.
            places: The positions that have the unit's role, with where they are in the source.
            latents: The dictionary whose latents a unit is about.
        """
        ids = torch.tensor([prompt], device=self.bridge.cfg.device)
        hooks = []
        if unit is not None:
            hooks = self._hooks(unit, sources, _positions(unit, len(prompt) - 1, places), latents)
        return self.bridge.run_with_hooks(ids, fwd_hooks=hooks)[0, -1]

    def _hooks(
        self, unit: Unit, sources: Sequence[Prompt], at: At, latents: Latents | None
    ) -> list[Hook]:
        hooks: list[Hook] = []
        site = unit.site if latents is None else latents.site
        if site == "resid_mid":
            return self._mid(unit, sources, at, latents)
        for layer in unit.layers:
            name = f"blocks.{layer}.{HOOKS[site]}"
            hooks.append((name, self._change(unit, layer, self._mean(name, sources), at, latents)))
        return hooks

    def _mean(self, name: str, sources: Sequence[Prompt]) -> Tensor | None:
        found = []
        for prompt in sources:
            if (name, prompt) not in self._seen:
                ids = torch.tensor([prompt], device=self.bridge.cfg.device)
                _, cache = self.bridge.run_with_cache(ids, names_filter=[name])
                self._seen[name, prompt] = cache[name]
            found.append(self._seen[name, prompt])
        return torch.stack(found).mean(dim=0) if found else None

    def _mid(
        self, unit: Unit, sources: Sequence[Prompt], at: At, latents: Latents | None
    ) -> list[Hook]:
        """Change resid_mid = resid_pre + attn_out by way of attn_out."""
        pre, out = (f"blocks.{unit.layer}.{HOOKS[site]}" for site in ("resid_pre", "attn_out"))
        source = None
        if (there := self._mean(pre, sources)) is not None:
            write = self._mean(out, sources)
            assert write is not None
            source = there + write
        change = self._change(unit, unit.layer, source, at, latents)
        stream: list[Tensor] = []

        def keep(value: Tensor, hook: Any) -> Tensor:
            del hook
            stream.append(value)
            return value

        def write_difference(value: Tensor, hook: Any) -> Tensor:
            return change(stream[-1] + value, hook) - stream[-1]

        return [(pre, keep), (out, write_difference)]

    @staticmethod
    def _change(
        unit: Unit, layer: int, source: Tensor | None, at: At, latents: Latents | None
    ) -> Callable[..., Tensor]:
        here, there = at

        def change(value: Tensor, hook: Any) -> Tensor:
            del hook
            value = value.clone()
            if latents is not None:
                value[:, here] = with_latents(latents, value[:, here], unit)
                return value
            within = unit.heads(layer)
            heads: Any = within or [slice(None)]
            for head in heads:
                new = None if source is None else source[:, there, head]
                value[:, here, head] = unit.value(value[:, here, head], new)
            return value

        return change


def _positions(unit: Unit, last: int, places: Places) -> At:
    """Which positions a unit changes, with where their values come from."""
    if unit.role is not None:
        return [here for here, _ in places], [there for _, there in places]
    words = {"all": slice(None), "last": [last]}
    at = words[unit.positions] if isinstance(unit.positions, str) else [*unit.positions]
    return at, at


def verify_slice(
    model: LanguageModel,
    rows: Rows,
    swept: Swept,
    *,
    seed: int,
    precision: Precision = "fp32",
    sources: Mapping[str, Sequence[Sequence[Prompt]]] | None = None,
    roles: Mapping[str, Sequence[Places]] | None = None,
    n_units: int = 8,
    n_prompts: int = 8,
    atol: float | None = None,
) -> dict[str, Any]:
    """Do a sample of a sweep again on the CPU in float32, and compare.

    The unit with the largest effect is always in the sample; the seed draws the others. Where
    `atol` is None it is that of the precision.

    Returns:
        `passed`, `atol`, `max_abs_diff` in logits, `rows` with each comparison; with reduced
        precision also `max_abs_diff_effect` (of the change of the logit difference), `spearman` and
        `top_overlap` of unit effects, and `below_noise`: units whose effect is smaller than twice
        the largest deviation.
    """
    rng = np.random.default_rng(seed)
    effects = (swept.values["ld"] - swept.clean["ld"]).mean(axis=1)
    largest = int(np.abs(effects).argmax())
    others = [index for index in range(len(effects)) if index != largest]
    drawn = rng.choice(others, size=min(n_units - 1, len(others)), replace=False) if others else []
    units = [largest, *(int(index) for index in drawn)]
    chosen = sorted(rng.choice(len(rows), size=min(n_prompts, len(rows)), replace=False).tolist())
    oracle = Oracle(_on_cpu(model))
    clean = {row: _ld(oracle.logits(rows.prompts[row]), rows, row) for row in chosen}
    compared: list[dict[str, Any]] = []
    for index in units:
        unit = swept.units[index]
        for row in chosen:
            some = () if unit.source is None else (sources or {})[unit.source][row]
            places = () if unit.role is None else (roles or {})[unit.role][row]
            check = _ld(oracle.logits(rows.prompts[row], unit, some, places=places), rows, row)
            main = float(swept.values["ld"][index, row])
            compared.append({
                "intervention": unit.key, "example": row, "quantity": "ld",
                "main": main, "check": check, "abs_diff": abs(main - check),
                "effect_main": main - float(swept.clean["ld"][row]),
                "effect_check": check - clean[row],
            })  # fmt: skip
    worst = max(row["abs_diff"] for row in compared)
    allowed = ATOL[precision] if atol is None else atol
    result: dict[str, Any] = {
        "passed": worst <= allowed,
        "atol": allowed,
        "max_abs_diff": worst,
        "rows": compared,
    }
    if precision != "fp32":
        result |= _noise(swept, compared, effects)
    return result


def kl_of_a_zeroed_layer(model: LanguageModel) -> float:
    """KL divergence in nats, at the last token of one prompt, of zeroing every head of a layer.

    Raises:
        RuntimeError: It is nothing, so that the heads are not where they are looked for.
    """
    decoder = model.decoder
    ids = tuple(model.encode("Then Mary and John went to the store, and John gave it to"))
    rows = Rows(prompts=[ids], target=[ids[-1]], foil=[ids[0]])
    layer = decoder.n_layers // 2
    every = Unit(members=tuple((layer, head) for head in range(decoder.n_heads)))
    moved = float(sweep(decoder, rows, [every]).values["kl"].max())
    if moved <= INERT:
        raise RuntimeError(
            f"zeroing all heads of layer {layer} leaves the prediction as it is (KL "
            f"{moved:.1e} nat): the model's heads are not where blocks.py looks for them"
        )
    return moved


def _noise(
    swept: Swept, compared: Sequence[Mapping[str, Any]], effects: np.ndarray
) -> dict[str, Any]:
    """What reduced precision costs, on the sample."""
    names = list(dict.fromkeys(row["intervention"] for row in compared))
    mean = {
        which: np.array([
            np.mean([row[f"effect_{which}"] for row in compared if row["intervention"] == name])
            for name in names
        ])
        for which in ("main", "check")
    }
    top = {which: set(np.argsort(-np.abs(value))[:TOP].tolist()) for which, value in mean.items()}
    worst = max(abs(row["effect_main"] - row["effect_check"]) for row in compared)
    return {
        "max_abs_diff_effect": worst,
        "spearman": float(
            pd.Series(mean["main"]).corr(pd.Series(mean["check"]), method="spearman")
        ),
        "top_overlap": len(top["main"] & top["check"]) / len(top["main"]),
        "below_noise": [
            unit.key
            for unit, effect in zip(swept.units, effects, strict=True)
            if abs(effect) < 2 * worst
        ],
    }


def _ld(logits: Tensor, rows: Rows, row: int) -> float:
    return float(logits[rows.target[row]].double() - logits[rows.foil[row]].double())


def _on_cpu(model: LanguageModel) -> LanguageModel:
    """The model on the CPU in float32; itself where it is there."""
    if model.decoder.device.type == "cpu" and model.decoder.dtype == torch.float32:
        return model
    hf = copy.deepcopy(model.hf).to("cpu", torch.float32)
    return LanguageModel(
        hf, model.tokenizer, title=model.title, identity=model.identity, facts=model.facts
    )
