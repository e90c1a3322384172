"""What a sweep reads at the last real token, in float32 whatever the weights are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from allostasis.engines.prompts import Group
from allostasis.metrics.kl_divergence import kl_divergence
from allostasis.metrics.trajectory_curvature import trajectory_curvature
from allostasis.metrics.trajectory_step import trajectory_step
from allostasis.models.blocks import Decoder

READOUTS = ("ld", "logp_target", "logp_foil", "kl", "entropy", "rank_target", "pred_id")
"""Names of the readouts.

ld: logit of the target less that of the foil, before a cap. logp_target, logp_foil: nats. kl:
KL(clean || changed) over the vocabulary, nats. entropy: nats. rank_target: how many tokens have a
larger logit. pred_id: the token with the largest one.
"""

CLOSENESS = "kl_source"
"""KL(source || changed), nats: how far the output still is from that of the run that values come
from; read where that run is given."""

TRAJECTORY = ("step_first5", "step_rest", "step_no_first", "curvature", "curvature_no_first")
"""Names of what is read of all positions before the last block.

step: mean distance between the streams of neighbouring tokens: the first five, the later ones, all
but the one from position 0; 0 where a prompt has none. curvature: mean angle between such steps,
rad.
"""

LOGITS = 2**25
"""How many logits are held at once."""


def trajectory_of(resid: Float[Tensor, "pair position d_model"]) -> Float[Tensor, "pair number"]:
    """`TRAJECTORY` of streams, in that order."""
    steps, turns = trajectory_step(resid.float()), trajectory_curvature(resid.float())
    parts = (steps[:, :5], steps[:, 5:], steps[:, 1:], turns, turns[:, 1:])
    return torch.stack([part.sum(1) / max(1, part.shape[1]) for part in parts], dim=1)


class Reader:
    """Reads the answers of one group from its streams at the last real token.

    Args:
        decoder: The model.
        group: Prompts and answers.
        names: Which of `READOUTS`.
        clean_end: The untouched model's streams, against which `kl` is taken.
        source_end: Those of the run that values come from, for `kl_source`; None reads none.
    """

    def __init__(
        self,
        decoder: Decoder,
        group: Group,
        names: Sequence[str],
        *,
        clean_end: Float[Tensor, "kind d_model"],
        source_end: Float[Tensor, "kind d_model"] | None = None,
    ) -> None:
        self.decoder, self.group, self.names = decoder, group, names
        apart = decoder.W_U[:, group.target].float() - decoder.W_U[:, group.foil].float()
        self.apart, self.bias = apart.T, torch.zeros(len(group.target), device=apart.device)
        if decoder.unembed_bias is not None:
            bias = decoder.unembed_bias.float()
            self.bias = bias[group.target] - bias[group.foil]
        self.clean_end, self.source_end = clean_end, source_end
        self.kind = group.kind.to(clean_end.device)

    def read(
        self, ends: Float[Tensor, "unit kind d_model"], *, only: Sequence[str] | None = None
    ) -> dict[str, Float[Tensor, "unit row"]]:
        """The readouts of each row of the group under each unit; they stay on the device."""
        names = self.names if only is None else only
        normed = self.decoder.final_norm(ends).float()
        found = {"ld": torch.linalg.vecdot(normed[:, self.kind], self.apart) + self.bias}
        if len(names) > 1:
            n_rows = len(self.kind)
            step = max(1, LOGITS // self.decoder.n_vocab)
            begins = range(0, len(ends) * n_rows, step)
            which = torch.arange(len(ends) * n_rows, device=ends.device)
            pieces = [self._full(ends, which[begin : begin + step]) for begin in begins]
            found |= {
                name: torch.cat([piece[name] for piece in pieces]).view(len(ends), n_rows)
                for name in pieces[0]
            }
        return {name: found[name] for name in names}

    def _full(
        self, ends: Float[Tensor, "unit kind d_model"], which: Int[Tensor, " pair"]
    ) -> dict[str, Tensor]:
        unit, row = which // len(self.kind), which % len(self.kind)
        logp, clean = self._logp(ends[unit, self.kind[row]]), self._clean(row)
        target, foil = self.group.target[row, None], self.group.foil[row, None]
        own = logp.gather(1, target)
        found = {}
        if self.source_end is not None:
            source = self._logp(self.source_end[self.kind[row]])
            found[CLOSENESS] = torch.linalg.vecdot(source.exp(), source - logp).clamp(min=0)
        return found | {
            "logp_target": own[:, 0],
            "logp_foil": logp.gather(1, foil)[:, 0],
            "kl": kl_divergence(clean, logp),
            "entropy": -torch.linalg.vecdot(logp.exp(), logp),
            "rank_target": (logp > own).sum(dim=1),
            "pred_id": logp.argmax(dim=1),
        }

    def _clean(self, row: Int[Tensor, " pair"]) -> Float[Tensor, "pair vocab"]:
        """The untouched model's log probabilities, kept where they are few."""
        if len(self.kind) * self.decoder.n_vocab > LOGITS:
            return self._logp(self.clean_end[self.kind[row]])
        return self._clean_logp[row]

    @cached_property
    def _clean_logp(self) -> Float[Tensor, "row vocab"]:
        return self._logp(self.clean_end[self.kind])

    def _logp(self, end: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        logits = self.decoder.unembed(self.decoder.final_norm(end)).float()
        return logits.log_softmax(dim=-1)
