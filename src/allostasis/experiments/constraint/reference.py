"""What a clamp takes from other runs: size and class structure of their stream at one site."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from scipy.special import gammainccinv
from torch import Tensor

from allostasis.engines.sequence_training import streams
from allostasis.models.toy_transformer import ToyTransformer
from allostasis.tasks.sequences import Sequences

AT_ONCE = 64  # sequences
FEWEST = 8  # tokens of a class, under which its mean is not known
PROBES = 64  # random directions of the output
MISSED = 0.001  # how often a split of the size that is advised may still lack a class


@dataclass(frozen=True)
class Reference:
    """The stream of one model at one site, over a calibration split.

    Attributes:
        site: Hook point.
        n_tokens: Tokens that were read.
        norm_mean: Mean length of a token's vector.
        norm_sd: Standard deviation of it.
        feature_sd_mean: Mean standard deviation over a token's features (no Bessel).
        overall_sd: Standard deviation of all entries around the mean vector.
        mean: The mean vector.
        class_means: Mean vector of each class over the headline positions; then `mean` is over
            those too.
        between: Root mean square of ||mu_y - mu|| over those tokens.
        within: Root mean square of ||r - mu_y|| over those tokens.
    """

    site: str
    n_tokens: int
    norm_mean: float
    norm_sd: float
    feature_sd_mean: float
    overall_sd: float
    mean: Float[Tensor, " d_model"]
    class_means: Float[Tensor, "class d_model"] | None = None
    between: float | None = None
    within: float | None = None

    def told(self) -> dict[str, Any]:
        """For run.json."""
        numbers = {name: value for name, value in vars(self).items() if name != "class_means"}
        return numbers | {"mean": self.mean.tolist()}


class ClassMeans(NamedTuple):
    """Class structure of a stream, where it was asked for."""

    means: Float64[Tensor, "class d_model"] | None = None
    between: float | None = None
    within: float | None = None


@torch.no_grad()
def measure(
    model: ToyTransformer, sequences: Sequences, site: str, *, n_classes: int | None = None
) -> Reference:
    """Read a model's stream at a site.

    Args:
        model: With its weights, and without hooks.
        sequences: The calibration split.
        site: Hook point.
        n_classes: Classes of the targets at headline positions, each with enough tokens for a mean
            (`check_classes`); None: classes are not wanted.
    """
    parts = list(_read(model, sequences, site))
    tokens = torch.cat([values.flatten(0, 1) for values, _ in parts]).double()
    norms, mean = tokens.norm(dim=-1), tokens.mean(dim=0)
    spread = tokens.std(dim=-1, correction=0)
    mean_of_headline, found = mean, ClassMeans()
    if n_classes is not None:
        rows = torch.cat([v[p.groups[p.headline]] for v, p in parts]).double()
        labels = torch.cat([p.targets[p.groups[p.headline]] for _, p in parts])
        mean_of_headline, found = rows.mean(dim=0), _classes(rows, labels, n_classes)
    dtype = model.W_U.dtype
    return Reference(
        site=site,
        n_tokens=len(tokens),
        norm_mean=float(norms.mean()),
        norm_sd=float(norms.std()),
        feature_sd_mean=float(spread.mean()),
        overall_sd=float((tokens - mean).square().mean().sqrt()),
        mean=mean_of_headline.to(dtype),
        class_means=None if found.means is None else found.means.to(dtype),
        between=found.between,
        within=found.within,
    )


def check_classes(sequences: Sequences, n_classes: int) -> None:
    """Refuse a calibration split in which a class has too few tokens for a mean.

    Raises:
        ValueError: It has; the message says about how many tokens would do.
    """
    counted = sequences.groups[sequences.headline]
    labels = sequences.targets[counted]
    counts = torch.bincount(labels, minlength=n_classes)
    few = int((counts < FEWEST).sum())
    if few == 0:
        return
    raise ValueError(
        f"{few} of {n_classes} classes have fewer than {FEWEST} of the {sequences.n_tokens} tokens "
        f"of the calibration split, and a class needs {FEWEST} for a mean; about "
        f"{_tokens_for(sequences, n_classes)} tokens would do (task.n_calibration, or "
        "task.train_frac where the split is the training set). Or take fewer classes: "
        "preset=quick, a smaller task.vocab_size or task=modular_sequences"
    )


def _tokens_for(sequences: Sequences, n_classes: int) -> int:
    """Tokens of a split in which every class likely has FEWEST.

    A sequence repeats what it draws, so that draws are counted, not tokens: n draws fall on a class
    Poisson(n / n_classes) times, and each brings at least as many tokens as the poorest one here.
    """
    counted = sequences.groups[sequences.headline]
    sequence = torch.arange(len(sequences))[:, None].expand_as(counted)[counted]
    _, tokens = torch.unique(sequence * n_classes + sequences.targets[counted], return_counts=True)
    draws = math.ceil(FEWEST / int(tokens.min()))
    # so many draws a class that P(Poisson < draws) = MISSED / n_classes
    a_class = float(gammainccinv(draws, MISSED / n_classes))
    return math.ceil(a_class * n_classes * sequences.n_tokens / len(tokens))


def _read(
    model: ToyTransformer, sequences: Sequences, site: str
) -> Iterator[tuple[Tensor, Sequences]]:
    for begin in range(0, len(sequences), AT_ONCE):
        part = sequences.part(slice(begin, begin + AT_ONCE)).to(model.W_U.device)
        yield streams(model, part.tokens, [site])[site], part


def _classes(
    rows: Float64[Tensor, "token d_model"], labels: Int64[Tensor, " token"], n_classes: int
) -> ClassMeans:
    counts = torch.bincount(labels, minlength=n_classes)
    sums = torch.zeros(n_classes, rows.shape[1], dtype=rows.dtype, device=rows.device)
    means = sums.index_add_(0, labels, rows) / counts[:, None]
    shift = means - rows.mean(dim=0)
    return ClassMeans(
        means,
        between=float(shift[labels].square().sum(dim=-1).mean().sqrt()),
        within=float((rows - means[labels]).square().sum(dim=-1).mean().sqrt()),
    )


def sensitivity(
    model: ToyTransformer, sequences: Sequences, site: str, *, seed: int
) -> Float64[Tensor, "d_model d_model"]:
    """Mean of J^T J at a site, J the derivative of all later logits by a token's stream.

    Estimated as the mean of g g^T over tokens and PROBES passes, g = J^T v, v ~ N(0, I).

    Args:
        model: With its weights.
        sequences: The calibration split; the first AT_ONCE are read.
        site: Hook point.
        seed: Draws v.

    Source:
        Hutchinson (1989), A stochastic estimator of the trace, entry by entry.
    """
    generator = torch.Generator().manual_seed(seed)
    part = sequences.part(slice(AT_ONCE)).to(model.W_U.device)
    kept: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> Tensor:
        del hook
        kept.append(value.detach().requires_grad_())
        return kept[-1]

    with torch.enable_grad(), model.hooks(fwd_hooks=[(site, keep)]):
        logits = model(part.tokens)
    (value,) = kept
    total = torch.zeros(model.d_model, model.d_model, dtype=torch.float64, device=value.device)
    for _ in range(PROBES):
        direction = torch.randn(logits.shape, generator=generator).to(logits)
        (gradient,) = torch.autograd.grad(logits, value, direction, retain_graph=True)
        rows = gradient.flatten(0, 1).double()
        total += rows.T @ rows / len(rows)
    return total / PROBES
