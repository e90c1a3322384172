"""What is measured of concepts in one cloud: existence, relations, disjoint tests, levels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from allostasis.experiments.hsae.clouds import Placed
from allostasis.models import concept_directions as directions
from allostasis.models.concept_directions import N_FOLDS, Estimator, Lemmas

HELD_OUT = ("val", "test")
LEAST_REST = 30  # tokens of a parent that are not the child's
MIN_CORNERS = 3
N_DRAWN = 4  # parents whose tokens are kept for a figure
N_OTHERS = 200


@dataclass(frozen=True)
class Precision:
    """How often things are drawn.

    Attributes:
        n_boot: Resamples of lemmas, and of subtrees.
        n_perm: Permutations of labels.
        n_partitions: Partitions of lemmas into folds.
        n_background: Tokens that held-out members are told from.
    """

    n_boot: int = 2000
    n_perm: int = 1000
    n_partitions: int = 20
    n_background: int = 50_000


class Geometry:
    """The concepts of a table in one cloud.

    Args:
        placed: Tokens and their rows.
        estimator: Of a concept's vector.
        precision: How often things are drawn.
        rng: Draws them.
        parent_of: Another parent for each child, where pairs are not the table's own.
    """

    def __init__(
        self,
        placed: Placed,
        *,
        estimator: Estimator,
        precision: Precision,
        rng: np.random.Generator,
        parent_of: Mapping[int, int] | None = None,
    ) -> None:
        self.placed, self.table = placed, placed.table
        self.estimator: Estimator = estimator
        self.precision, self.rng = precision, rng
        edges = self.table.edges
        if parent_of is not None:
            edges = edges.assign(parent=[parent_of[child] for child in edges["child"]])
            edges["parent_name"] = [self.table.names[parent] for parent in edges["parent"]]
        self.edges = edges
        self._lemmas: dict[int, Lemmas] = {}

    @cached_property
    def vectors(self) -> dict[int, Tensor]:
        """Each concept's vector, from its training tokens."""
        return {
            synset: self._vector(self.table.ids(synset, "train")) for synset in self.table.names
        }

    def _vector(self, ids: np.ndarray) -> Tensor:
        return directions.vector(self.placed.at(ids), self.estimator)

    # ------------------------------------------------------------------ one row a concept
    def existence(self) -> pd.DataFrame:
        """Held-out members against other tokens, along their concept's vector."""
        concepts = torch.stack([*self.vectors.values()], dim=1)
        concepts = concepts / concepts.square().sum(dim=0)
        others = (self.placed.others @ concepts).numpy()
        members = (self.placed.rows @ concepts).numpy()
        rows: list[dict[str, Any]] = []
        for place, synset in enumerate(self.vectors):
            ids = self.table.ids(synset, *HELD_OUT)
            if len(ids) < 2:
                continue
            outside = ~np.isin(self.placed.background, self.table.ids(synset))
            inside = members[np.searchsorted(self.placed.ids, ids), place]
            found = directions.existence(inside, others[outside, place])
            rows.append({"synset": synset, **vars(found)})
        return pd.DataFrame(rows)

    # ------------------------------------------------------------------ one row an edge
    def whole(self) -> pd.Series:
        """Cosine of child less parent with parent, by edge, from all training tokens."""
        return self._along({edge: self._parts(*edge) for edge in self._pairs()})

    def _pairs(self) -> list[tuple[int, int]]:
        return [
            (int(p), int(c)) for p, c in zip(self.edges["parent"], self.edges["child"], strict=True)
        ]

    def _parts(self, parent: int, child: int) -> tuple[Tensor, Tensor]:
        return self.vectors[child] - self.vectors[parent], self.vectors[parent]

    def _along(self, pairs: Mapping[tuple[int, int], tuple[Tensor, Tensor]]) -> pd.Series:
        values = {child: float(directions.cosine(*parts)) for (_, child), parts in pairs.items()}
        return pd.Series(values, dtype=float)

    def published(self) -> pd.Series:
        """Angle in degrees by edge, both vectors normalised before the difference is taken."""
        return pd.Series({
            child: float(directions.published_unit(self.vectors[child], self.vectors[parent]))
            for parent, child in self._pairs()
        })

    def norms(self) -> pd.DataFrame:
        """Length of both vectors by edge, and how many training tokens they are made of."""
        return pd.DataFrame({
            child: {
                "norm_parent": float(self.vectors[parent].norm()),
                "norm_child": float(self.vectors[child].norm()),
                "n_child": len(self.table.ids(child, "train")),
                "n_parent": len(self.table.ids(parent, "train")),
            }
            for parent, child in self._pairs()
        }).T  # fmt: skip

    def leave_child_out(self) -> pd.DataFrame:
        """The same cosine with a parent from the training tokens that are not the child's."""
        rows: dict[int, dict[str, float]] = {}
        for parent, child in self._pairs():
            own = self.table.ids(child, "train")
            rest = np.setdiff1d(self.table.ids(parent, "train"), self.table.ids(child))
            if len(rest) < LEAST_REST:
                continue
            vector = self._vector(rest)
            rows[child] = {
                "lco": float(directions.cosine(self.vectors[child] - vector, vector)),
                "n_rest": len(rest),
                "lco_null": directions.null_disjoint(len(own), len(rest)),
            }
        return pd.DataFrame.from_dict(rows, orient="index", dtype=float)

    def independent(self, share: float) -> pd.DataFrame:
        """The same cosine, child and parent each from an own draw of a share of its tokens."""
        drawn: dict[int, Tensor] = {}
        for synset in self.table.names:
            ids = self.table.ids(synset)
            n = math.ceil(share * len(ids))
            drawn[synset] = self._vector(np.sort(self.rng.choice(ids, n, replace=False)))
        rows = {
            child: {
                "cosine": float(directions.cosine(drawn[child] - drawn[parent], drawn[parent])),
                "null": directions.null_independent(
                    share, len(self.table.ids(child)), len(self.table.ids(parent))
                ),
            }
            for parent, child in self._pairs()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def disjoint(self) -> pd.DataFrame:
        """Inner products from estimates that share no lemma; undefined where no parent is seen.

        A parent is seen where the lower end of the 95 % interval of its squared length is above 0.
        """
        bounds: dict[int, float] = {}
        rows: dict[int, dict[str, Any]] = {}
        for parent, child in self._pairs():
            above, below = self.lemmas(parent), self.lemmas(child)
            others = np.setdiff1d(above.keys, below.keys)
            if min(len(below.keys), len(others)) < N_FOLDS:
                rows[child] = {"defined": False, "why": "fewer than six lemmas"}
                continue
            if parent not in bounds:
                bounds[parent] = above.lower_bound(self.rng, n_boot=self.precision.n_boot)
            found = directions.disjoint(
                below, above, self.rng, n_partitions=self.precision.n_partitions
            )
            row: dict[str, Any] = {
                **vars(found),
                "pp_low": bounds[parent],
                "defined": True,
                "why": "",
            }
            if bounds[parent] <= 0:
                row |= {"defined": False, "why": "the parent is not above noise"}
            elif found.dd <= 0 or found.pp <= 0:
                row |= {"defined": False, "why": "the difference is not above noise"}
            else:
                scale = found.pp * found.dd
                row |= {
                    "cross": found.num / math.sqrt(scale),
                    "cross_squared": found.num_squared / scale,
                }
            rows[child] = row
        return pd.DataFrame.from_dict(rows, orient="index").reindex(
            columns=["num", "pp", "dd", "num_squared", "pp_low", "defined", "why", "cross",
                     "cross_squared"]
        )  # fmt: skip

    def lemmas(self, synset: int) -> Lemmas:
        """A concept by lemma; a token of several lemmas counts for the first."""
        if synset not in self._lemmas:
            rows = self.table.of(synset)
            keys, which = np.unique(rows["lemma"].str.lower(), return_inverse=True)
            order = torch.from_numpy(which)
            members = self.placed.at(rows["token_id"].to_numpy())
            sums = torch.zeros(len(keys), members.shape[1], dtype=torch.float64)
            counts = torch.from_numpy(np.bincount(which).astype(float))
            self._lemmas[synset] = Lemmas(
                keys.astype(str), sums.index_add_(0, order, members.double()), counts
            )
        return self._lemmas[synset]

    # ------------------------------------------------------------------ relations of several
    def siblings(self) -> pd.DataFrame:
        """(b) parent and difference of two of its children; (c) the same with two parents.

        In (c) p0 and p1 have one parent, and the children are p1's.
        """
        rows: list[dict[str, Any]] = []
        for parent, children in self._families().items():
            own = self.vectors[parent]
            sisters = [s for s in self._sisters(parent) if s != parent]
            for c0, c1 in combinations(children, 2):
                difference = self.vectors[c1] - self.vectors[c0]
                at = {"parent": parent, "child": c0, "other": c1}
                rows.append({
                    **at,
                    "relation": "b",
                    "cosine": float(directions.cosine(difference, own)),
                })
                if sisters:
                    step = own - self.vectors[sisters[0]]
                    cosine = float(directions.cosine(difference, step))
                    rows.append({**at, "relation": "c", "cosine": cosine})
        for parent, child in self._pairs():
            above = self.table.parents[parent]
            if above is not None:
                step, _ = self._parts(above, parent)
                cosine = float(directions.cosine(self._parts(parent, child)[0], step))
                at = {"parent": parent, "child": child, "other": above}
                rows.append({**at, "relation": "d", "cosine": cosine})
        return pd.DataFrame(rows, columns=["parent", "child", "other", "relation", "cosine"])

    def _families(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for parent, child in self._pairs():
            found[parent].append(child)
        return found

    def _sisters(self, synset: int) -> list[int]:
        above = self.table.parents[synset]
        return [] if above is None else self._families()[above]

    # ------------------------------------------------------------------ one row a parent
    def families(self) -> pd.DataFrame:
        """Level and simplex tests of each parent with enough children that have tokens held out."""
        rows: list[dict[str, Any]] = []
        draws = self.rng.spawn(1)[0]
        for parent, children in self._families().items():
            held_out = self._held_out(children)
            there = [c for c in children if (held_out["child"] == c).sum() >= 2]
            held_out = held_out[held_out["child"].isin(there)]
            if len(there) < MIN_CORNERS:
                continue
            labels = np.array([there.index(child) for child in held_out["child"]])
            tokens = self.placed.at(held_out["token_id"].to_numpy())
            own = self.vectors[parent]
            along = (tokens @ own / own.square().sum()).numpy()
            by_lemma = held_out.assign(b=along, at=labels).groupby(["at", "lemma"])["b"].mean()
            labels_of_lemmas = by_lemma.index.get_level_values("at").to_numpy()
            level = directions.levels(
                by_lemma.to_numpy(), labels_of_lemmas, self.rng, n_perm=self.precision.n_perm
            )
            corners = torch.stack([self.vectors[child] for child in there])
            shape = directions.simplex(
                corners, own, tokens, labels, self.rng, n_perm=self.precision.n_perm
            )
            rows.append({
                "parent": parent, "k": len(there), "n": len(labels), **vars(level), **vars(shape),
                "slant": self._slant(parent, there, draws),
            })  # fmt: skip
        return pd.DataFrame(rows).astype({"slant": "float64"}) if rows else pd.DataFrame()

    def _slant(self, parent: int, children: list[int], rng: np.random.Generator) -> float | None:
        """`largest_slant`, where the parent is above noise and all have lemmas enough."""
        above, below = self.lemmas(parent), [self.lemmas(child) for child in children]
        if min(len(one.keys) for one in (above, *below)) < N_FOLDS:
            return None
        if above.lower_bound(rng, n_boot=self.precision.n_boot) <= 0:
            return None
        return directions.largest_slant(above, below)

    # ------------------------------------------------------------------ for the figures
    def pairs(self) -> pd.DataFrame:
        """Cosine of each two concepts' vectors, one row a pair, in the order of the tree."""
        order = self._tree_order()
        vectors = torch.stack([self.vectors[synset] for synset in order])
        units = vectors / vectors.norm(dim=1, keepdim=True)
        cosines = (units @ units.T).numpy()
        first, second = np.triu_indices(len(order), k=1)
        synsets = np.array(order)
        return pd.DataFrame({
            "synset": synsets[first], "other": synsets[second], "place": first,
            "other_place": second, "cosine": cosines[first, second],
        })  # fmt: skip

    def _tree_order(self) -> list[int]:
        """Every concept behind its parent, before its parent's next child."""
        children: dict[int | None, list[int]] = defaultdict(list)
        for synset, parent in self.table.parents.items():
            children[parent].append(synset)

        def below(synset: int) -> list[int]:
            return [synset, *(one for child in children[synset] for one in below(child))]

        return [one for root in children[None] for one in below(root)]

    def projections(self) -> pd.DataFrame:
        """Held-out tokens of the two largest children of the largest parents.

        `along` is <g, l_p> / |l_p|^2 and `across` <g - (l_c0 + l_c1)/2, d> / |d|^2 with
        d = l_c1 - l_c0, so that the children are at -0.5 and 0.5. Child -1 is other tokens.
        """
        families = {p: self._held_out(c) for p, c in self._families().items() if len(c) > 1}
        largest = sorted(families, key=lambda parent: (-len(families[parent]), parent))
        frames: list[pd.DataFrame] = []
        for parent in largest[:N_DRAWN]:
            sizes = families[parent]["child"].value_counts()
            c0, c1 = sorted(sizes.index, key=lambda child: (-sizes[child], child))[:2]
            own, difference = self.vectors[parent], self.vectors[c1] - self.vectors[c0]
            middle = (self.vectors[c1] + self.vectors[c0]) / 2
            tokens = families[parent][families[parent]["child"].isin([c0, c1])]
            rows = [self.placed.at(tokens["token_id"].to_numpy()), self.placed.others[:N_OTHERS]]
            every = torch.cat(rows)
            called = [*(self.table.names[c] for c in tokens["child"]), *["other"] * len(rows[1])]
            frames.append(pd.DataFrame({
                "parent": parent, "parent_name": self.table.names[parent],
                "child": [*tokens["child"], *[-1] * len(rows[1])],
                "child_name": called,
                "along": (every @ own / own.square().sum()).numpy(),
                "across": ((every - middle) @ difference / difference.square().sum()).numpy(),
            }))  # fmt: skip
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def _held_out(self, children: list[int]) -> pd.DataFrame:
        """Held-out tokens of exactly one child."""
        rows = pd.concat([
            self.table.of(child, *HELD_OUT)[["token_id", "lemma"]].assign(child=child)
            for child in children
        ])  # fmt: skip
        rows["lemma"] = rows["lemma"].str.lower()
        return rows.drop_duplicates("token_id", keep=False)
