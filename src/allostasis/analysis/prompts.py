"""One number a prompt, or a pair for a ratio: what a claim with `unit: cluster` can be about.

A function whose first parameter is `examples` reads rows of examples.parquet, one whose first is
`depths` reads rows of depths.parquet: one a prompt and intervention, at one depth. It returns a
column, or two, the numerator and the denominator of a ratio of sums; a prompt that has no value is
NaN and is left out.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from allostasis.analysis.curves import UndefinedError

Column = np.ndarray
Pair = tuple[np.ndarray, np.ndarray]

REPAIRERS = ("routing", "content", "mlps", "scale")
"""The players of the Shapley attribution that can repair: all but the heads' own write."""


def total_effect(examples: pd.DataFrame) -> Column:
    """Change of the logit difference, intervened minus clean; below 0: the heads helped."""
    return column(examples, "te")


def logit_diff_change(examples: pd.DataFrame) -> Column:
    """Change of the logit difference, intervened minus clean; above 0: the heads suppressed."""
    return column(examples, "ld") - column(examples, "ld_clean")


def interaction(examples: pd.DataFrame) -> Column:
    """What a set of heads does beyond its parts (I), logit; above 0: more than one by one."""
    return column(examples, "interaction")


def recovery(examples: pd.DataFrame) -> Pair:
    """Of the effect of a set, the share that putting one head back undoes; 1: all of it."""
    whole = column(examples, "ld_set")
    return column(examples, "ld") - whole, column(examples, "ld_clean") - whole


def patch_recovery(examples: pd.DataFrame) -> Pair:
    """Share of the distance between the two runs that a patch covers; 1: all of it.

    Over the pairs of competent cells; of one direction, which `select.ablation` names.
    """
    return column(examples, "recovery"), column(examples, "recovery_of")


def patch_asymmetry(examples: pd.DataFrame) -> Pair:
    """Share that denoising covers less the share that noising does, paired; 0: symmetric.

    Over the pairs whose clean prompt the model answers more clearly than the corrupt one: of a pair
    and its mirror image, over which the two shares are equal by construction, one. Rows of both
    directions are needed, so that no `select.ablation` is.
    """
    return column(examples, "asymmetry"), column(examples, "asymmetry_of")


def direct_effect(examples: pd.DataFrame) -> Column:
    """What a head writes towards the target less towards the foil, logit; below 0: against it."""
    return column(examples, "delta")


def hedge_shift(examples: pd.DataFrame) -> Column:
    """What a head adds to hedges beyond other words, less what the other heads do; logit."""
    return column(examples, "hedge") - column(examples, "hedge_rest")


def effect_over_clean(examples: pd.DataFrame) -> Pair:
    """Change of the logit difference as a share of the clean one; -1: all of it is lost."""
    return column(examples, "te"), column(examples, "ld_clean")


def self_repair(examples: pd.DataFrame) -> Pair:
    """Self-repair as a share of the lost direct effect: 0 nothing, 1 all of it is made up for.

    (total effect + drop) / drop, summed over prompts above and below, with the drop of the direct
    effect at the clean scale of the final norm.
    """
    return column(examples, "sr"), column(examples, "drop")


def amplitude_share(examples: pd.DataFrame) -> Pair:
    """A-share of the repair: what the final norm's scale adds, among all that others add.

    phi_scale / R with R = phi_routing + phi_content + phi_mlps + phi_scale, Shapley values of the
    total effect, summed over prompts above and below.
    """
    return column(examples, "phi_scale"), repair(examples)


def exchange_rate(examples: pd.DataFrame) -> Pair:
    """Log amplitude lost and log alignment gained by prompts that lead before and after.

    Returns:
        (-change of log A, change of log G): numerator and denominator of kappa; NaN where the
        margin is not positive with and without the intervention.
    """
    both = positive(examples)
    lost = column(examples, "log_amplitude_clean") - column(examples, "log_amplitude")
    gained = column(examples, "log_alignment") - column(examples, "log_alignment_clean")
    return np.where(both, lost, np.nan), np.where(both, gained, np.nan)


def norm_ratio(depths: pd.DataFrame, positions: str) -> Pair:
    """Norm of the residual stream under the intervention over the clean one (C), END or all.

    Its null, if nothing downstream reacts, lies below 1, and a ratio above 1 is no compensation.
    """
    return column(depths, f"norm_{positions}"), column(depths, f"norm_{positions}_clean")


def norm_excess(depths: pd.DataFrame, positions: str) -> Pair:
    """Norm under the intervention over the norm if nothing downstream reacted (C / C_null)."""
    return column(depths, f"norm_{positions}"), column(depths, f"norm_{positions}_null")


def head_variance(examples: pd.DataFrame) -> Pair:
    """Energy of the suppressors' writes around their means, and of the clean heads' (E1).

    One row a sequence and layer; as sums over sequences, variances but for one factor.
    """
    return column(examples, "energy"), column(examples, "energy_clean")


def stream_variance(examples: pd.DataFrame) -> Pair:
    """Energy of the last residual stream with the suppressors ablated, and intact (E2)."""
    return column(examples, "stream"), column(examples, "stream_clean")


def mean_of(examples: pd.DataFrame, name: str) -> Pair:
    """A column, so that every row weighs alike, whatever the size of its cluster."""
    return _over_rows(column(examples, name))


def share_above(examples: pd.DataFrame, name: str, level: str) -> Pair:
    """Share of rows whose column is at least a level; above 0.5, so is the median."""
    values = column(examples, name)
    return _over_rows(np.where(np.isnan(values), np.nan, values >= float(level)))


def difference_of(examples: pd.DataFrame, name: str, other: str) -> Pair:
    """A column less another one, row by row."""
    return _over_rows(column(examples, name) - column(examples, other))


def excess_of(examples: pd.DataFrame, name: str, other: str, times: str) -> Pair:
    """A column less a multiple of another one, row by row; above 0: it is that many times as large.

    Where the other one is negative, so that their ratio says nothing, it still does.
    """
    return _over_rows(column(examples, name) - float(times) * column(examples, other))


def gap_of(examples: pd.DataFrame, name: str, other: str) -> Pair:
    """1 - the sum of a column over that of another; 0: they are the same, 1: the first is 0."""
    values, others = column(examples, name), column(examples, other)
    return values - others, -others


def ratio_of(examples: pd.DataFrame, name: str, other: str) -> Pair:
    """The sum of a column over that of another."""
    return column(examples, name), column(examples, other)


def _over_rows(values: Column) -> Pair:
    """A mean over rows as a ratio of sums: their number is the denominator."""
    return values, np.where(np.isnan(values), np.nan, 1.0)


def column(rows: pd.DataFrame, name: str) -> Column:
    """A column of the records.

    Raises:
        UndefinedError: The records have none of that name.
    """
    if name not in rows:
        raise UndefinedError(f"{name} was not recorded")
    return rows[name].to_numpy(np.float64)


def repair(rows: pd.DataFrame) -> Column:
    """All that other parts than the heads themselves add to the logit difference (R), logit."""
    return np.sum([column(rows, f"phi_{player}") for player in REPAIRERS], axis=0)


def positive(rows: pd.DataFrame) -> np.ndarray:
    """Which prompts lead, by the margin over the runner-up, with and without the intervention."""
    now, then = column(rows, "log_margin"), column(rows, "log_margin_clean")
    return np.isfinite(now) & np.isfinite(then)
