"""Whether heads of two models write the same tokens, against random pairs of heads.

Try:
  python -m allostasis.experiments.heads.compare RUN RUN                   each head with its best
  python -m allostasis.experiments.heads.compare RUN RUN --heads 0.2 0.21  one pair
  python -m allostasis.experiments.heads.compare RUN RUN --report circuit --end bottom --to FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from allostasis.analysis import ov_tokens
from allostasis.analysis.estimands import generator
from allostasis.analysis.ov_tokens import Place
from allostasis.core.records import write_atomically

SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Print the closest pairs; exit status 2 where a run or head is not there."""
    parser = argparse.ArgumentParser(
        prog="python -m allostasis.experiments.heads.compare",
        description=(__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="folders of heads_ov runs")
    parser.add_argument(
        "--heads", nargs=2, metavar="L.H", help="one head of each; else each head with its best"
    )
    parser.add_argument("--report", choices=["circuit", "write"], default="write")
    parser.add_argument("--end", choices=["top", "bottom"], default="top")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where to write all pairs, as CSV")
    words = parser.parse_args(argv)
    try:
        sides = [_lists(run, words.report, words.end) for run in words.runs]
        table = compared(*sides, heads=words.heads)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{words.report}, {words.end}: {words.runs[0]} and {words.runs[1]}")
    print(table.head(SHOWN).to_string(index=False, float_format="%.3g"))
    if words.to is not None:
        write_atomically(words.to, lambda path: table.to_csv(path, index=False))
        print(words.to)
    return 0


def compared(
    left: dict[Place, list[str]],
    right: dict[Place, list[str]],
    *,
    heads: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Overlaps of pairs of heads, the largest first.

    Args:
        left: Tokens of one model's heads, in order.
        right: Of the other's.
        heads: One pair; else each head of the left with the head of the right that it overlaps
            most, whose p is against as many tries and so no test.

    Raises:
        ValueError: A head is not in its run.
    """
    if heads is not None:
        pair = tuple(_place(name, side) for name, side in zip(heads, (left, right), strict=True))
        pairs = [(pair[0], pair[1])]
    else:
        pairs = [
            (one, max(right, key=lambda other, one=one: ov_tokens.rank_biased_overlap(
                left[one], right[other]
            )))
            for one in left
        ]  # fmt: skip
    table = ov_tokens.compare(left, right, pairs, generator("compare heads"))
    return table.sort_values("rbo", ascending=False, kind="stable", ignore_index=True)


def _lists(folder: Path, report: str, end: str) -> dict[Place, list[str]]:
    path = folder / "ov_tokens.parquet"
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no ov_tokens.parquet; give the folder of a finished heads_ov run, "
            "outputs/heads_ov/<corpus>/seed=<n>/<device>-<hash>"
        )
    rows = pd.read_parquet(path)
    return ov_tokens.lists(rows[(rows["report"] == report) & (rows["end"] == end)])


def _place(name: str, there: dict[Place, list[str]]) -> Place:
    for layer, head in there:
        if name == f"{layer}.{head}":
            return layer, head
    raise ValueError(f"head {name} is not in the run; it has {len(there)}, such as 0.0")


if __name__ == "__main__":
    raise SystemExit(main())
