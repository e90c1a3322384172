"""Where in a model something is read, which weights act there, and in which space a vector is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from allostasis.core.records import write_atomically


@dataclass(frozen=True)
class Site:
    """A place in the residual stream, as calibration, intervention and log all name it.

    Attributes:
        name: The hook point.
        norm_before: Its value has just left a norm, so that its size is the norm's gain.
        all_readers_normalise: Whatever reads it normalises it first, so that a positive scale per
            token is undone.
        feeds_unembed: It is read by the bias-free unembedding alone, so that a positive scale per
            token changes no argmax.
    """

    name: str
    norm_before: bool
    all_readers_normalise: bool
    feeds_unembed: bool


@dataclass(frozen=True)
class LayerWeights:
    """One layer's attention weights, per head, and what stands before them.

    Values are slices of the model's own parameters: a model with a fused QKV matrix cuts them out,
    and one with grouped queries repeats the shared V for each head of its group.

    Attributes:
        W_Q: Query weights.
        W_K: Key weights.
        W_V: Value weights.
        W_O: Output weights.
        gain: Gain of the norm before attention, or None where there is no norm.
    """

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    gain: Float[Tensor, " d_model"] | None = None


@dataclass(frozen=True)
class Weights:
    """What a metric may know of a model's parameters, whatever the model's class.

    Attributes:
        layers: Attention weights, one entry a layer.
        W_U: Unembedding.
        final_gain: Gain of the norm before the unembedding, or None where there is no norm.
        named: Every trainable parameter by its own name.
        groups: Parameter names by group: `embed`, `qk`, `ov`, `mlp`, `unembed`; they partition
            `named`.
    """

    layers: tuple[LayerWeights, ...]
    W_U: Float[Tensor, "d_model d_vocab"]
    final_gain: Float[Tensor, " d_model"] | None
    named: dict[str, Tensor]
    groups: dict[str, tuple[str, ...]]


class SpaceError(TypeError):
    """A vector of one space was used where one of another belongs."""


@dataclass(frozen=True)
class UnembVec:
    """Vectors of the unembedding's space: its rows, differences of rows, concepts made of them.

    Attributes:
        values: Raw coordinates, the last axis being d_model.
    """

    values: Float[Tensor, "*batch d_model"]


@dataclass(frozen=True)
class ResidVec:
    """Vectors of the residual stream's space: what the unembedding reads, decoder rows, steering.

    Attributes:
        values: Raw coordinates, the last axis being d_model.
    """

    values: Float[Tensor, "*batch d_model"]


Vec = TypeVar("Vec", UnembVec, ResidVec)
Metric = Literal["causal", "euclidean", "diagonal"]
Shrinkage = float | Literal["auto", "ledoit_wolf"]
LEAST_TOKENS = 20  # a width: with fewer tokens a covariance is shrunk
LARGEST_CONDITION = 1e8


@dataclass(frozen=True)
class CausalMetric:
    r"""The inner product under which concepts that vary apart are orthogonal.

    With Sigma the covariance of the unembedding's rows, <u, v> = u^T Sigma^-1 v for vectors of the
    unembedding and a^T Sigma b for those of the stream; whitened by Sigma^-1/2 and Sigma^1/2, both
    are the usual one, and the pairing of a stream with a row stays what it was.

    Args:
        sigma: Covariance of the rows, float64, positive definite.
        mean: Mean of the rows.
        shrinkage: What it was shrunk by; 0 where it was not.

    Raises:
        ValueError: `sigma` is not positive definite.

    Source:
        Park, Choe & Veitch (2024), The linear representation hypothesis and the geometry of large
        language models.

    Example:
        >>> import torch
        >>> metric = CausalMetric(torch.diag(torch.tensor([4.0, 1.0])).double(), torch.zeros(2))
        >>> metric.to_resid(UnembVec(torch.tensor([4.0, 0.0]))).values
        tensor([1., 0.], dtype=torch.float64)
    """

    sigma: Float[Tensor, "d_model d_model"]
    mean: Float[Tensor, " d_model"]
    shrinkage: float = 0.0

    def __post_init__(self) -> None:
        lowest = float(self._spectrum[0][0])
        if not lowest > 0:
            raise ValueError(
                f"the covariance has an eigenvalue of {lowest:.3g}, so that it has no inverse; "
                "shrink it with module.shrinkage=ledoit_wolf"
            )

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.sigma.double().cpu())
        return values, vectors

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue of the covariance."""
        values = self._spectrum[0]
        return float(values[-1] / values[0])

    def power(self, exponent: float) -> Float[Tensor, "d_model d_model"]:
        """Sigma to a power, symmetric."""
        values, vectors = self._spectrum
        return (vectors * values**exponent) @ vectors.T

    @cached_property
    def _root(self) -> Tensor:
        return self.power(0.5)

    @cached_property
    def _inverse_root(self) -> Tensor:
        return self.power(-0.5)

    def whiten_points(self, rows: UnembVec) -> Float[Tensor, "*batch d_model"]:
        """Sigma^-1/2 (row - mean): rows of the unembedding in whitened coordinates."""
        return (_values(rows, UnembVec) - self.mean.double().cpu()) @ self._inverse_root

    def whiten_unemb(self, vectors: UnembVec) -> Float[Tensor, "*batch d_model"]:
        """Sigma^-1/2 u: differences of rows, or concepts, in whitened coordinates."""
        return _values(vectors, UnembVec) @ self._inverse_root

    def whiten_resid(self, vectors: ResidVec) -> Float[Tensor, "*batch d_model"]:
        """Sigma^1/2 a: vectors of the stream in whitened coordinates."""
        return _values(vectors, ResidVec) @ self._root

    def from_white(self, white: Float[Tensor, "*batch d_model"]) -> UnembVec:
        """Sigma^1/2 w: a concept estimated in whitened coordinates, as a vector of the unembedding.

        It undoes `whiten_unemb`.
        """
        return UnembVec(white.double().cpu() @ self._root)

    def to_resid(self, vectors: UnembVec) -> ResidVec:
        """Sigma^-1 u: what is added to the stream for logits to change by <u, .>."""
        return ResidVec(_values(vectors, UnembVec) @ self._inverse_root @ self._inverse_root)

    def to_unemb(self, vectors: ResidVec) -> UnembVec:
        """Sigma a: what undoes `to_resid`."""
        return UnembVec(_values(vectors, ResidVec) @ self._root @ self._root)

    def inner(self, left: Vec, right: Vec) -> Float[Tensor, "*batch"]:
        """u^T Sigma^-1 v of two vectors of the unembedding, a^T Sigma b of two of the stream.

        Raises:
            SpaceError: They are of two spaces.
        """
        return (self._white(left) * self._white(_alike(left, right))).sum(dim=-1)

    def cosine(self, left: Vec, right: Vec) -> Float[Tensor, "*batch"]:
        """Cosine under `inner`, in [-1, 1].

        Raises:
            SpaceError: They are of two spaces.
        """
        a, b = self._white(left), self._white(_alike(left, right))
        return torch.nn.functional.cosine_similarity(a, b, dim=-1)

    def angle(self, left: Vec, right: Vec) -> Float[Tensor, "*batch"]:
        """Angle under `inner` in degrees, in [0, 180].

        Raises:
            SpaceError: They are of two spaces.
        """
        return torch.rad2deg(torch.arccos(self.cosine(left, right).clamp(-1, 1)))

    def _white(self, vectors: UnembVec | ResidVec) -> Tensor:
        is_unemb = isinstance(vectors, UnembVec)
        return self.whiten_unemb(vectors) if is_unemb else self.whiten_resid(vectors)

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        content = {
            "sigma": self.sigma.contiguous(), "mean": self.mean.contiguous(),
            "shrinkage": torch.tensor(self.shrinkage, dtype=torch.float64),
        }  # fmt: skip
        write_atomically(path, lambda file: save_file(content, file))

    @classmethod
    def load(cls, path: Path) -> CausalMetric:
        """Read what `save` wrote."""
        found = load_file(path)
        return cls(found["sigma"], found["mean"], float(found["shrinkage"]))


