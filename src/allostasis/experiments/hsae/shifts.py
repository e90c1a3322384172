"""What adding a concept to the stream does to logits: dose by dose, against random directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from allostasis.core.spaces import CausalMetric
from allostasis.models.lens import adding, unembed_input
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.corpora import GLOSSES, documents, split_of

N_CONTEXT = 16  # tokens before the position that is read, where there are so many
N_RANDOM = 8
PRECISE = 1e-9  # nats by which a gain may miss what was asked for
LONGEST = 100  # steps towards a dose
INERT = 1e-4  # logits
LARGEST = 2.0  # median lengths of the stream: a larger step is not taken


def contexts(model: LanguageModel, n: int) -> Float[Tensor, "context d_model"]:
    """What the unembedding reads at the last token of passages that train no autoencoder."""
    found: list[Tensor] = []
    for text in documents(GLOSSES):
        if len(found) == n:
            break
        if split_of(text) == "train":
            continue
        ids = model.encode(text)[:N_CONTEXT]
        read = unembed_input(model, torch.tensor([ids], device=model.decoder.device))
        found.append(read[0, -1].float().cpu())
    return torch.stack(found)


def exactness(model: LanguageModel, direction: Float[Tensor, " d_model"]) -> dict[str, float]:
    """By how much logits under the hook differ from the sum that they should be.

    Raises:
        RuntimeError: They differ, or the hook changes nothing.
    """
    ids = torch.tensor([model.encode("The word is")], device=model.decoder.device)
    clean = unembed_input(model, ids)[0]
    with torch.no_grad(), adding(model, "unembed_input", direction):
        hooked = unembed_input(model, ids)[0]
    weights = model.decoder.W_U.float()
    moved = (hooked - clean).float() @ weights
    expected = direction.float().to(weights.device) @ weights
    off, size = float((moved - expected).abs().max()), float(expected.abs().max())
    if size < INERT:
        raise RuntimeError(f"the direction changes no logit by more than {size:.1e}")
    step = torch.finfo(model.decoder.dtype).eps / torch.finfo(torch.float32).eps
    if off > INERT * step * max(1.0, size):
        raise RuntimeError(f"logits under the hook are off by {off:.1e} logits from the sum")
    return {"largest_change_of_a_logit": size, "off_the_sum": off}


@dataclass(frozen=True)
class Concept:
    """A concept whose vector is added.

    Attributes:
        synset: Its offset.
        cluster: The root above it.
        vector: In whitened coordinates.
        targets: Held-out members.
        members: All members.
        siblings: Held-out members of the other concepts.
    """

    synset: int
    cluster: int
    vector: Tensor
    targets: np.ndarray
    members: np.ndarray
    siblings: np.ndarray


class Shifts:
    """Logits at some contexts, and what a direction does to them; exact, since it is linear there.

    Args:
        model: The model; a cap on its logits is left out, so that this is of logits before it.
        metric: Says what a whitened direction is in the stream.
        resid: What the unembedding reads.
        kept: Tokens that count.
    """

    def __init__(
        self,
        model: LanguageModel,
        metric: CausalMetric,
        resid: Float[Tensor, "context d_model"],
        kept: np.ndarray,
    ) -> None:
        self.metric, self.resid = metric, resid
        self.place = np.full(int(kept.max()) + 1, -1)
        self.place[kept] = np.arange(len(kept))
        self.weights = model.decoder.W_U.detach()[:, torch.from_numpy(kept)].float().cpu()
        logits = resid @ self.weights
        bias = model.decoder.unembed_bias
        self.logits = (
            logits if bias is None else logits + bias[torch.from_numpy(kept)].float().cpu()
        )
        self.chances = self.logits.double().softmax(dim=1)
        self.reach = LARGEST * float(resid.norm(dim=1).median())

    def direction(self, white: Float[Tensor, " width"]) -> Float[Tensor, " d_model"]:
        """What is added to the stream for a whitened direction."""
        return self.metric.to_resid(self.metric.from_white(white)).values.float()

    def effect(self, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " token"]:
        """Change of every logit at dose 1, less the mean over the vocabulary."""
        change = direction @ self.weights
        return change - change.mean()

    def at(self, ids: np.ndarray) -> Tensor:
        """Columns of some tokens."""
        return torch.from_numpy(self.place[ids])

    def growth(
        self, effects: Float[Tensor, "direction token"], alpha: float
    ) -> Float[Tensor, "context direction"]:
        """Growth of the normaliser in nats: ln E[exp(alpha e)] over the next token before."""
        weights, peak = _exponentials(alpha * effects.double())
        return (self.chances @ weights.T).log() + peak

    def gains(
        self, effects: Float[Tensor, "direction token"], alpha: float, targets: Tensor
    ) -> Float[Tensor, "context direction"]:
        """Gain of the targets' mean log-probability in nats, by context."""
        return alpha * effects[:, targets].double().mean(dim=1) - self.growth(effects, alpha)

    def gain(self, effect: Float[Tensor, " token"], alpha: float, targets: Tensor) -> float:
        """Mean gain of the targets' log-probability in nats, over contexts."""
        return float(self.gains(effect[None], alpha, targets).mean())

    def leakage(
        self, effect: Float[Tensor, " token"], alpha: float, members: Tensor
    ) -> Float[Tensor, " context"]:
        """`metrics.steering_leakage` over all tokens but the members.

        KL(p || q) = ln E_p[exp(alpha e)] - alpha E_p[e], for p of the other tokens, renormalised.
        """
        others = torch.ones(len(effect), dtype=torch.float64)
        others[members] = 0
        moved = alpha * effect.double()
        moved[members] = -torch.inf
        weights, peak = _exponentials(moved[None])
        moved[members] = 0
        share, grown, mean = (self.chances @ one for one in (others, weights[0], moved))
        return ((grown / share).log() + peak - mean / share).clamp(min=0)

    def doses(
        self, effect: Float[Tensor, " token"], gains: Sequence[float], targets: Tensor, limit: float
    ) -> list[float | None]:
        """The least dose at which targets gain so many nats on average; None where none does.

        The gain is concave in the dose and 0 at none: it rises to one peak and falls behind it,
        where few tokens take all of the probability. So Newton's steps from the left never pass the
        least dose, and where there is none they pass the peak or the limit.

        Raises:
            RuntimeError: No end in `LONGEST` steps.
        """
        rise = effect.double()
        own = float(rise[targets].mean())

        def gain_and_slope(alpha: float) -> tuple[float, float]:
            weights, peak = _exponentials(alpha * rise[None])
            grown, risen = self.chances @ weights[0], self.chances @ (weights[0] * rise)
            growth = float((grown.log() + peak).mean())
            return alpha * own - growth, own - float((risen / grown).mean())

        def dose(nats: float, start: float) -> float | None:
            alpha = start
            for _ in range(LONGEST):
                gain, slope = gain_and_slope(alpha)
                if nats - gain <= PRECISE:
                    return alpha
                if slope <= 0:
                    return None
                alpha += (nats - gain) / slope
                if alpha > limit:
                    return None
            raise RuntimeError(f"no dose for a gain of {nats:g} nats in {LONGEST} steps")

        found: dict[float, float | None] = {}
        for nats in sorted(gains):  # the dose of a smaller gain is left of that of a larger one
            found[nats] = dose(nats, max((a for a in found.values() if a is not None), default=0.0))
        return [found[nats] for nats in gains]

    def within(self, effect: Tensor, alpha: float, members: Tensor) -> np.ndarray:
        """KL(before || after) in nats among a concept's own members, by context."""
        before = self.logits[:, members].log_softmax(dim=1)
        after = (self.logits[:, members] + alpha * effect[members]).log_softmax(dim=1)
        return (before.exp() * (before - after)).sum(dim=1).numpy()

    def measure(
        self,
        concept: Concept,
        *,
        alphas: Sequence[float],
        gains: Sequence[float],
        rng: np.random.Generator,
    ) -> pd.DataFrame:
        """One row a dose: changes of logits, and of ratios within the concept; random beside them.

        Random directions have the concept's length under the metric and get the same dose.
        """
        direction = self.direction(concept.vector)
        effect = self.effect(direction)
        noise = torch.from_numpy(rng.standard_normal((N_RANDOM, len(concept.vector))))
        noise *= (concept.vector.norm() / noise.norm(dim=1))[:, None]
        others = torch.stack([self.effect(self.direction(one)) for one in noise])
        targets, members, siblings = (
            self.at(ids) for ids in (concept.targets, concept.members, concept.siblings)
        )
        limit = self.reach / float(direction.norm())
        doses: list[tuple[str, float, float | None]] = [("alpha", a, a) for a in alphas]
        found = self.doses(effect, gains, targets, limit)
        doses += [("gain", nats, alpha) for nats, alpha in zip(gains, found, strict=True)]
        rows: list[dict[str, Any]] = []
        for kind, asked, alpha in doses:
            row = {"synset": concept.synset, "subtree": concept.cluster, "by": kind, "asked": asked,
                   "reached": alpha is not None}  # fmt: skip
            if alpha is not None:
                kl = self.within(effect, alpha, members)
                row |= {
                    "alpha": alpha,
                    "gain": self.gain(effect, alpha, targets),
                    "shift": alpha * float(effect[targets].mean()),
                    "shift_siblings": alpha * float(effect[siblings].mean()),
                    "shift_random": alpha * float(others[:, targets].mean()),
                    "shift_random_size": alpha * float(others[:, targets].mean(dim=1).abs().mean()),
                    "kl": float(kl.mean()),
                    "kl_median": float(np.median(kl)),
                    "kl_below_0.2": float((kl < 0.2).mean()),
                    "kl_random": float(
                        np.mean([self.within(one, alpha, members).mean() for one in others])
                    ),
                }
            rows.append(row)
        return pd.DataFrame(rows)


def _exponentials(
    values: Float[Tensor, "direction token"],
) -> tuple[Float[Tensor, "direction token"], Float[Tensor, " direction"]]:
    """exp(value - largest), and the largest, of each direction."""
    peak = values.amax(dim=1)
    return (values - peak[:, None]).exp(), peak


def proof_direction(metric: CausalMetric) -> Float[Tensor, " d_model"]:
    """A direction for `exactness`: of unit length in whitened coordinates."""
    white = torch.zeros(len(metric.mean), dtype=torch.float64)
    white[0] = 1
    return metric.to_resid(metric.from_white(white)).values.float()
