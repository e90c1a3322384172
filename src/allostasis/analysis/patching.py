"""What patches give back or take away, as shares of the distance between two runs.

Denoising writes clean values into the corrupt run, noising corrupt values into the clean one. Both
are measured on the same prompts, so that their difference is paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from allostasis.analysis import impact
from allostasis.analysis import statistics as st
from allostasis.analysis.curves import UndefinedError

Direction = Literal["denoise", "noise"]
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")


@dataclass(frozen=True)
class Recovered:
    """A ratio of sums over prompts of each intervention, with its interval.

    Attributes:
        value: One an intervention.
        low: Lower limits; NaN where there is none.
        high: Upper limits.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def moved(direction: Direction, patched: np.ndarray, untouched: np.ndarray) -> np.ndarray:
    """By how much a patch moves the logit difference towards the run that its values come from.

    Args:
        direction: `denoise`: LD(patched) - LD(corrupt). `noise`: LD(clean) - LD(patched).
        patched: Logit differences of the patched run, [..., prompt].
        untouched: Those of the run that is patched, [prompt].
    """
    return patched - untouched if direction == "denoise" else untouched - patched


def gate(apart: np.ndarray, clusters: Sequence[str]) -> str:
    """Why no share of a distance can be told; empty where there is a distance.

    Args:
        apart: LD(clean) - LD(corrupt), one a prompt.
        clusters: The cluster of each.
    """
    if not len(apart):
        return "no prompt of a competent cell is there"
    (low,), _ = impact.intervals(impact.clustered(apart[None], clusters))
    mean = float(apart.mean())
    if not np.isfinite(low):
        return f"LD(clean) - LD(corrupt) is {mean:.3g} logit in all {len(set(clusters))} clusters"
    if low <= 0:
        return (
            f"LD(clean) - LD(corrupt) is {mean:.3g} logit with a lower limit of {low:.3g}: the "
            "model does not tell the two prompts of a pair apart"
        )
    return ""


def recovery(moved: np.ndarray, apart: np.ndarray, clusters: Sequence[str]) -> Recovered:
    """Share of the distance between the runs that each patch covers.

    sum over prompts of `moved` / sum over prompts of LD(clean) - LD(corrupt), with Fieller's
    interval over clusters. 1: the patched run is where its values come from; 0: nothing moved. Not
    clipped; never a mean of ratios.

    Args:
        moved: [intervention, prompt], towards the source.
        apart: LD(clean) - LD(corrupt), [prompt].
        clusters: The cluster of each prompt.
    """
    above = impact.clustered(moved, clusters).sums
    below = impact.clustered(apart[None], clusters).sums[0]
    value = above.sum(axis=1) / below.sum()
    low, high = np.full((2, len(value)), np.nan)
    for index, row in enumerate(above):
        if np.ptp(row - value[index] * below) <= 1e-9 * np.abs(below).max():
            continue  # all clusters have one ratio
        try:
            found = st.fieller(row, below)
        except UndefinedError:
            continue
        low[index] = np.nan if found.low is None else found.low
        high[index] = np.nan if found.high is None else found.high
    return Recovered(value, low, high)


def asymmetry(
    denoised: np.ndarray, noised: np.ndarray, apart: np.ndarray, clusters: Sequence[str]
) -> Recovered:
    """Denoising recovery less noising recovery of each patch, paired prompt by prompt.

    Both have one denominator, so that the difference is itself a ratio of sums.

    Args:
        denoised: `moved` of denoising, [intervention, prompt].
        noised: `moved` of noising, likewise.
        apart: LD(clean) - LD(corrupt), [prompt].
        clusters: The cluster of each prompt.
    """
    return recovery(denoised - noised, apart, clusters)
