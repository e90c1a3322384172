"""What each part of a model writes towards the answer, and what an intervention does to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from allostasis.analysis import repair
from allostasis.interventions.ablate import Unit
from allostasis.metrics.logit_scale import logit_scale
from allostasis.metrics.margin import margin
from allostasis.models.blocks import Capture, Decoder


@dataclass(frozen=True)
class Answers:
    """Prompts of one length with their pairs of answers.

    Attributes:
        last: Index of each prompt's last token.
        target: Token of the right answer.
        foil: Token of the wrong one.
    """

    last: Int[Tensor, " row"]
    target: Int[Tensor, " row"]
    foil: Int[Tensor, " row"]

    def end(self, stream: Float[Tensor, "row position ..."]) -> Float[Tensor, "row ..."]:
        """The last token of each prompt."""
        return stream[torch.arange(len(stream), device=stream.device), self.last]


@dataclass(frozen=True)
class Writes:
    """Direct effects of one pass before the division by the final norm's scale, in float64.

    A write w counts (gain o c(w)) . u, u = W_U[target] - W_U[foil], with c(.) centring where the
    final norm centres. Divided by the scale, and with the constant, they sum to the logit
    difference exactly.

    Attributes:
        embed: The embeddings.
        heads: Each head.
        biases: Biases of all output projections.
        mlps: Each MLP.
        scale: The final norm's scale: sqrt(variance + eps), or sqrt(mean square + eps).
        constant: The final norm's and the unembedding's biases, which no scale divides.
    """

    embed: Float64[Tensor, " row"]
    heads: Float64[Tensor, "row layer head"]
    biases: Float64[Tensor, " row"]
    mlps: Float64[Tensor, "row layer"]
    scale: Float64[Tensor, " row"]
    constant: Float64[Tensor, " row"]

    @property
    def logit_difference(self) -> Float64[Tensor, " row"]:
        """Their sum: the logit difference."""
        whole = self.embed + self.heads.sum((1, 2)) + self.biases + self.mlps.sum(1)
        return whole / self.scale + self.constant


class Effects:
    """Effects of interventions on one group of prompts, against its clean pass.

    Args:
        decoder: The model.
        answers: The prompts' answers.
        clean: The clean pass, with patterns and values.
    """

    def __init__(self, decoder: Decoder, answers: Answers, clean: Capture) -> None:
        self.decoder, self.answers, self.clean = decoder, answers, clean
        apart = decoder.W_U[:, answers.target] - decoder.W_U[:, answers.foil]
        read = decoder.final_gain[:, None].double() * apart.double()
        self.read = (read - read.mean(dim=0) if decoder.is_centred else read).T.float()
        constant = torch.zeros(len(answers.target), dtype=torch.float64, device=decoder.device)
        if decoder.final_bias is not None:
            constant += decoder.final_bias.double() @ apart.double()
        if decoder.unembed_bias is not None:
            bias = decoder.unembed_bias.double()
            constant += bias[answers.target] - bias[answers.foil]
        self.constant = constant
        self._known: dict[int, Tensor] = {}
        self.writes = self.of(clean)
        self.readouts = self._readouts(clean)

    def of(self, found: Capture) -> Writes:
        """Direct effects of a pass; a norm after attention has its clean scale."""
        decoder, end = self.decoder, self.answers.end
        heads = [
            torch.linalg.vecdot(end(z).double(), self._through(layer))
            for layer, z in enumerate(found.z)
        ]
        biases = torch.zeros_like(self.constant)
        for layer in range(decoder.n_layers):
            bias = decoder.out_bias(layer)
            if bias is not None:
                biases += self._read_before_post_norm(layer).double() @ bias.double()
        mlps = [self._along(end(write)) for write in found.mlp_write]
        return Writes(
            embed=self._along(end(found.resid_pre[0])),
            heads=torch.stack(heads, dim=1),
            biases=biases,
            mlps=torch.stack(mlps, dim=1),
            scale=self._scale(end(found.resid_pre[-1])),
            constant=self.constant,
        )

    def _through(self, layer: int) -> Float64[Tensor, "row head d_head"]:
        """By what a head's output counts towards the answer."""
        if layer not in self._known:
            read = self._read_before_post_norm(layer)
            through = torch.einsum("hkd,nd->nhk", self.decoder.W_O(layer), read)
            self._known[layer] = through.double()
        return self._known[layer]

    def _along(self, write: Float[Tensor, "row d_model"]) -> Float64[Tensor, " row"]:
        return torch.linalg.vecdot(write.double(), self.read.double())

    def _read_before_post_norm(self, layer: int) -> Float[Tensor, "row d_model"]:
        """The direction that counts in an attention's output, at the clean scale of its norm."""
        gain = self.decoder.post_norm_gain(layer, self.answers.end(self.clean.attn_out[layer]))
        return self.read if gain is None else self.read * gain

    def _scale(self, resid: Float[Tensor, "row d_model"]) -> Float64[Tensor, " row"]:
        rows = resid.double()
        if self.decoder.is_centred:
            rows = rows - rows.mean(dim=-1, keepdim=True)
        return (rows.square().mean(dim=-1) + self.decoder.final_eps).sqrt()

    def columns(self, unit: Unit, found: Capture) -> dict[str, np.ndarray]:
        """Everything that examples.parquet says of an intervention, one array a column."""
        after, before = self.of(found), self.writes
        readouts = self._readouts(found)
        layers = torch.tensor([layer for layer, _ in unit.members])
        heads = torch.tensor([head for _, head in unit.members])
        total = readouts["ld"] - self.readouts["ld"]
        own = (after.heads[:, layers, heads] - before.heads[:, layers, heads]).sum(1)
        others = (after.heads - before.heads).sum((1, 2)) - own
        mlps = (after.mlps - before.mlps).sum(1)
        scale = before.scale
        shares = repair.residual_shares(
            total_effect=total,
            own=_numpy(own / scale),
            heads=_numpy(others / scale),
            mlps=_numpy(mlps / scale),
        )
        players = {
            "attention": _numpy(self._attention(unit, found)),
            "mlps": _numpy(torch.stack([before.mlps.sum(1), after.mlps.sum(1)], dim=1)),
            "rest": _numpy(before.embed),
            "scale": _numpy(torch.stack([before.scale, after.scale], dim=1)),
            "constant": _numpy(self.constant),
        }
        phi = repair.shapley(**players)
        for name, order in (("first", repair.SCALE_FIRST), ("last", repair.SCALE_LAST)):
            phi[f"phi_scale_{name}"] = repair.in_order(order, **players)["scale"]
        clean = {f"{name}_clean": self.readouts[name] for name in _CLEAN}
        return {
            **readouts,
            **clean,
            "te": total,
            **shares,
            **phi,
            "sigma": _numpy(after.scale),
            "sigma_clean": _numpy(before.scale),
        }

    def _attention(self, unit: Unit, found: Capture) -> Float64[Tensor, "row 2 2 2"]:
        """What all attention writes, with [own, routing, content] clean (0) or changed (1)."""
        decoder, end = self.decoder, self.answers.end
        total = torch.zeros(len(self.read), 2, 2, 2, dtype=torch.float64, device=self.read.device)
        for layer in range(decoder.n_layers):
            if layer < unit.layer:
                total += self._along(end(self.clean.attn_write[layer]))[:, None, None, None]
                continue
            passes, own = (self.clean, found), unit.heads(layer)
            for routing, content in ((0, 0), (0, 1), (1, 0), (1, 1)):
                if routing == content:
                    z = end(passes[routing].z[layer]).clone()
                else:
                    pattern = end(passes[routing].pattern[layer].transpose(1, 2))
                    z = torch.einsum("nhk,nhkd->nhd", pattern, passes[content].value[layer])
                for which in (0, 1) if own else (0,):
                    z[:, own] = end(passes[which].z[layer])[:, own]
                    out = z.flatten(1) @ decoder.W_O(layer).flatten(0, 1)
                    bias = decoder.out_bias(layer)
                    out = out if bias is None else out + bias
                    write = self._along(decoder.attn_write(layer, out))
                    if own:
                        total[:, which, routing, content] += write
                    else:
                        total[:, :, routing, content] += write[:, None]
        return total

    def _readouts(self, found: Capture) -> dict[str, np.ndarray]:
        """What the output says, in float64 over the whole vocabulary."""
        decoder, answers = self.decoder, self.answers
        state = answers.end(found.resid_pre[-1])
        logits = decoder.unembed(decoder.final_norm(state)).double()
        logp = logits.log_softmax(dim=-1)
        clean = logp if found is self.clean else self._clean_logp
        if found is self.clean:
            self._clean_logp = logp
        target, foil = answers.target[:, None], answers.foil[:, None]
        own = logits.gather(1, target)
        lead = margin(logits, answers.target)
        amplitude = logit_scale(logits)
        values = {
            "ld": (own - logits.gather(1, foil))[:, 0],
            "p_target": logp.gather(1, target)[:, 0].exp(),
            "p_foil": logp.gather(1, foil)[:, 0].exp(),
            "rank_target": (logits > own).sum(dim=1),
            "kl": torch.linalg.vecdot(clean.exp(), clean - logp).clamp(min=0),
            "entropy": -torch.linalg.vecdot(logp.exp(), logp),
            "log_margin": lead.clamp(min=0).log(),
            "log_amplitude": amplitude.log(),
            "log_alignment": (lead / amplitude).clamp(min=0).log(),
        }
        columns = {name: _numpy(value) for name, value in values.items()}
        columns["correct"] = (columns["ld"] > 0).astype(float)
        return columns

    def depths(
        self, unit: Unit, found: Capture, sources: Mapping[str, Capture]
    ) -> Sequence[dict[str, np.ndarray]]:
        """Norms of the stream from the first changed block on: one dict of arrays a depth.

        Depth d is the input of block d, the last one the output of the last block. Before the first
        changed block all is as it was.
        """
        decoder, end = self.decoder, self.answers.end
        silent = torch.zeros_like(self.clean.resid_pre[0])  # what the unit alone takes away
        source = None if unit.source is None else sources[unit.source]
        rows = []
        for depth in range(unit.layer, decoder.n_layers + 1):
            streams = {
                "": found.resid_pre[depth],
                "_clean": self.clean.resid_pre[depth],
                "_null": self.clean.resid_pre[depth] + silent,
            }
            norms = {name: stream.norm(dim=-1).double() for name, stream in streams.items()}
            row = {"depth": np.full(len(self.read), depth)}
            row |= {f"norm_end{name}": _numpy(end(norm)) for name, norm in norms.items()}
            row |= {f"norm_all{name}": _numpy(norm.mean(dim=1)) for name, norm in norms.items()}
            row |= {f"norm_rest{name}": _numpy(norm[:, 1:].mean(1)) for name, norm in norms.items()}
            now, then = (end(streams[name]).double() for name in ("", "_clean"))
            cosine = torch.cosine_similarity(now, then, dim=-1).clamp(-1, 1)
            row["angle_end"] = _numpy(cosine.arccos())
            row["var_end"] = _numpy(now.var(dim=-1, correction=0))
            row["var_end_clean"] = _numpy(then.var(dim=-1, correction=0))
            rows.append(row)
            if depth < decoder.n_layers and unit.heads(depth):
                silent = silent + self._own_change(unit, depth, source)
        return rows

    def _own_change(
        self, unit: Unit, layer: int, source: Capture | None
    ) -> Float[Tensor, "row position d_model"]:
        """What a unit's heads in a layer add to the stream if nothing else reacts."""
        decoder, z = self.decoder, self.clean.z[layer].clone()
        for head in unit.heads(layer):
            there = None if source is None else source.z[layer][:, :, head]
            z[:, :, head] = unit.value(z[:, :, head], there)
        change = (z - self.clean.z[layer]).flatten(-2) @ decoder.W_O(layer).flatten(0, 1)
        after = decoder.attn_write(layer, self.clean.attn_out[layer] + change)
        return after - self.clean.attn_write[layer]


_CLEAN = (
    "ld", "p_target", "p_foil", "correct", "log_margin", "log_amplitude", "log_alignment",
)  # fmt: skip


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()
