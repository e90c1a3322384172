"""Maps, pages and tables of what heads write, from records."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from allostasis.analysis import impact, ov_tokens
from allostasis.analysis.aggregate import Arm
from allostasis.analysis.canvas import BLUE, INK, RED, style
from allostasis.analysis.curves import RunView, UndefinedError
from allostasis.analysis.estimands import generator
from allostasis.analysis.heatmap import HeadMap
from allostasis.analysis.lab_tables import runs
from allostasis.analysis.tables import Table
from allostasis.analysis.text import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

SILENT = 3.0  # signal-to-noise ratio below which a head has no measurable direct effect
LISTED = 10  # tokens of each end on the page
SHOWN = 8
DRAWN = 6  # heads of a corpus in the picture
RIGHT_TO_LEFT = {"R", "AL", "AN"}
WRITTEN = 5  # tokens of each end beside them
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


@dataclass(frozen=True)
class Effect:
    """A head's mean direct effect on the test split, in logits, with its 95 % interval."""

    layer: int
    head: int
    mean: float
    low: float
    high: float


def strongest(run: RunView, n: int = SHOWN) -> list[Effect]:
    """Heads of the largest direct effects, towards the answer or against it.

    Raises:
        UndefinedError: The run recorded none.
    """
    seen = _table(run, "examples")
    seen = seen[seen["split"] == "test"]
    wide = seen.pivot(index="intervention", columns="example", values="delta")
    groups = seen.drop_duplicates("example").set_index("example")["group"]
    values = wide.to_numpy(float)
    low, high = impact.intervals(impact.clustered(values, groups[wide.columns].tolist()))
    means = values.mean(axis=1)
    found = []
    for index in np.argsort(-np.abs(means), kind="stable")[:n]:
        layer, head = map(int, str(wide.index[index]).removeprefix("write:").split("."))
        found.append(Effect(layer, head, *(float(v[index]) for v in (means, low, high))))
    return found


def draw(arms: Sequence[Arm]) -> Canvas:
    """Each corpus's strongest heads: their direct effects, and the tokens that they write.

    Raises:
        UndefinedError: No run has a write report.
    """
    first: dict[str, RunView] = {}
    for condition, run in runs(arms):
        if "snr" in numbers(run, "write"):
            first.setdefault(condition, run)
    if not first:
        raise UndefinedError("no run has the write report")
    with style() as plt:
        canvas, panels = plt.subplots(
            len(first), 2, figsize=(11, 0.5 + 1.9 * len(first)), squeeze=False,
            width_ratios=(1, 2.4),
        )  # fmt: skip
        for (condition, run), (axis, words) in zip(first.items(), panels, strict=True):
            effects = strongest(run, DRAWN)
            places = np.arange(len(effects))
            means = np.array([effect.mean for effect in effects])
            ends = np.array([[effect.low, effect.high] for effect in effects]).T
            colours = [RED if mean > 0 else BLUE for mean in means]
            axis.barh(places, means, color=colours, height=0.7)
            axis.hlines(places, *ends, color=INK, linewidth=1)
            axis.axvline(0, color=INK, linewidth=0.8)
            axis.set(title=condition, ylabel="head", ylim=(len(effects) - 0.5, -0.5))
            axis.set_yticks(places, [f"{effect.layer}.{effect.head}" for effect in effects])
            axis.grid(visible=False, axis="y")
            words.set(xlim=(0, 1), ylim=axis.get_ylim())
            words.axis("off")
            for place, effect in zip(places, effects, strict=True):
                for end, at, mark in (("top", 0.0, "▲"), ("bottom", 0.5, "▼")):
                    said = _words(run, "write", effect.layer, effect.head, end, WRITTEN)
                    words.text(
                        at, place, f"{mark} {drawable(said)}", va="center", fontsize=8,
                        color=INK, parse_math=False, clip_on=True,
                    )  # fmt: skip
        panels[-1][0].set_xlabel("direct effect, logit")
        panels[0][1].set_title("▲ raises most, ▼ lowers most")
    return canvas


def drawable(text: str) -> str:
    r"""Text with the code of what the typeface has no glyph for, or would turn the line around.

    Example:
        >>> print(drawable("·the \u2581 ≤ \u6f22 \u0642"))
        ·the ▁ ≤ \u6f22 \u0642
    """
    from matplotlib import font_manager

    face = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return "".join(
        c
        if face.get_char_index(ord(c)) and unicodedata.bidirectional(c) not in RIGHT_TO_LEFT
        else c.encode("unicode_escape").decode()
        for c in text
    )


def effects_table(arms: Sequence[Arm]) -> Table:
    """Heads that write most towards the answer or against it, on test."""
    rows = []
    for condition, run in runs(arms):
        snr = numbers(run, "write").get("snr")
        for effect in strongest(run):
            layer, head = effect.layer, effect.head
            ratio = "" if snr is None else number(float(snr.loc[(layer, head)]))
            rows.append((
                condition, str(run.seed), f"{layer}.{head}",
                f"{number(effect.mean)} [{number(effect.low)}, {number(effect.high)}]",
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
