"""All statistics under one name: intervals, tests, effect sizes, survival, surrogates, power.

Pure functions on arrays, one entry a unit (a seed); whatever draws takes a generator.
"""

from allostasis.analysis.effects import (
    Effect,
    hedges_g,
    noncentral_above,
    one_sample_effect,
    unbiasing,
)
from allostasis.analysis.hypothesis_tests import (
    binomial_above,
    holm,
    median_above,
    median_below,
    permutation,
    ratio_above,
    sign_flip,
    t_above,
    welch_above,
)
from allostasis.analysis.intervals import (
    Interval,
    clopper_pearson,
    fieller,
    median_interval,
    t_interval,
    welch_interval,
)
from allostasis.analysis.power import (
    Design,
    attainable_p,
    exact_power,
    minimum_seeds,
    power,
    seeds_for_power,
)
from allostasis.analysis.relabelling import flipped_signs, max_t, permuted_labels, permuted_times
from allostasis.analysis.resampling import (
    Bootstrap,
    RatioBootstrap,
    iqm,
    iqm_interval,
    nested_interval,
    resampled_difference,
)
from allostasis.analysis.surrogates import circular_shift_p, phase_randomised_p, rank_correlation
from allostasis.analysis.survival import (
    KaplanMeier,
    common_end,
    kaplan_meier,
    log_hazard_ratio,
    log_rank,
)

__all__ = [
    "Bootstrap", "Design", "Effect", "Interval", "KaplanMeier", "RatioBootstrap", "attainable_p",
    "binomial_above", "circular_shift_p", "clopper_pearson", "common_end", "exact_power", "fieller",
    "flipped_signs", "hedges_g", "holm", "iqm", "iqm_interval",
    "kaplan_meier", "log_hazard_ratio", "log_rank", "max_t", "median_above", "median_below",
    "median_interval", "minimum_seeds",
    "nested_interval", "noncentral_above", "one_sample_effect", "permutation", "permuted_labels",
    "permuted_times", "phase_randomised_p", "power", "rank_correlation", "ratio_above",
    "resampled_difference", "seeds_for_power",
    "sign_flip", "t_above", "t_interval", "unbiasing", "welch_above", "welch_interval",
]  # fmt: skip
