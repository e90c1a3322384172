"""Latents of a dictionary (SAE) changed in place, with what it does not explain left as it is."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from allostasis.interventions.ablate import Unit

Input = Literal["attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post"]


@runtime_checkable
class Latents(Protocol):
    """What an intervention asks of a dictionary; any object that has it will do.

    Attributes:
        site: Which activation it reads; not the heads' outputs.
        layer: Of which block.
        n_latents: How many latents it has.
    """

    site: Input
    layer: int
    n_latents: int

    def encode(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row latent"]:
        """Codes of activations."""
        ...

    def decode(self, f: Float[Tensor, "*row latent"]) -> Float[Tensor, "*row d_model"]:
        """Activations of codes."""
        ...


def with_latents(
    latents: Latents, now: Float[Tensor, "*row d_model"], unit: Unit
) -> Float[Tensor, "*row d_model"]:
    """An activation in which some latents have another value.

    x' = x + decode(f') - decode(f), f = encode(x): what the dictionary does not reconstruct stays
    in x', so that f' = f changes nothing and reconstruction error is no effect of the unit. Only
    `reconstruct` puts decode(f) itself in place: the dictionary's own cost.

    Args:
        latents: The dictionary.
        now: The activation that it reads.
        unit: At site `sae_latent`: which latents, scaled by a factor or set to a value.

    Returns:
        The activation, of the same shape.
    """
    code = latents.encode(now)
    if unit.op == "reconstruct":
        return latents.decode(code)
    changed, chosen = code.clone(), unit.heads(unit.layer)
    changed[..., chosen] = code[..., chosen] * unit.scale if unit.op == "scale" else unit.scale
    return now + (latents.decode(changed) - latents.decode(code))
