"""Prompts of the indirect-object task, balanced so that no preference looks like the task."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from allostasis.tasks.sentences import TEMPLATES, Sentences, fill, shuffled

Order = Literal["ABBA", "BABA"]
Split = Literal["discovery", "evaluation"]
Form = tuple[int, Order]

ORDERS: tuple[Order, Order] = ("ABBA", "BABA")


@dataclass(frozen=True)
class Prompt:
    """One sentence that ends where the indirect object follows, with its partners.

    Attributes:
        example: Number of the prompt, unlike any other's in either split.
        split: `discovery` chooses heads, `evaluation` measures their effects.
        template: Index into `TEMPLATES`.
        order: `ABBA`: the indirect object opens the sentence. `BABA`: the subject does.
        io: The indirect object: the name said once, the answer.
        s: The subject: the name said twice, the foil.
        place: Where it happens.
        object: What is given.
        text: The sentence, without its answer.
        ids: Its tokens.
        io_id: Token of the answer, as it continues the sentence.
        s_id: Token of the foil, as it would continue the sentence.
        roles: Token positions of IO, S1, S1+1, S2 and END.
        cluster: Template and unordered pair of names: what prompts share that are not independent.
        abc_ids: The sentence with three other names: same template, place, object and length.
        swap_ids: The sentence with IO where S2 was, so that S is the answer; else the same.
    """

    example: int
    split: Split
    template: int
    order: Order
    io: str
    s: str
    place: str
    object: str
    text: str
    ids: tuple[int, ...]
    io_id: int
    s_id: int
    roles: Mapping[str, int] = field(hash=False)
    cluster: str
    abc_ids: tuple[int, ...]
    swap_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompts:
    """All prompts of a run.

    Attributes:
        discovery: Prompts on which heads are chosen.
        evaluation: Prompts on which effects are measured; they share no pair of names with the
            others.
        references: Tokens of ABC prompts by (template, order): what mean ablation averages over.
        dropped: Words that are not one token here, by kind: `name`, `place`, `object`.
        sha256: Hash of every prompt, partner and reference.
    """

    discovery: tuple[Prompt, ...]
    evaluation: tuple[Prompt, ...]
    references: Mapping[Form, tuple[tuple[int, ...], ...]] = field(hash=False)
    dropped: Mapping[str, list[str]] = field(hash=False)
    sha256: str


def make(
    sentences: Sentences, *, seed: int, n_discovery: int, n_evaluation: int, n_reference: int
) -> Prompts:
    """Draw all prompts of a run.

    In each split IO opens half of the sentences, every template occurs equally often (+-1), and
    every name is IO and S equally often (+-1). References have randomness of their own, so that
    they do not depend on the sizes of the splits.

    Args:
        sentences: The words that may be used, and their tokens.
        seed: Seed of the data, at least 0.
        n_discovery: Prompts of the discovery split; even.
        n_evaluation: Prompts of the evaluation split; even.
        n_reference: ABC prompts per template and order.

    Raises:
        ValueError: There are not as many different prompts.
    """
    splitting, discovery, evaluation, reference = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(4)
    )
    chosen, measured = _pairs(sentences.names, (n_discovery, n_evaluation), splitting)
    splits = (
        _split("discovery", chosen, sentences, discovery, first=n_evaluation),
        _split("evaluation", measured, sentences, evaluation, first=0),
    )
    references: dict[Form, tuple[tuple[int, ...], ...]] = {
        (template, order): _references(template, n_reference, sentences, reference)
        for template in range(len(TEMPLATES))
        for order in ORDERS
    }
    digest = _sha256(splits[0] + splits[1], references)
    return Prompts(*splits, references, sentences.dropped, digest)


def _split(
    split: Split, pairs: Sequence[tuple[str, str]], sentences: Sentences,
    rng: np.random.Generator, *, first: int,
) -> tuple[Prompt, ...]:  # fmt: skip
    """One prompt a pair (IO, S), in random order of templates, places and objects."""
    n = len(pairs)
    forms = _forms(n, rng)
    things = [*zip(_deal(sentences.places, n, rng), _deal(sentences.objects, n, rng), strict=True)]
    made: set[tuple[object, ...]] = set()
    rows: list[Prompt] = []
    for pair, form, thing in zip(pairs, forms, things, strict=True):
        if (pair, form, thing) in made:
            every = itertools.product(sentences.places, sentences.objects)
            free = [other for other in every if (pair, form, other) not in made]
            if not free:
                raise ValueError(
                    f"{n} prompts of the {split} split are too many for {len(sentences.names)} "
                    f"names, {len(sentences.places)} places and {len(sentences.objects)} objects: "
                    f"no new one is left for {' and '.join(pair)}; lower "
                    f"{'n_examples' if split == 'evaluation' else 'n_discovery'}"
                )
            thing = free[rng.integers(len(free))]
        made.add((pair, form, thing))
        rows.append(_prompt(first + len(rows), split, pair, form, thing, sentences, rng))
    return tuple(rows)


def _prompt(
    example: int, split: Split, pair: tuple[str, str], form: Form, things: tuple[str, str],
    sentences: Sentences, rng: np.random.Generator,
) -> Prompt:  # fmt: skip
    (io, s), (template, order) = pair, form
    first, second = (io, s) if order == "ABBA" else (s, io)
    words = fill((first, second, s), *things)
    others = shuffled([name for name in sentences.names if name not in pair], rng)
    at = sentences.positions[template]
    io_at, s_at = (at["A"], at["B"]) if order == "ABBA" else (at["B"], at["A"])
    end = sentences.lengths[template] - 1
    return Prompt(
        example=example, split=split, template=template, order=order, io=io, s=s,
        place=things[0], object=things[1], text=TEMPLATES[template].format(**words),
        ids=sentences.tokens(template, words),
        io_id=sentences.token[io], s_id=sentences.token[s],
        roles={"IO": io_at, "S1": s_at, "S1+1": s_at + 1, "S2": at["S"], "END": end},
        cluster=f"t{template}:{'|'.join(sorted(pair))}",
        abc_ids=sentences.tokens(template, fill(others, *things)),
        swap_ids=sentences.tokens(template, words | {"S": io}),
    )  # fmt: skip


def _references(
    template: int, n: int, sentences: Sentences, rng: np.random.Generator
) -> tuple[tuple[int, ...], ...]:
    """Tokens of `n` different ABC prompts of a template."""
    made: dict[tuple[int, ...], None] = {}
    while len(made) < n:
        place = sentences.places[rng.integers(len(sentences.places))]
        thing = sentences.objects[rng.integers(len(sentences.objects))]
        words = fill(shuffled(sentences.names, rng), place, thing)
        made[sentences.tokens(template, words)] = None
    return tuple(made)


def _pairs(
    names: Sequence[str], sizes: tuple[int, int], rng: np.random.Generator
) -> tuple[list[tuple[str, str]], ...]:
    """Pairs (IO, S) of two splits that share no unordered pair, every name as often IO as S.

    The names stand on a circle in random order. All pairs at one distance make every name IO once
    and S once, and a part of them, taken from neighbour to neighbour, does so but for its ends.
    Each split has distances of its own; one that comes again turns IO and S round.
    """
    circle = shuffled(names, rng)
    n = len(circle)
    distances = [int(d) + 1 for d in rng.permutation((n - 1) // 2)]
    rounds = [math.ceil(size / n) for size in sizes]
    cut = rounds[0]
    if sum(rounds) > len(distances):
        cut = min(max(len(distances) * rounds[0] // sum(rounds), 1), len(distances) - 1)
    made: list[list[tuple[str, str]]] = []
    for size, own in zip(sizes, (distances[:cut], distances[cut:]), strict=True):
        arcs: list[tuple[str, str]] = []
        for lap in itertools.count():
            for distance in own:
                arcs += _chords(circle, distance, backwards=lap % 2 == 1)
            if len(arcs) >= size:
                break
        made.append(shuffled(arcs[:size], rng))
    return tuple(made)


def _chords(circle: Sequence[str], distance: int, *, backwards: bool) -> list[tuple[str, str]]:
    """Each name with the one at a distance, in order of the closed paths that these chords make."""
    n, paths = len(circle), math.gcd(distance, len(circle))
    stops = [(start + k * distance) % n for start in range(paths) for k in range(n // paths)]
    ends = [(circle[i], circle[(i + distance) % n]) for i in stops]
    return [(later, earlier) for earlier, later in ends] if backwards else ends


def _forms(n: int, rng: np.random.Generator) -> list[Form]:
    """Templates and orders of `n` prompts: each template +-1 as often, each order in half of them.

    Templates come in laps; orders alternate within a lap and turn round in the next. The first `n`
    of these are shuffled.
    """
    forms: list[Form] = []
    while len(forms) < n:
        lap = shuffled(range(len(TEMPLATES)), rng)
        for turn in (0, 1):
            for i, template in enumerate(lap):
                forms.append((template, ORDERS[(i + turn) % 2]))
    return shuffled(forms[:n], rng)


def _deal(words: Sequence[str], n: int, rng: np.random.Generator) -> list[str]:
    """`n` words, each +-1 as often as any other."""
    laps = [shuffled(words, rng) for _ in range(math.ceil(n / len(words)))]
    return [word for lap in laps for word in lap][:n]


def _sha256(prompts: Sequence[Prompt], references: Mapping[Form, Sequence[Sequence[int]]]) -> str:
    content = {
        "prompts": [vars(prompt) for prompt in prompts],
        "references": [[*form, ids] for form, ids in references.items()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
