"""What a sweep reads at the last real token, in float32 whatever the weights are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.engines.prompts import Group
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

LOGITS = 2**25
"""How many logits are held at once."""


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

    def read(
        self, end: Float[Tensor, "kind d_model"], *, only: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The readouts of each row of the group."""
        names = self.names if only is None else only
        kind = self.group.kind.to(end.device)
        normed = self.decoder.final_norm(end).float()
        found = {"ld": torch.linalg.vecdot(normed[kind], self.apart) + self.bias}
        if len(names) > 1:
            step = max(1, LOGITS // self.decoder.n_vocab)
            begins = range(0, len(kind), step)
            pieces = [self._full(end, slice(begin, begin + step)) for begin in begins]
            found |= {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        return {name: found[name].double().cpu().numpy() for name in names}

    def _full(self, end: Float[Tensor, "kind d_model"], piece: slice) -> dict[str, Tensor]:
        kind = self.group.kind.to(end.device)[piece]
        logp, clean = (self._logp(state[kind]) for state in (end, self.clean_end))
        target, foil = self.group.target[piece, None], self.group.foil[piece, None]
        own = logp.gather(1, target)
        p = logp.exp()
        closeness = {}
        if self.source_end is not None:
            source = self._logp(self.source_end[kind])
            closeness[CLOSENESS] = torch.linalg.vecdot(source.exp(), source - logp).clamp(min=0)
        return closeness | {
            "logp_target": own[:, 0],
            "logp_foil": logp.gather(1, foil)[:, 0],
            "kl": torch.linalg.vecdot(clean.exp(), clean - logp).clamp(min=0),
            "entropy": -torch.linalg.vecdot(p, logp),
            "rank_target": (logp > own).sum(dim=1),
            "pred_id": logp.argmax(dim=1),
        }

    def _logp(self, end: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        logits = self.decoder.unembed(self.decoder.final_norm(end)).float()
        return logits.log_softmax(dim=-1)
