"""Clamps: the residual stream at one site set to a reference's size, spread or class structure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from allostasis.core.spaces import Site

Kind = Literal["none", "norm", "spread", "class", "placebo"]
Statistic = Literal["token", "batch"]
Phase = Literal["train_and_eval", "eval_only"]
Labels = Literal["true", "shuffled"]
Source = Literal["reference", "own"]


class InertError(ValueError):
    """An intervention that the network undoes, so that an arm with it is a second control."""


Clamp = Callable[[Tensor], Tensor]
"""A function of the stream at a site, [sequence, position, d_model]."""


@dataclass(frozen=True)
class NormClamp:
    """The naive clamp: every token's vector gets the reference's length; A and sigma^2 both go.

    r' = r N / ||r||; in the batch form one factor for all: r' = r N / mean ||r||.

    Attributes:
        norm: N, in residual units.
        statistic: `token`, or `batch`, which depends on what stands beside a token.
    """

    norm: float
    statistic: Statistic = "token"

    def __call__(
        self, resid: Float[Tensor, "sequence position d_model"]
    ) -> Float[Tensor, "sequence position d_model"]:
        """The clamped stream."""
        length = resid.norm(dim=-1, keepdim=True)
        if self.statistic == "batch":
            length = length.mean()
        return resid * (self.norm / length)


@dataclass(frozen=True)
class SpreadClamp:
    """The mean-preserving clamp: the spread is set, the mean is kept.

    Token form: r' = m + (r - m) s / sd(r), with m and sd over a token's features. Batch form: m is
    the mean vector over all tokens and sd the one standard deviation of all that is left.

    Attributes:
        sd: s, in residual units.
        statistic: `token`, or `batch`, which depends on what stands beside a token.
    """

    sd: float
    statistic: Statistic = "token"

    def __call__(
        self, resid: Float[Tensor, "sequence position d_model"]
    ) -> Float[Tensor, "sequence position d_model"]:
        """The clamped stream."""
        if self.statistic == "batch":
            mean = resid.mean(dim=(0, 1))
            spread = (resid - mean).square().mean().sqrt()
        else:
            mean = resid.mean(dim=-1, keepdim=True)
            spread = resid.std(dim=-1, keepdim=True, correction=0)
        return mean + (resid - mean) * (self.sd / spread)


class ClassClamp:
    """Sets variance between and within classes apart, knowing each token's class.

    r' = mu + b (mu_y - mu) + w (r - mu_y)

    At fixed noise behind it, b multiplies d' by b and w by 1 / w; b = w = 1 changes nothing. The
    class enters the forward pass: what a clamp gives away of the answer is measured by the same
    clamp under shuffled classes.

    Args:
        means: mu_y, from a calibration split.
        mean: mu, of all its tokens.
        between: b.
        within: w.
    """

    def __init__(
        self,
        *,
        means: Float[Tensor, "class d_model"],
        mean: Float[Tensor, " d_model"],
        between: float,
        within: float,
    ) -> None:
        self.means, self.mean = means, mean
        self.between, self.within = between, within
        self.classes: Int64[Tensor, "sequence position"] | None = None

    def __call__(
        self, resid: Float[Tensor, "sequence position d_model"]
    ) -> Float[Tensor, "sequence position d_model"]:
        """The clamped stream; tokens of class -1 stay as they are.

        Raises:
            RuntimeError: `classes` was not set to those of this batch.
        """
        classes = self.classes
        if classes is None or classes.shape != resid.shape[:-1]:
            raise RuntimeError("a class clamp needs `classes` of the batch before each forward")
        own = self.means[classes.clamp(min=0)]
        # written as a change, so that b = w = 1 adds exactly nothing
        change = (self.between - self.within) * own + (1 - self.between) * self.mean
        change = change + (self.within - 1) * resid
        return torch.where(classes[..., None] >= 0, resid + change, resid)


@dataclass(frozen=True)
class PlaceboClamp:
    """The naive clamp's change of length, along directions that the output hardly reads.

    r' = r + a u, u the token's own direction within the span, with ||r'|| = N where a step along u
    reaches it, else as near as it comes.

    Attributes:
        norm: N, in residual units.
        directions: Orthonormal, from `quiet_directions`.
    """

    norm: float
    directions: Float[Tensor, "d_model quiet"]

    def __call__(
        self, resid: Float[Tensor, "sequence position d_model"]
    ) -> Float[Tensor, "sequence position d_model"]:
        """The clamped stream."""
        inside = resid @ self.directions
        along = inside.norm(dim=-1, keepdim=True)
        first = torch.zeros_like(inside)
        first[..., 0] = 1.0
        unit = torch.where(along > 0, inside / along.clamp(min=1e-30), first) @ self.directions.T
        room = along.square() + self.norm**2 - resid.square().sum(dim=-1, keepdim=True)
        return resid + (room.clamp(min=0).sqrt() - along) * unit


def quiet_directions(
    sensitivity: Float64[Tensor, "d_model d_model"], *, share: float = 0.25
) -> Float64[Tensor, "d_model quiet"]:
    """The directions at a site to which the output is least sensitive.

    Lowest eigenvectors of the mean of J^T J, J the derivative of the logits by the stream.

    Args:
        sensitivity: The mean of J^T J.
        share: Of the directions, how many are called quiet.

    Returns:
        Orthonormal columns, at least one; no direction is better.

    Source:
        Eigenvectors of the Gauss-Newton matrix with the identity in place of the loss's curvature.

    Example:
        >>> quiet_directions(torch.diag(torch.tensor([9.0, 0.1])).double(), share=0.5).abs().T
        tensor([[0., 1.]], dtype=torch.float64)
    """
    _, vectors = torch.linalg.eigh(sensitivity)
    return vectors[:, : max(1, int(share * len(sensitivity)))]


class Plan:
    """What an arm clamps, where, when and to what: the block `module.clamp`.

    Args:
        kind: `none`; `norm`, the naive clamp; `spread`, the mean-preserving one; `class`;
            `placebo`.
        site: Hook point of calibration, clamp and log.
        statistic: `token`, or the documents' `batch` form, which is evaluated in batches of the
            size that was trained with and labelled `batch_dependent`.
        phase: `train_and_eval`, or `eval_only`: on the trained model of the arm without the clamp.
        target: The reference, or `reference*<factor>`: no number of another run stands here. Of
            `class` also `own*<factor>`: that much of the RMS which the trained model has itself,
            so that sqrt(1/2) halves its variance.
        between: Of `class`: whether variance between classes is set.
        within: Of `class`: whether variance within classes is set.
        labels: Of `class`: `true`, or `shuffled` among tokens.

    Raises:
        ValueError: The target is written otherwise or does not fit the kind, or a class clamp is
            to be trained under.
    """

    def __init__(
        self,
        *,
        kind: Kind = "none",
        site: str = "blocks.0.hook_resid_mid",
        statistic: Statistic = "token",
        phase: Phase = "train_and_eval",
        target: str = "reference",
        between: bool = False,
        within: bool = False,
        labels: Labels = "true",
    ) -> None:
        self.kind: Kind = kind
        self.statistic: Statistic = statistic
        self.site, self.phase = site, phase
        self.source, self.factor = parse_target(target)
        self.between, self.within, self.labels = between, within, labels
        if kind in {"class", "placebo"} and phase != "eval_only":
            raise ValueError(
                f"clamp.kind={kind} needs clamp.phase=eval_only: it is calibrated on a trained "
                "model" + (", and would hand the answer to one in training" * (kind == "class"))
            )
        if self.source == "own" and kind != "class":
            raise ValueError(
                f"clamp.target={target!r} fits clamp.kind=class alone, not {kind}: other clamps "
                "set what the control has"
            )


def parse_target(target: str) -> tuple[Source, Annotated[float, Gt(0)]]:
    """Whose statistic a clamp sets, and the factor.

    Raises:
        ValueError: It is neither: a number would be taken from somewhere else.

    Example:
        >>> parse_target("reference"), parse_target("reference*0.6"), parse_target("own*0.5")
        (('reference', 1.0), ('reference', 0.6), ('own', 0.5))
    """
    name, star, factor = target.replace(" ", "").partition("*")
    try:
        value = float(factor) if star else 1.0
    except ValueError:
        value = -1.0
    if value > 0 and (name == "reference" or (name == "own" and star)):
        return ("own" if name == "own" else "reference"), value
    raise ValueError(
        f"clamp.target={target!r}: allowed are 'reference' and 'reference*<factor>', and for "
        "clamp.kind=class 'own*<factor>', factor > 0. The reference is measured on the control "
        "arm of the same seed, own on the model that is clamped; a number here would be of no run."
    )


def site_labels(
    site: str, sites: dict[str, Site], *, kind: Kind, norm: str, statistic: Statistic = "token"
) -> tuple[str, ...]:
    """What a site does to a clamp of a kind, and whether it depends on a token's batch.

    Args:
        site: The hook point.
        sites: What the model says of its own.
        kind: Of the clamp.
        norm: The model's norm.
        statistic: Of the clamp.

    Returns:
        Labels, none where size is free and a token's own: `inert` where every reader normalises
        what the clamp does away; `pinned` at a norm's output; `argmax_inert` where the bias-free
        unembedding alone reads it and a positive scale changes no prediction; `batch_dependent`.

    Raises:
        ValueError: The model has no such site.
    """
    if site not in sites:
        raise ValueError(
            f"clamp.site={site}: the model has no such place in its stream; it has "
            f"{', '.join(sites)}"
        )
    here = sites[site]
    # a LayerNorm takes away a token's own mean, no norm the mean vector that the batch form keeps
    undone = kind == "norm" or (kind == "spread" and statistic == "token" and norm != "rms")
    labels = {
        "inert": here.all_readers_normalise and undone,
        "pinned": here.norm_before,
        "argmax_inert": here.feeds_unembed and kind == "norm",
        "batch_dependent": statistic == "batch",
    }
    return tuple(label for label, holds in labels.items() if holds)


def check_site(
    site: str, sites: dict[str, Site], *, kind: Kind, norm: str, statistic: Statistic = "token"
) -> tuple[str, ...]:
    """`site_labels` of a clamp that may stand there.

    Raises:
        ValueError: The model has no such site.
        InertError: Every reader normalises what the clamp does away.
    """
    labels = site_labels(site, sites, kind=kind, norm=norm, statistic=statistic)
    if "inert" in labels:
        raise InertError(
            f"clamp.kind={kind} at {site} is inert: whatever reads that site passes it through a "
            f"{'RMSNorm' if norm == 'rms' else 'LayerNorm'} first, which undoes a positive scale "
            "per token (LN(c r) = LN(r)). Clamp where the stream itself is read, for example at "
            f"{_free(sites)}; allow_inert=true runs it all the same, labelled inert."
        )
    return labels


def _free(sites: dict[str, Site]) -> str:
    good = (
        s.name for s in sites.values()
        if not (s.norm_before or s.all_readers_normalise or s.feeds_unembed)
    )  # fmt: skip
    return next((name for name in good if name.endswith("resid_mid")), "no site of this model")


class Attached:
    """A clamp as a hook that can be switched off and counts its calls."""

    def __init__(self, clamp: Clamp) -> None:
        self.clamp = clamp
        self.is_on, self.calls = True, 0

    def __call__(self, tensor: Tensor, *, hook: Any) -> Tensor | None:
        """TransformerLens's signature of a hook; None leaves the value as it is."""
        del hook
        self.calls += 1
        return self.clamp(tensor) if self.is_on else None
