"""WordNet's nouns as concepts of one tokenizer: which tokens belong to what, in three splits."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
import pandas as pd
from annotated_types import Ge, Gt, Le

from allostasis.core import wordnet
from allostasis.core.records import write_atomically, write_json
from allostasis.core.seeding import derive
from allostasis.tasks.one_batch import OneBatch

SPLITS = ("train", "val", "test")
COLUMNS = ("concept", "synset", "parent", "lemma", "form", "token_id", "split")
MERGED_BELOW = 10  # lemmas: a parent with fewer more than its child is the same concept
Batch = Any  # a tokenizer of transformers, called with a list of texts


def plural(word: str) -> str:
    """A plural by the plain rule: ies after a consonant and y, es after a hiss, else s.

    Example:
        >>> [plural(word) for word in ("city", "day", "box", "cat")]
        ['cities', 'days', 'boxes', 'cats']
    """
    if word.endswith("y") and word[-2:-1] not in set("aeiou"):
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")


def forms(lemma: str) -> tuple[str, ...]:
    """How a lemma is written: lower case and capitalised, one and many.

    Example:
        >>> forms("Fly")
        ('fly', 'Fly', 'flies', 'Flies')
    """
    one = lemma.lower()
    many = plural(one)
    return tuple(dict.fromkeys((one, one.capitalize(), many, many.capitalize())))


@lru_cache(maxsize=2)
def single_tokens(tokenizer: Batch, nouns: wordnet.Nouns) -> dict[str, dict[str, int]]:
    """Of each lemma without a blank, its forms that are one token after a space, with the token.

    By encoding them, since vocabularies mark the space in several ways.
    """
    lemmas = dict.fromkeys(w for words in nouns.lemmas.values() for w in words if "_" not in w)
    asked = [(lemma, form) for lemma in lemmas for form in forms(lemma)]
    encoded = tokenizer([f" {form}" for _, form in asked], add_special_tokens=False)["input_ids"]
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for (lemma, form), ids in zip(asked, encoded, strict=True):
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found[lemma][form] = ids[0]
    return dict(found)


def members(nouns: wordnet.Nouns, lemmas: Iterable[str]) -> dict[int, frozenset[str]]:
    """Which of some lemmas name a proper hyponym of each synset."""
    usable = set(lemmas)
    found: dict[int, set[str]] = defaultdict(set)
    for synset, words in nouns.lemmas.items():
        own = usable.intersection(words)
        if own:
            for above in nouns.ancestors(synset):
                found[above] |= own
    return {synset: frozenset(words) for synset, words in found.items()}


def nearest_kept(
    nouns: wordnet.Nouns, sizes: Mapping[int, int], synset: int, kept: Iterable[int]
) -> int | None:
    """The kept ancestor with fewest steps; of several, the smallest, then the lowest offset."""
    above = nouns.ancestors(synset)
    there = above.keys() & set(kept)
    return min(there, key=lambda one: (above[one], sizes[one], one), default=None)


def hierarchy(nouns: wordnet.Nouns, sizes: Mapping[int, int]) -> tuple[dict[int, int | None], int]:
    """Each concept's parent, after parents that hardly differ from a child are dropped.

    Args:
        nouns: The ontology.
        sizes: Lemmas of each concept that is large enough.

    Returns:
        Parent by synset, None for a root; and how many concepts were merged into their child.
    """
    kept = set(sizes)
    parents = {synset: nearest_kept(nouns, sizes, synset, kept) for synset in sorted(kept)}
    n_merged = 0
    while True:
        alike = {
            parent
            for synset, parent in parents.items()
            if parent is not None and sizes[parent] - sizes[synset] < MERGED_BELOW
        }
        if not alike:
            return parents, n_merged
        dropped = min(alike, key=lambda one: (sizes[one], one))
        kept.remove(dropped)
        del parents[dropped]
        n_merged += 1
        for synset, parent in parents.items():
            if parent == dropped:
                parents[synset] = nearest_kept(nouns, sizes, synset, kept)


def split_lemmas(
    lemmas: Iterable[str], shares: Sequence[float], rng: np.random.Generator
) -> dict[str, str]:
    """One side for each lemma, whatever its case, the same for every concept that it is in."""
    keys = sorted({lemma.lower() for lemma in lemmas})
    ends = np.cumsum(shares)[:-1] * len(keys)
    order = rng.permutation(len(keys))
    sides = np.searchsorted(ends, np.arange(len(keys)), side="right")
    of_key = {keys[place]: SPLITS[side] for place, side in zip(order, sides, strict=True)}
    return {lemma: of_key[lemma.lower()] for lemma in lemmas}


@dataclass(frozen=True)
class ConceptTable:
    """Concepts of a tokenizer.

    Attributes:
        tokens: One row a concept and token, with the columns `COLUMNS`; `parent` is a synset or
            missing. No token is on two sides.
        facts: The tokenizer's hash, how many of what, and what was dropped why.
    """

    tokens: pd.DataFrame
    facts: dict[str, Any]

    @cached_property
    def parents(self) -> dict[int, int | None]:
        """Parent of each concept, by synset, ascending."""
        rows = self.tokens.drop_duplicates("synset").sort_values("synset")
        pairs = zip(rows["synset"], rows["parent"], strict=True)
        return {int(s): None if pd.isna(p) else int(p) for s, p in pairs}

    @cached_property
    def names(self) -> dict[int, str]:
        """What each concept is called, by synset."""
        rows = self.tokens.drop_duplicates("synset")
        return {int(s): str(c) for s, c in zip(rows["synset"], rows["concept"], strict=True)}

    @cached_property
    def edges(self) -> pd.DataFrame:
        """One row a child: parent, child, their names, and the root above both (`subtree`)."""
        rows = [
            {"parent": parent, "child": child, "parent_name": self.names[parent],
             "child_name": self.names[child], "subtree": self.root(child)}
            for child, parent in self.parents.items() if parent is not None
        ]  # fmt: skip
        columns = ["parent", "child", "parent_name", "child_name", "subtree"]
        return pd.DataFrame(rows, columns=columns)

    def root(self, synset: int) -> int:
        """The topmost kept concept above a concept."""
        parent = self.parents[synset]
        return synset if parent is None else self.root(parent)

    @cached_property
    def _by_concept(self) -> dict[int, pd.DataFrame]:
        tokens = self.tokens.drop_duplicates(["synset", "token_id"])
        return {int(str(synset)): rows for synset, rows in tokens.groupby("synset", sort=True)}

    def of(self, synset: int, *splits: str) -> pd.DataFrame:
        """A concept's rows, of all splits or of some, one a token."""
        rows = self._by_concept[synset]
        return rows[rows["split"].isin(splits)] if splits else rows

    def ids(self, synset: int, *splits: str) -> np.ndarray:
        """A concept's token ids, ascending."""
        return np.sort(self.of(synset, *splits)["token_id"].to_numpy())

    def write(self, folder: Path) -> None:
        """Write concepts.parquet, edges.parquet and concepts.json."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, frame in (("concepts", self.tokens), ("edges", self.edges)):
            write_atomically(folder / f"{name}.parquet", frame.to_parquet)
        write_json(folder / "concepts.json", self.facts)


def read_table(folder: Path, *, tokenizer_sha256: str) -> ConceptTable:
    """Read what `ConceptTable.write` wrote.

    Raises:
        ValueError: It was made for another tokenizer.
    """
    facts = json.loads((folder / "concepts.json").read_text(encoding="utf-8"))
    if facts["tokenizer_sha256"] != tokenizer_sha256:
        raise ValueError(
            f"{folder} holds concepts of a tokenizer with SHA-256 {facts['tokenizer_sha256']}, and "
            f"the model's is {tokenizer_sha256}; make them again with "
            "python -m allostasis.tasks.concepts build"
        )
    return ConceptTable(pd.read_parquet(folder / "concepts.parquet"), facts)


@dataclass(frozen=True)
class Selection:
    """Which concepts a teacher has.

    Most nouns that are one token have several senses, so that any two large concepts share some.

    Attributes:
        parents: Of them as many.
        max_children: Of each at most.
        min_children: Of each at least.
        min_lemmas: With a single token, that a concept has at least.
        max_shared: Of the tokens of two parents, the share that may belong to both.
    """

    parents: int = 16
    max_children: int = 8
    min_children: int = 3
    min_lemmas: int = 20
    max_shared: float = 0.05


@dataclass(frozen=True)
class Chosen:
    """A parent of a teacher, and its children with the tokens that they share with no sibling.

    Attributes:
        parent: Its synset.
        children: Their synsets.
        own: Of each child, the training tokens of no other child.
    """

    parent: int
    children: tuple[int, ...]
    own: tuple[np.ndarray, ...]


def choose(table: ConceptTable, nouns: wordnet.Nouns, selection: Selection) -> list[Chosen]:
    """Parents and children for a teacher: the largest on train, ties by offset.

    Parents are in no line of descent with each other and share hardly a token.

    Raises:
        ValueError: There are too few; the message says how many there are.
    """
    train = {synset: set(table.ids(synset, "train").tolist()) for synset in table.parents}
    children: dict[int, list[int]] = defaultdict(list)
    for child, parent in table.parents.items():
        if parent is not None:
            children[parent].append(child)
    chosen: list[Chosen] = []
    for parent in sorted(children, key=lambda one: (-len(train[one]), one)):
        if any(_overlap(nouns, train, parent, other.parent, selection) for other in chosen):
            continue
        ranked = sorted(children[parent], key=lambda one: (-len(train[one]), one))
        ranked = ranked[: selection.max_children]
        own = [
            np.array(sorted(train[c].difference(*(train[o] for o in ranked if o != c))))
            for c in ranked
        ]
        there = [place for place, ids in enumerate(own) if len(ids) > 1]
        if len(there) >= selection.min_children:
            chosen.append(
                Chosen(parent, tuple(ranked[i] for i in there), tuple(own[i] for i in there))
            )
        if len(chosen) == selection.parents:
            return chosen
    raise ValueError(
        f"module.selection.parents={selection.parents}: under this tokenizer {len(chosen)} parents "
        f"have {selection.min_children} children of {selection.min_lemmas} lemmas; ask for "
        f"{len(chosen)}, or lower min_lemmas"
    )


def _overlap(
    nouns: wordnet.Nouns, train: Mapping[int, set[int]], one: int, other: int, rule: Selection
) -> bool:
    if one in nouns.ancestors(other) or other in nouns.ancestors(one):
        return True
    shared = len(train[one] & train[other])
    return shared > rule.max_shared * len(train[one] | train[other])


class Concepts(L.LightningDataModule):
    """Nouns with a single token, by the concepts that they are kinds of.

    Args:
        seed: The run's seed: it draws which lemmas are held out.
        min_lemmas: With a single token, that a concept has at least.
        max_fraction: Of all usable tokens, that a concept has at most: it drops the uppermost ones.
        split: Shares of lemmas for train, val and test.

    Raises:
        ValueError: The shares are not three that add up to 1.
    """

    def __init__(
        self,
        *,
        seed: int,
        min_lemmas: Annotated[int, Ge(2)] = 50,
        max_fraction: Annotated[float, Gt(0), Le(1)] = 0.25,
        split: Sequence[float] = (0.7, 0.15, 0.15),
    ) -> None:
        super().__init__()
        if len(split) != len(SPLITS) or min(split) <= 0 or not np.isclose(sum(split), 1):
            raise ValueError(
                f"task.split={[*split]}: expected three positive shares, of {', '.join(SPLITS)}, "
                "that add up to 1"
            )
        self.seed, self.min_lemmas, self.max_fraction = seed, min_lemmas, max_fraction
        self.split = tuple(split)

    def build(
        self, tokenizer: Batch, *, tokenizer_sha256: str, min_lemmas: int | None = None
    ) -> ConceptTable:
        """The concepts of one tokenizer.

        Args:
            tokenizer: Of the model.
            tokenizer_sha256: Its hash.
            min_lemmas: Another least size; lemmas fall on the same sides.
        """
        nouns = wordnet.nouns()
        single = single_tokens(tokenizer, nouns)
        least = self.min_lemmas if min_lemmas is None else min_lemmas
        words = members(nouns, single)
        large = {synset: found for synset, found in words.items() if len(found) >= least}
        n_tokens = len({token for found in single.values() for token in found.values()})
        limit = self.max_fraction * n_tokens
        kept = {
            synset: len(found) for synset, found in large.items()
            if len({token for lemma in found for token in single[lemma].values()}) <= limit
        }  # fmt: skip
        parents, n_merged = hierarchy(nouns, kept)
        rng = np.random.default_rng(derive(self.seed, "split"))
        sides = split_lemmas(single, self.split, rng)
        rows = [
            (nouns.lemmas[synset][0], synset, parent, lemma, form, token, sides[lemma])
            for synset, parent in sorted(parents.items())
            for lemma in sorted(words[synset])
            for form, token in single[lemma].items()
        ]
        tokens = pd.DataFrame(rows, columns=[*COLUMNS])
        tokens["parent"] = tokens["parent"].astype("Int64")
        on_sides = tokens.groupby("token_id")["split"].nunique()
        torn = on_sides.index[on_sides > 1]
        tokens = tokens[~tokens["token_id"].isin(torn)].reset_index(drop=True)
        facts = {
            "tokenizer_sha256": tokenizer_sha256,
            "min_lemmas": least,
            "max_fraction": self.max_fraction,
            "split": list(self.split),
            "seed": self.seed,
            "lemmas": len(single),
            "tokens": n_tokens,
            "concepts": len(parents),
            "edges": sum(parent is not None for parent in parents.values()),
            "roots": sum(parent is None for parent in parents.values()),
            "dropped": {
                "concepts of too many tokens": len(large) - len(kept),
                "parents that hardly differ from a child": n_merged,
                "tokens of lemmas on two sides": len(torn),
            },
        }
        return ConceptTable(tokens, facts)

    def test_dataloader(self) -> OneBatch[Concepts]:
        """One batch, the task itself: whoever has the tokenizer builds the table from it."""
        return OneBatch(self)

    def transfer_batch_to_device(
        self, batch: Concepts, device: Any, dataloader_idx: int
    ) -> Concepts:
        """The task as it is: it holds no tensor."""
        del device, dataloader_idx
        return batch


def main(words: Sequence[str] | None = None) -> int:
    """Write the concepts of a model's tokenizer."""
    from allostasis.models import zoo

    parser = argparse.ArgumentParser(
        prog="python -m allostasis.tasks.concepts", description=__doc__
    )
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser(
        "build", help="write concepts.parquet, edges.parquet, concepts.json"
    )
    build.add_argument("--model", required=True, help="owner/name, or a folder or GGUF file")
    build.add_argument("--min-lemmas", type=int, default=50, help="a concept has at least")
    build.add_argument("--max-fraction", type=float, default=0.25, help="of tokens, at most")
    build.add_argument("--seed", type=int, default=0, help="draws the splits")
    build.add_argument("--out", type=Path, required=True, help="folder")
    given = parser.parse_args(words)
    is_path = Path(given.model).expanduser().exists()
    tokenizer, digest = zoo.find_tokenizer(
        None if is_path else given.model, source=given.model if is_path else None
    )
    task = Concepts(seed=given.seed, min_lemmas=given.min_lemmas, max_fraction=given.max_fraction)
    table = task.build(tokenizer, tokenizer_sha256=digest)
    table.write(given.out)
    parser.exit(
        0,
        f"{table.facts['concepts']} concepts, {table.facts['edges']} edges, "
        f"{table.facts['roots']} roots: {given.out}\n",
    )


if __name__ == "__main__":
    raise SystemExit(main())
