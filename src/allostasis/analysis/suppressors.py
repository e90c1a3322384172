"""Which heads are suppressors, by what their ablation does, and how much more they vary.

Finding and measuring never share a sequence: heads are found by their effects on one split, and
their variance is read on another. The ratio of variances gets one interval, by resampling whole
sequences; two intervals of two means say nothing about a ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from allostasis.analysis.curves import UndefinedError
from allostasis.analysis.intervals import Interval
from allostasis.analysis.resampling import Bootstrap

FLIPS = 19_999
DRAWS = 2_000
OUTER = 200
BLOCK = 2_000  # flips or draws held at once


@dataclass(frozen=True)
class Detection:
    """What a scan over heads found.

    Attributes:
        effect: Mean over sequences of loss clean - loss ablated, nats a token.
        p: One-sided, by flipping the signs of whole sequences.
        q: Adjusted by Benjamini and Hochberg over all heads that were tested.
        selected: Which heads are suppressors.
    """

    effect: Float[np.ndarray, " head"]
    p: Float[np.ndarray, " head"]
    q: Float[np.ndarray, " head"]
    selected: Bool[np.ndarray, " head"]

    @property
    def count(self) -> int:
        """How many were found."""
        return int(self.selected.sum())


def sign_flip_above(
    effects: Float[np.ndarray, "sequence head"],
    generator: np.random.Generator,
    *,
    flips: int = FLIPS,
) -> Float[np.ndarray, " head"]:
    """One-sided p of "the mean effect is at most 0", head by head.

    The signs of whole sequences are flipped, for all heads at once, so that what heads share stays
    shared. The observed signs count as one of the flips, so that no p is 0.

    Args:
        effects: loss clean - loss ablated of each sequence.
        generator: Draws the signs.
        flips: How many.

    Returns:
        In (0, 1]; low: ablating the head lowers the loss.

    Source:
        Phipson & Smyth (2010), Permutation p-values should never be zero, Stat. Appl. Genet. 9.

    Example:
        >>> effects = np.array([[1.0, -1.0]] * 12)
        >>> sign_flip_above(effects, np.random.default_rng(0)).round(2)
        array([0., 1.])
    """
    observed = effects.sum(axis=0)
    # sums of equal terms in another order differ in the last digits
    slack = 1e-12 * np.abs(effects).sum(axis=0)
    reached = np.ones(effects.shape[1])
    for begin in range(0, flips, BLOCK):
        signs = generator.choice([-1.0, 1.0], size=(min(BLOCK, flips - begin), len(effects)))
        reached += (signs @ effects >= observed - slack).sum(axis=0)
    return reached / (flips + 1)


def detect(
    effects: Float[np.ndarray, "sequence head"],
    generator: np.random.Generator,
    *,
    q: float = 0.05,
    min_effect: float = 0.005,
    flips: int = FLIPS,
) -> Detection:
    """Find the heads whose ablation lowers the loss.

    Args:
        effects: loss clean - loss ablated of each sequence, of every head that was looked at.
        generator: Draws the signs of the test.
        q: False discovery rate among all of them.
        min_effect: Least mean effect that matters, in nats a token.
        flips: Sign flips of the test.
    """
    mean = effects.mean(axis=0)
    p = sign_flip_above(effects, generator, flips=flips)
    adjusted = np.asarray(stats.false_discovery_control(p, method="bh"))
    return Detection(mean, p, adjusted, (adjusted <= q) & (mean >= min_effect))


@dataclass(frozen=True)
class Energies:
    """How far heads' writes lie from their means, added up over the tokens of each sequence.

    With N tokens in all, V_h = tr Cov(write of h) / d_model = sum over sequences / (N d_model).

    Attributes:
        values: sum over tokens of ||w - mean w||^2 / d_model.
        tokens: Tokens of each sequence.
        layers: The layer of each head.
    """

    values: Float[np.ndarray, "sequence head"]
    tokens: Float[np.ndarray, " sequence"]
    layers: Int[np.ndarray, " head"]

    @cached_property
    def variances(self) -> Float[np.ndarray, " head"]:
        """V_h of each head, in squared residual units."""
        return self.values.sum(axis=0) / self.tokens.sum()

    def compared(
        self, suppressors: Bool[np.ndarray, " head"], clean: Bool[np.ndarray, " head"] | None = None
    ) -> Comparison:
        """Suppressors against the other heads of their layers.

        Args:
            suppressors: Which heads were found.
            clean: Which are the others; None: all that are not suppressors.

        Raises:
            UndefinedError: None was found, or no layer holds heads of both kinds.
        """
        if not suppressors.any():
            raise UndefinedError(f"none found: 0 of {len(suppressors)} heads selected")
        others = ~suppressors if clean is None else clean
        above, below, layers = [], [], []
        for layer in np.unique(self.layers[suppressors]):
            here = self.layers == layer
            if not (here & others).any():
                continue
            above.append(self.values[:, here & suppressors].mean(axis=1))
            below.append(self.values[:, here & others].mean(axis=1))
            layers.append(int(layer))
        if not layers:
            raise UndefinedError("every head of the suppressors' layers is one, so none is clean")
        return Comparison(np.stack(above, axis=1), np.stack(below, axis=1), tuple(layers))


@dataclass(frozen=True)
class Comparison:
    """Energies of suppressors and of clean heads, sequence by sequence, layer by layer.

    Attributes:
        above: Mean over suppressors.
        below: Mean over clean heads.
        layers: The layers that hold both.
    """

    above: Float[np.ndarray, "sequence layer"]
    below: Float[np.ndarray, "sequence layer"]
    layers: tuple[int, ...]

    @property
    def by_layer(self) -> Float[np.ndarray, " layer"]:
        """Mean variance of suppressors over that of clean heads, layer by layer."""
        return self.above.sum(axis=0) / self.below.sum(axis=0)

    @property
    def ratio(self) -> float:
        """E1: the geometric mean over layers."""
        return float(np.exp(np.log(self.by_layer).mean()))

    def bootstrap(self, generator: np.random.Generator, *, draws: int = DRAWS) -> GeometricRatio:
        """The bootstrap of log E1 over sequences."""
        return GeometricRatio(self.above, self.below, generator, draws)

    def interval(
        self, generator: np.random.Generator, *, level: float = 0.95, draws: int = DRAWS
    ) -> Interval:
        """BCa interval of E1."""
        return exponential(self.bootstrap(generator, draws=draws).interval(level))


class GeometricRatio(Bootstrap):
    """The BCa bootstrap of the mean over layers of the log ratio of two sums over sequences.

    Args:
        above: Numerators.
        below: Denominators.
        generator: Where randomness comes from.
        resamples: How many.

    Raises:
        UndefinedError: There are fewer than two sequences, or a sum is 0.
    """

    def __init__(
        self,
        above: Float[np.ndarray, "sequence layer"],
        below: Float[np.ndarray, "sequence layer"],
        generator: np.random.Generator,
        resamples: int = DRAWS,
    ) -> None:
        super().__init__((above, below), _log_ratio, generator, resamples)
        if len(above) < 2:
            raise UndefinedError("one sequence has no interval")
        if not (above.sum(axis=0) > 0).all() or not (below.sum(axis=0) > 0).all():
            raise UndefinedError("logarithm of a variance of 0")

    @cached_property
    def estimate(self) -> float:
        """The statistic of all sequences."""
        above, below = self.columns
        return float(_log_ratio(above.sum(axis=0), below.sum(axis=0)))

    def _resampled(self) -> np.ndarray:
        above, below = self.columns
        n, found = len(above), []
        for begin in range(0, self.resamples, BLOCK):
            size = min(BLOCK, self.resamples - begin)
            counts = self.generator.multinomial(n, np.full(n, 1 / n), size=size).astype(float)
            found.append(_log_ratio(counts @ above, counts @ below))
        return np.concatenate(found)

    def _left_out(self) -> np.ndarray:
        above, below = self.columns
        return _log_ratio(above.sum(axis=0) - above, below.sum(axis=0) - below)


def _log_ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.asarray(np.log(above / below).mean(axis=axis))


def exponential(interval: Interval) -> Interval:
    """An interval of a logarithm as one of the number itself."""
    assert interval.low is not None
    assert interval.high is not None
    low, high = float(np.exp(interval.low)), float(np.exp(interval.high))
    return Interval(low, high, interval.level, f"{interval.method}, on the log ratio")


@dataclass(frozen=True)
class Reselected:
    """What becomes of the ratio where selection, too, is repeated on resampled sequences.

    Attributes:
        low: 2.5 % quantile of the ratio over draws in which something was found.
        high: 97.5 % quantile.
        found: Share of draws in which something was found.
        draws: How many there were.
    """

    low: float
    high: float
    found: float
    draws: int


def reselected(
    effects: Float[np.ndarray, "sequence head"],
    energies: Energies,
    generator: np.random.Generator,
    *,
    q: float = 0.05,
    min_effect: float = 0.005,
    draws: int = OUTER,
) -> Reselected:
    """Resample both splits, select anew, and read the ratio: a sensitivity, not an interval.

    A sequence drawn twice counts twice in the test, which makes it a little too eager.

    Args:
        effects: On the split that heads are found on.
        energies: On the split that variance is read on.
        generator: Where randomness comes from.
        q: As for `detect`.
        min_effect: As for `detect`.
        draws: Outer resamples.

    Raises:
        UndefinedError: No draw found anything.
    """
    ratios = []
    n, m = len(effects), len(energies.values)
    for _ in range(draws):
        again = effects[generator.integers(n, size=n)]
        found = detect(again, generator, q=q, min_effect=min_effect, flips=BLOCK - 1)
        rows = generator.integers(m, size=m)
        drawn = Energies(energies.values[rows], energies.tokens[rows], energies.layers)
        try:
            ratios.append(drawn.compared(found.selected).ratio)
        except UndefinedError:
            continue
    if not ratios:
        raise UndefinedError(f"none found in any of {draws} resamples")
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Reselected(float(low), float(high), len(ratios) / draws, draws)


def null_selection_rate(
    effects: Float[np.ndarray, "sequence head"],
    generator: np.random.Generator,
    *,
    draws: int = 200,
    q: float = 0.05,
    min_effect: float = 0.005,
) -> float:
    """How often anything is selected once the signs of sequences are random.

    Args:
        effects: Of real heads.
        generator: Draws the signs.
        draws: Data sets.
        q: As for `detect`.
        min_effect: As for `detect`.

    Returns:
        Share in [0, 1]; above q by more than two standard errors: the test is too eager.
    """
    selected = 0
    for _ in range(draws):
        signs = generator.choice([-1.0, 1.0], size=(len(effects), 1))
        found = detect(signs * effects, generator, q=q, min_effect=min_effect, flips=BLOCK - 1)
        selected += found.count > 0
    return selected / draws


def simulated_energies(
    generator: np.random.Generator,
    *,
    n_sequences: int = 96,
    n_tokens: int = 32,
    n_heads: int = 4,
    between: float = 0.3,
) -> Energies:
    """Energies of heads of one layer with equal variances, whose tokens cluster in sequences.

    A token's energy is exponential around the level of its sequence, which is log-normal, shared
    by half between the heads.

    Args:
        generator: Where randomness comes from.
        n_sequences: Sequences.
        n_tokens: Tokens of each.
        n_heads: Heads.
        between: Standard deviation of a sequence's log level.
    """
    shape = (n_sequences, n_heads)
    shared = generator.normal(0, between * np.sqrt(0.5), size=(n_sequences, 1))
    level = np.exp(shared + generator.normal(0, between * np.sqrt(0.5), size=shape))
    values = level * generator.gamma(n_tokens, size=shape)
    tokens = np.full(n_sequences, float(n_tokens))
    return Energies(values, tokens, np.zeros(n_heads, dtype=int))


def relabelled_coverage(generator: np.random.Generator, *, n_sets: int = 1_000) -> float:
    """How often the interval of a clean head, called a suppressor at random, covers 1.

    Args:
        generator: Where randomness comes from.
        n_sets: Simulated data sets.

    Returns:
        Share in [0, 1]; 0.95: as nominal.
    """
    covered = 0
    for _ in range(n_sets):
        energies = simulated_energies(generator)
        chosen = np.arange(len(energies.layers)) == generator.integers(len(energies.layers))
        interval = energies.compared(chosen).interval(generator)
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 1 <= interval.high
    return covered / n_sets