def _values(vectors: UnembVec | ResidVec, kind: type) -> Tensor:
    if not isinstance(vectors, kind):
        raise SpaceError(
            f"this takes {kind.__name__}, got {type(vectors).__name__}: vectors of the unembedding "
            "and of the residual stream are whitened by inverse matrices, and are never mixed"
        )
    return vectors.values.double().cpu()


def _alike(left: Vec, right: Vec) -> Vec:
    if type(left) is not type(right):
        raise SpaceError(
            f"the inner product of {type(left).__name__} and {type(right).__name__} is not "
            "defined; bring one to the other's space with to_resid or to_unemb"
        )
    return right


def causal_metric(
    rows: UnembVec, *, metric: Metric = "causal", shrinkage: Shrinkage = "auto"
) -> CausalMetric:
    """The metric of an unembedding's rows, by their covariance.

    Args:
        rows: Rows of the tokens that are kept, one a token.
        metric: `causal`; `diagonal` keeps the variances alone; `euclidean` has the unit matrix.
        shrinkage: (1 - rho) Sigma + rho tr(Sigma)/d I, so that it is relative to the rows' own
            size; `ledoit_wolf` estimates rho, `auto` does so with fewer than 20 tokens a width or
            a condition above 1e8, and is 0 otherwise.

    Raises:
        ValueError: `shrinkage` is not in [0, 1).
    """
    values = rows.values.double().cpu()
    mean = values.mean(dim=0)
    n, width = values.shape
    if metric == "euclidean":
        return CausalMetric(torch.eye(width, dtype=torch.float64), mean)
    centred = values - mean
    sigma = centred.T @ centred / n
    if metric == "diagonal":
        return CausalMetric(torch.diag(sigma.diagonal()), mean)
    if shrinkage == "auto":
        spread = torch.linalg.eigvalsh(sigma)
        is_sound = n >= LEAST_TOKENS * width and float(spread[-1]) < LARGEST_CONDITION * float(
            spread[0]
        )
        shrinkage = 0.0 if is_sound else "ledoit_wolf"
    rho = ledoit_wolf(centred) if shrinkage == "ledoit_wolf" else float(shrinkage)
    if not 0 <= rho < 1:
        raise ValueError(f"module.shrinkage={rho}: a share of the trace lies in [0, 1)")
    usual = sigma.trace() / width * torch.eye(width, dtype=torch.float64)
    return CausalMetric((1 - rho) * sigma + rho * usual, mean, rho)


def ledoit_wolf(
    centred: Float[Tensor, "row width"], gram: Float[Tensor, "n n"] | None = None
) -> float:
    """Ledoit and Wolf's shrinkage of a covariance towards its mean variance, in [0, 1].

    Args:
        centred: Rows less their mean.
        gram: Their products, with rows or with columns, where they are known.

    Source:
        Ledoit & Wolf (2004), A well-conditioned estimator for large-dimensional covariance
        matrices, J. Multivar. Anal. 88.
    """
    n, width = centred.shape
    if gram is None:
        gram = centred.T @ centred if n >= width else centred @ centred.T
    lengths = centred.square().sum(dim=1)
    mean_variance = lengths.sum() / (n * width)
    norm = gram.square().sum() / n**2
    noise = (lengths.square().sum() / n - norm) / (width * n)
    spread = norm / width - mean_variance**2
    return float(torch.clamp(noise / spread, 0, 1)) if spread > 0 else 1.0
