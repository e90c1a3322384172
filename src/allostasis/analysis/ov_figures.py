"""Maps, pages and tables of what heads write, from records."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from allostasis.analysis import impact, ov_tokens
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.estimands import generator
from allostasis.analysis.heatmap import HeadMap
from allostasis.analysis.lab_tables import runs
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

SILENT = 3.0  # signal-to-noise ratio below which a head has no measurable direct effect
LISTED = 10  # tokens of each end on the page
SHOWN = 8
MARKS = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\u00a0": "␣"})
COLUMNS = {
    "circuit": ("copying_score", "eigenvalue_positivity", "ov_positivity", "spectral_norm"),
    "write": ("vector_norm", "snr", "delta"),
}


def visible(token: str) -> str:
    r"""A token as it is shown: spaces and line breaks as marks, what has no glyph as its code.

    Example:
        >>> print(visible(" the"), visible("\x0b"))
        ·the \x0b
    """
    shown = token.translate(MARKS)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def listed(run: RunView) -> pd.DataFrame:
    """ov_tokens.parquet of a run.

    Raises:
        UndefinedError: It has none.
    """
    return _table(run, "ov_tokens")


def _table(run: RunView, name: str) -> pd.DataFrame:
    path = run.record.folder / f"{name}.parquet"
    if not path.is_file():
        raise UndefinedError(f"{name}.parquet was not recorded")
    return pd.read_parquet(path)


def numbers(run: RunView, report: str) -> pd.DataFrame:
    """Numbers of every head of a report, one column each, by (layer, head)."""
    rows = run.record.units
    rows = rows[rows["metric"].str.startswith(f"ov_{report}.")]
    names = rows["metric"].str.partition(".")[2]
    return rows.assign(name=names).pivot(index=["layer", "head"], columns="name", values="value")


def maps(arms: Sequence[Arm], report: str, name: str, unit: str) -> list[HeadMap]:
    """Layer by head: of the circuit one map, of the write one a corpus.

    Raises:
        UndefinedError: No run has the report.
    """
    found: dict[str, pd.Series] = {}
    for condition, run in runs(arms):
        table = numbers(run, report)
        if name in table:
            found.setdefault("weights" if report == "circuit" else condition, table[name])
    if not found:
        raise UndefinedError(f"no run has the {report} report")
    keys = [key for values in found.values() for key in values.index]
    shape = tuple(int(max(key[axis] for key in keys)) + 1 for axis in (0, 1))
    made = []
    for title, values in found.items():
        grid = np.full(shape, np.nan)
        layers, heads = (values.index.get_level_values(axis).astype(int) for axis in (0, 1))
        grid[layers, heads] = values.to_numpy(float)
        nothing = np.full(shape, np.nan)
        made.append(HeadMap(title, unit, grid, nothing, nothing))
    return made


def page(arms: Sequence[Arm]) -> Markup:
    """Every head's tokens as an HTML fragment that runs nothing, every token escaped.

    The circuit stands first, once: it is of weights alone. Writes follow, one part a corpus; those
    without a measurable direct effect are grey.

    Raises:
        UndefinedError: No run lists tokens.
    """
    parts = [*_parts(arms)]
    if not parts:
        raise UndefinedError("no run lists tokens")
    environment = Environment(
        loader=PackageLoader("allostasis.analysis"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return Markup(environment.get_template("ov.html.jinja").render(parts=parts))


def _parts(arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
    done: set[str] = set()
    for report in ("circuit", "write"):
        for condition, run in runs(arms):
            title = "circuit, of weights alone" if report == "circuit" else f"write on {condition}"
            tokens = listed(run)
            tokens = tokens[tokens["report"] == report]
            if title not in done and len(tokens):
                done.add(title)
                yield {
                    "title": title,
                    "columns": COLUMNS[report],
                    "rows": _rows(run, report, tokens),
                }


def _rows(run: RunView, report: str, tokens: pd.DataFrame) -> list[dict[str, Any]]:
    values = numbers(run, report)
    rows = []
    for _, own in tokens.groupby(["layer", "head"]):
        layer, head = int(own["layer"].iloc[0]), int(own["head"].iloc[0])
        known: Any = values.loc[(layer, head)]
        rows.append({
            "head": f"{layer}.{head}",
            "values": [number(float(known[name])) for name in COLUMNS[report]],
            "ends": [_tokens(own[own["end"] == end]) for end in ("top", "bottom")],
            "is_silent": report == "write" and float(known["snr"]) < SILENT,
        })  # fmt: skip
    return rows


def _tokens(rows: pd.DataFrame) -> list[dict[str, Any]]:
    best = rows.sort_values("rank").head(LISTED)
    return [
        {
            "text": visible(row["token"]), "is_fragment": bool(row["is_fragment"]),
            "hint": f"token {row['token_id']}, {number(float(row['logit']))} logit",
        }
        for row in best.to_dict("records")
    ]  # fmt: skip


def effects_table(arms: Sequence[Arm]) -> Table:
    """Heads that write most towards the answer or against it, on test."""
    rows = []
    for condition, run in runs(arms):
        seen = _table(run, "examples")
        seen = seen[seen["split"] == "test"]
        wide = seen.pivot(index="intervention", columns="example", values="delta")
        groups = seen.drop_duplicates("example").set_index("example")["group"]
        values = wide.to_numpy(float)
        low, high = impact.intervals(impact.clustered(values, groups[wide.columns].tolist()))
        means, snr = values.mean(axis=1), numbers(run, "write").get("snr")
        for index in np.argsort(-np.abs(means), kind="stable")[:SHOWN]:
            key = str(wide.index[index])
            layer, head = map(int, key.removeprefix("write:").split("."))
            ratio = "" if snr is None else number(float(snr.loc[(layer, head)]))
            rows.append((
                condition, str(run.seed), f"{layer}.{head}",
                f"{number(float(means[index]))} "
                f"[{number(float(low[index]))}, {number(float(high[index]))}]",
                ratio, _words(run, "write", layer, head, "top"),
                _words(run, "write", layer, head, "bottom"),
            ))  # fmt: skip
    return Table(
        "Heads that write most towards the answer or against it",
        ("corpus", "seed", "head", "direct effect, logit", "snr", "raises most", "lowers most"),
        tuple(rows),
        "Mean over the test split of what the head adds at the last token to the target's logit, "
        "less the foil's, through the final norm at each prompt's own scale; intervals: 95 % over "
        "groups of prompts. Heads are chosen by this number itself, so that the largest are too "
        f"large by the choice. snr below {SILENT:g}: no measurable direct effect on average.",
    )


def _words(run: RunView, report: str, layer: int, head: int, end: str, n: int = 6) -> str:
    rows = listed(run)
    own = rows[(rows["report"] == report) & (rows["end"] == end)]
    own = own[(own["layer"] == layer) & (own["head"] == head)].sort_values("rank").head(n)
    return " ".join(visible(token) for token in own["token"])


def counts_table(arms: Sequence[Arm]) -> Table:
    """Tokens that are listed most, over heads, reports and corpora."""
    every = [
        listed(run)[lambda rows: rows["report"] == "write"].assign(report=condition)
        for condition, run in runs(arms)
    ]
    if not every:
        raise UndefinedError("no run lists tokens")
    found = ov_tokens.counts(pd.concat(every)).head(30)
    rows = [
        (visible(row["token"]), str(row["count"]), str(row["n_heads"]), str(row["n_models"]))
        for row in found.to_dict("records")
    ]
    return Table(
        "Tokens that heads list most",
        ("token", "lists", "heads", "models"),
        tuple(rows),
        "Write reports of all corpora, both ends; tokens are aligned by their text. A token that "
        "many heads list says little about any of them.",
    )


def clusters_table(arms: Sequence[Arm]) -> Table:
    """Clusters of listed tokens by their rows of the unembedding."""
    rows = []
    for condition, run in runs(arms):
        found = _table(run, "ov_clusters")
        for (report, cluster), own in found[found["size"] > 1].groupby(["report", "cluster"]):
            first = own.iloc[0]
            members = own.sort_values(["count", "token_id"], ascending=[False, True])["token"]
            rows.append((
                condition, str(run.seed), str(report), str(cluster), str(first["size"]),
                visible(first["medoid"]), number(float(first["mean_logit"])),
                f"{int(own['is_fragment'].sum())}", " ".join(map(visible, members[:10])),
                f"{number(float(first['silhouette']))} at {number(float(first['threshold']))}",
            ))  # fmt: skip
    if not rows:
        raise UndefinedError("no run has clusters of more than one token")
    return Table(
        "Clusters of tokens",
        ("corpus", "seed", "report", "cluster", "size", "medoid", "mean logit", "fragments",
         "members", "silhouette at distance"),
        tuple(rows),
        "The tokens that a run lists most, by average linkage of cosine distances between rows of "
        "the unembedding, cut where the mean silhouette is largest on a fixed grid.",
    )  # fmt: skip


def words_table(arms: Sequence[Arm]) -> Table:
    """Heads that list more hedges or boosters than the others do."""
    rows = []
    for condition, run in runs(arms):
        found = _table(run, "ov_words").sort_values(["q", "p"], kind="stable")
        for row in found[found["n_words"] > 0].head(SHOWN).to_dict("records"):
            rows.append((
                condition, str(run.seed), row["report"], row["end"], row["lexicon"],
                f"{row['layer']}.{row['head']}", f"{row['n_words']} of {row['n_tokens']}",
                number(float(row["log_odds"])), number(float(row["p"])), number(float(row["q"])),
            ))  # fmt: skip
    if not rows:
        raise UndefinedError("no head lists a hedge or a booster")
    return Table(
        "Hedges and boosters",
        ("corpus", "seed", "report", "end", "lexicon", "head", "words", "log odds", "p", "q"),
        tuple(rows),
        f"Our own lists of {len(ov_tokens.LEXICONS['hedge'])} hedges and "
        f"{len(ov_tokens.LEXICONS['booster'])} boosters. Fisher's exact test against the lists of "
        "all other heads; q over the heads of a report, end and lexicon.",
    )


def overlap_table(arms: Sequence[Arm]) -> Table:
    """Whether a head writes the same tokens on two corpora, against random pairs of heads."""
    first = {condition: run for condition, run in runs(arms)}
    rows = []
    for left, right in itertools.combinations(first, 2):
        sides = []
        for name in (left, right):
            some = listed(first[name])
            own = some[(some["report"] == "write") & (some["end"] == "top")]
            sides.append(ov_tokens.lists(own))
        shared = [(head, head) for head in sides[0] if head in sides[1]]
        rng = generator(f"overlap:{left}:{right}")
        table = ov_tokens.compare(sides[0], sides[1], shared, rng)
        rows.append((
            left, right, str(len(table)), number(float(table["rbo"].mean())),
            number(float(table["rbo_null"].iloc[0])), number(float(table["jaccard"].mean())),
            number(float(table["jaccard_null"].iloc[0])),
            number(float((table["rbo_p"] <= 0.05).mean())),
        ))  # fmt: skip
    if not rows:
        raise UndefinedError("one corpus has no other to be compared with")
    return Table(
        "The same head on two corpora",
        ("corpus", "corpus", "heads", "RBO", "RBO, random pairs", "Jaccard",
         "Jaccard, random pairs", "heads with p <= 0.05"),
        tuple(rows),
        "Tokens that a head raises most; rank-biased overlap (p = 0.98) and Jaccard, mean over "
        "heads, beside 1,000 random pairs of heads.",
    )  # fmt: skip
