"""Logic: one of two, two conditionals and a fact, syllogisms with invented words, AND and OR."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from allostasis.tasks.probes.drafts import (
    Block,
    Draft,
    Length,
    answers,
    cell,
    group,
    known,
    pairs,
)
from allostasis.tasks.probes.negation import COLOURS
from allostasis.tasks.probes.order import draw
from allostasis.tasks.sentences import NAMES, OBJECTS, PLACES

INVENTED = (
    "wug", "dax", "blick", "fep", "zorp", "mib", "tove", "glorp", "snark", "quib", "plim", "vorn",
    "drell", "kip", "lorp", "zib",
)  # fmt: skip
LEVELS = tuple(itertools.product(("affirmed", "denied"), ("with", "without")))
"""Whether the fact says who has it or who does not, and whether the one with it is asked for."""
WORD_PAIRS = 12
"""Draws of invented words for each pair of colours: some are of unlike length."""
WEATHER = ("cold", "dark", "dry", "hot", "late", "sunny", "warm", "wet")

# what is known of both, the fact {f}, the question; verbs by whether fact and question affirm
EITHER: Sequence[tuple[str, Mapping[str, str], Mapping[str, str]]] = (
    (
        "Either {a} or {b} has the {k}, but not both. {f} {fact} the {k}, so the one who {query} "
        "the {k} is",
        {"affirmed": "has", "denied": "does not have"},
        {"with": "has", "without": "does not have"},
    ),
    (
        "One of {a} and {b} took the {k}. It {fact} {f}. The person who {query} the {k} was",
        {"affirmed": "was", "denied": "was not"},
        {"with": "took", "without": "did not take"},
    ),
    (
        "The {k} is with {a} or with {b}. We know that it {fact} with {f}. So the person {query} "
        "the {k} is",
        {"affirmed": "is", "denied": "is not"},
        {"with": "with", "without": "without"},
    ),
)
# two rules and the fact, which comes first or last; conditions and answers of one kind
CONDITIONAL: Sequence[tuple[str, str, str, Sequence[str], Sequence[str]]] = (
    (
        "If it is {u}, {n} goes to the {x}, and if it is {v}, {n} goes to the {y}.",
        "It is {f}.",
        "So {n} goes to the",
        WEATHER,
        PLACES,
    ),
    (
        "When the light is {u}, {n} takes the {x}, and when it is {v}, {n} takes the {y}.",
        "The light is {f}.",
        "So {n} takes the",
        COLOURS,
        OBJECTS,
    ),
    (
        "The rule for {n} is this: a {u} card means the {x}, and a {v} card means the {y}.",
        "The card is {f}.",
        "Following the rule, {n} picks the",
        COLOURS,
        OBJECTS,
    ),
)
SYLLOGISM: Sequence[tuple[str, str]] = (
    ("one", "Every {p} is {x} and every {q} is {y}. {n} has a {f}, so what {n} has is"),
    ("one", "Each {p} is {x}; each {q} is {y}. This is a {f}. The colour of this {f} is"),
    ("one", "If something is a {p}, it is {x}. If something is a {q}, it is {y}. A {f} is always"),
    (
        "two",
        "Every {p} is a {r} and every {q} is a {s}. Every {r} is {x} and every {s} is {y}. {n} has "
        "a {f}, so what {n} has is",
    ),
    (
        "two",
        "Each {p} is a {r}; each {q} is a {s}. Each {r} is {x}; each {s} is {y}. This is a {f}. "
        "The colour of this {f} is",
    ),
    (
        "two",
        "If something is a {p}, it is a {r}. If something is a {q}, it is a {s}. A {r} is {x} and "
        "a {s} is {y}. A {f} is always",
    ),
)
# what both have, then the question; {w} is what nobody has
BOTH: Sequence[tuple[str, Mapping[str, str]]] = (
    (
        "{a} has a {k} and a {x}. {b} has a {k} and a {y}.",
        {
            "and": "The one who has a {k} and a {z} is",
            "or": "The one who has a {w} or a {z} is",
        },
    ),
    (
        "In the bag of {a} there are a {k} and a {x}. In the bag of {b} there are a {k} and a {y}.",
        {
            "and": "The bag with a {k} and a {z} belongs to",
            "or": "The bag with a {w} or a {z} belongs to",
        },
    ),
    (
        "{a} bought a {k} and a {x}, and {b} bought a {k} and a {y}.",
        {
            "and": "The person who bought a {k} and a {z} was",
            "or": "The person who bought a {w} or a {z} was",
        },
    ),
)


def either(length: Length) -> Iterator[Block]:
    """One of two people has it, and a fact about one of them decides; the corrupt has the other."""
    objects = known(OBJECTS, length)
    for names in pairs(answers(NAMES, length), "either"):
        things = draw(objects, len(LEVELS), "either", names)
        for (fact, query), thing in zip(LEVELS, things, strict=True):
            ordered = _turned(names, "either", fact, query)
            for number, (template, facts, queries) in enumerate(EITHER):
                texts = [
                    template.format(
                        a=ordered[0], b=ordered[1], k=thing, f=name, fact=facts[fact],
                        query=queries[query],
                    )
                    for name in ordered
                ]  # fmt: skip
                if (fact == "affirmed") != (query == "with"):
                    texts.reverse()
                yield _two("either", number, texts, ordered, fact=fact, query=query)


def conditional(length: Length) -> Iterator[Block]:
    """Two rules and the fact that says which of them holds; the corrupt prompt has the other."""
    names = known(NAMES, length)
    for number, (rules, fact, question, conditions, things) in enumerate(CONDITIONAL):
        for pair in pairs(answers(things, length), "conditional", number):
            for place in ("first", "last"):
                ordered = _turned(pair, "conditional", number, place)
                salt = ("conditional", number, pair, place)
                (u, v), (name,) = draw(known(conditions, length), 2, *salt), draw(names, 1, *salt)
                parts = (fact, rules, question) if place == "first" else (rules, fact, question)
                texts = [
                    " ".join(parts).format(u=u, v=v, n=name, x=ordered[0], y=ordered[1], f=f)
                    for f in (u, v)
                ]
                yield _two("conditional", number, texts, ordered, fact=place)


def syllogism(length: Length) -> Iterator[Block]:
    """Two invented kinds with their colours, and a thing of one kind; the corrupt has the other."""
    names, invented = known(NAMES, length), known(INVENTED, length)
    for pair in pairs(answers(COLOURS, length), "syllogism"):
        for number, (steps, template) in enumerate(SYLLOGISM):
            ordered = _turned(pair, "syllogism", number)
            for time in range(WORD_PAIRS):
                salt = ("syllogism", number, pair, time)
                (p, q, r, s), (name,) = draw(invented, 4, *salt), draw(names, 1, *salt)
                words = {"p": p, "q": q, "r": r, "s": s, "n": name}
                texts = [
                    template.format(**words, x=ordered[0], y=ordered[1], f=kind) for kind in (p, q)
                ]
                yield _two("syllogism", number, texts, ordered, steps=steps)


def operators(length: Length) -> Iterator[Block]:
    """Who has this AND that, or this OR what nobody has; the corrupt prompt swaps two things."""
    objects = known(OBJECTS, length)
    for names in pairs(answers(NAMES, length), "operators"):
        for operator, (number, (facts, queries)) in itertools.product(
            ("and", "or"), enumerate(BOTH)
        ):
            ordered = _turned(names, "operators", operator, number)
            k, x, y, w = draw(objects, 4, "operators", names, operator)
            texts = [
                f"{facts} {queries[operator]}".format(
                    a=ordered[0], b=ordered[1], k=k, w=w, x=first, y=second, z=x
                )
                for first, second in ((x, y), (y, x))
            ]
            yield _two("operators", number, texts, ordered, operator=operator)


def _turned(words: tuple[str, str], *salt: object) -> tuple[str, str]:
    """The pair in one of its two orders."""
    first, second = draw(words, 2, *salt)
    return first, second


def _two(
    family: str, number: int, texts: Sequence[str], ordered: Sequence[str], **levels: str
) -> Block:
    """Two rows: one in which the first word is right, one in which the second is."""
    right = ("first", *texts, *ordered), ("second", *texts[::-1], *ordered[::-1])
    return tuple(
        Draft(
            family=family, template=f"{family}-{number}", group=group(*ordered),
            cell=cell(family, **levels, right=which), clean=clean, corrupt=corrupt,
            target=f" {target}", foil=f" {foil}",
        )
        for which, clean, corrupt, target, foil in right
    )  # fmt: skip
