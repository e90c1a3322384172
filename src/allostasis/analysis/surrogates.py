"""Is a correlation of two smooth series more than two smooth series give? Descriptive only.

Neighbouring samples of a smooth curve repeat each other, so that the p-value of a correlation that
takes them for independent is invalid. Surrogates keep one series' smoothness and break its tie to
the other. On independent smooth series they still err (about 7 to 13 % at a nominal 5 %), so that
they decide no claim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from allostasis.analysis.curves import UndefinedError

SURROGATES = 999


def rank_correlation(left: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Spearman's rho and its own two-sided p, which is invalid where samples are not independent.

    Raises:
        UndefinedError: A series is constant, so that it has no ranks.

    Example:
        >>> rank_correlation(np.arange(5.0), np.arange(5.0) ** 3)[0]
        1.0
    """
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        raise UndefinedError("a series is constant, so it has no ranks")
    rho, p = stats.spearmanr(left, right)
    return float(np.asarray(rho)), float(np.asarray(p))


def phase_randomised_p(
    left: np.ndarray,
    right: np.ndarray,
    generator: np.random.Generator,
    *,
    surrogates: int = SURROGATES,
) -> float:
    """Two-sided p of Spearman's rho against phase-randomised surrogates of `left`.

    Each surrogate keeps the amplitude spectrum of the mean-removed series; phases are uniform.

    Returns:
        (1 + number of surrogates with an |rho| at least as large) / (1 + surrogates).

    Raises:
        UndefinedError: `left` is monotone: it has no stationary surrogate.

    Source:
        Theiler et al. (1992), Testing for nonlinearity in time series, Physica D 58.
    """
    _check_stationary(left)
    spectrum = np.fft.rfft(left - left.mean())
    phases = np.exp(2j * np.pi * generator.random((surrogates, len(spectrum))))
    if len(left) % 2 == 0:
        phases[:, -1] = 1  # the highest frequency of an even length has no phase
    drawn = np.fft.irfft(np.abs(spectrum) * phases, n=len(left), axis=-1)
    return _p(drawn, left, right)


def circular_shift_p(left: np.ndarray, right: np.ndarray) -> float:
    """Two-sided p of Spearman's rho against circular shifts of `left`.

    Shifts run from the first zero of the autocorrelation to the length less that.

    Raises:
        UndefinedError: `left` is monotone, or its autocorrelation has no zero in its first half.
    """
    _check_stationary(left)
    centred = left - left.mean()
    spectrum = np.fft.rfft(centred, n=2 * len(left))
    autocorrelation = np.fft.irfft(np.abs(spectrum) ** 2)[: len(left)]
    zeros = np.flatnonzero(autocorrelation <= 0)
    if not len(zeros) or 2 * zeros[0] > len(left):
        raise UndefinedError("surrogate not applicable: the series is one slow swing")
    shifts = range(zeros[0], len(left) - zeros[0] + 1)
    return _p(np.array([np.roll(left, shift) for shift in shifts]), left, right)


def _p(drawn: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    target = stats.rankdata(right)
    target -= target.mean()

    def association(series: np.ndarray) -> Any:
        ranks = stats.rankdata(series, axis=-1)
        ranks -= ranks.mean(axis=-1, keepdims=True)
        return np.abs(ranks @ target) / np.sqrt((ranks**2).sum(axis=-1))

    as_large = association(drawn) >= association(left) - 1e-9
    return float((1 + as_large.sum()) / (1 + len(drawn)))


def _check_stationary(series: np.ndarray) -> None:
    steps = np.diff(series)
    if (steps >= 0).all() or (steps <= 0).all():
        raise UndefinedError("surrogate not applicable: the series is monotone")
