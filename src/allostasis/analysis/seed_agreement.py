"""Whether autoencoders of several seeds found the same directions, from the decoders they left."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file
from scipy.optimize import linear_sum_assignment

from allostasis.analysis.aggregate import Arm
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

WEIGHTS = "sae/sae_weights.safetensors"
MOST = 4096  # latents: an assignment takes the cube of their number


def mcc(
    decoder: Float[np.ndarray, "latent d"], other: Float[np.ndarray, "other d"]
) -> Float[np.ndarray, " used"]:
    """Absolute cosines of two decoders' rows under the best one-to-one assignment.

    Args:
        decoder: Directions that latents write; of any length but 0.
        other: The same of another seed; as many are compared as the smaller one has.

    Returns:
        One a pair, in [0, 1]. 1: the same direction in both.

    Source:
        Paulo & Belrose (2025), Sparse Autoencoders Trained on the Same Data, arXiv:2501.16615.

    Example:
        >>> mcc(np.eye(2), np.eye(2)[::-1]).tolist()
        [1.0, 1.0]
    """
    rows, columns = (
        side.astype(np.float64) / np.linalg.norm(side.astype(np.float64), axis=1, keepdims=True)
        for side in (decoder, other)
    )
    cosines = np.abs(rows @ columns.T)
    return cosines[linear_sum_assignment(cosines, maximize=True)]


def agreement_table(arms: Sequence[Arm]) -> list[Table]:
    """Mean over pairs of seeds of `mcc`, for arms whose runs have kept their decoders.

    Returns:
        One table, or none where no arm has two decoders of at most 4,096 latents.
    """
    rows = []
    for arm in arms:
        paths = [run.record.folder / WEIGHTS for run in arm.runs]
        decoders = [load_file(path)["W_dec"] for path in paths if path.is_file()]
        if len(decoders) < 2 or max(map(len, decoders)) > MOST:
            continue
        found = [mcc(one, other).mean() for one, other in combinations(decoders, 2)]
        rng = np.random.default_rng(0)
        null = [mcc(one, rng.standard_normal(one.shape)).mean() for one in decoders]
        rows.append((
            arm.condition, str(len(decoders)), number(float(np.mean(found))),
            f"{number(float(min(found)))} to {number(float(max(found)))}",
            number(float(np.mean(null))),
        ))  # fmt: skip
    if not rows:
        return []
    return [Table(
        "Agreement of seeds",
        ("condition", "seeds", "mean |cosine|", "least and most of a pair", "random rows"),
        tuple(rows),
        "Rows of two seeds' decoders, assigned one-to-one, over all pairs of seeds; beside it the "
        "same with random rows in the place of one. Only for runs that lie here with their sae/, "
        f"of at most {MOST:,} latents.",
    )]  # fmt: skip
