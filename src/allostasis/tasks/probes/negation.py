"""Negation: who has it and who does not, what something is if it is not the other, two colours.

In every family the denied word is as often the answer as the affirmed one, so that neither "what is
denied" nor "what is not mentioned" answers more than half of the questions.
"""

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
from allostasis.tasks.probes.order import draw, hashed
from allostasis.tasks.sentences import NAMES, OBJECTS

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "purple", "pink")
LEVELS = tuple(itertools.product(("with", "without"), (False, True)))
"""Whether the one with or without is asked for, and whether the pair's order is turned round."""

# affirmed, denied; then what is asked for, with and without
HAVING: Sequence[tuple[str, str, str, Mapping[str, str]]] = (
    (
        "{a} and {b}.",
        "{name} has a {k}",
        "{name} does not have a {k}",
        {"with": "The person with a {k} is", "without": "The person without a {k} is"},
    ),
    (
        "There are two people: {a}, but {b}.",
        "{name} owns a {k}",
        "{name} does not own a {k}",
        {
            "with": "The one who owns a {k} is",
            "without": "The one who does not own a {k} is",
        },
    ),
    (
        "{a}. {b}.",
        "{name} brought a {k}",
        "{name} did not bring a {k}",
        {
            "with": "The person who brought a {k} was",
            "without": "The person who did not bring a {k} was",
        },
    ),
)
COLOURED: Sequence[tuple[str, Mapping[str, str]]] = (
    (
        "The {k} is {a}, it is {b}.",
        {
            "with": "The colour of the {k} is",
            "without": "The colour that the {k} does not have is",
        },
    ),
    (
        "Somebody says that the {k} is {a} and that it is {b}.",
        {
            "with": "The colour that the {k} is said to have is",
            "without": "The colour that the {k} is said not to have is",
        },
    ),
    (
        "We know two things about the {k}: it is {a}; it is {b}.",
        {
            "with": "So the {k} has the colour",
            "without": "So the {k} does not have the colour",
        },
    ),
)
STATES: Mapping[tuple[str, str], Sequence[str]] = {
    ("closed", "open"): ("door", "window", "shop", "box", "gate"),
    ("cold", "hot"): ("water", "soup", "tea", "stove"),
    ("empty", "full"): ("glass", "bottle", "bag", "bus"),
    ("dry", "wet"): ("road", "towel", "shirt", "grass"),
    ("clean", "dirty"): ("shirt", "kitchen", "plate", "car"),
    ("poor", "rich"): ("man", "family", "town", "country"),
    ("heavy", "light"): ("box", "bag", "stone", "chair"),
    ("loud", "quiet"): ("music", "room", "street", "class"),
    ("alive", "dead"): ("plant", "animal", "fish", "tree"),
    ("narrow", "wide"): ("road", "river", "bridge", "bed"),
    ("easy", "hard"): ("test", "question", "game", "task"),
    ("dull", "sharp"): ("knife", "blade", "pencil", "sword"),
    ("long", "short"): ("rope", "story", "road", "movie"),
    ("big", "small"): ("dog", "house", "garden", "ship"),
    ("fast", "slow"): ("car", "train", "boat", "horse"),
    ("new", "old"): ("house", "coat", "book", "phone"),
    ("happy", "sad"): ("child", "song", "story", "girl"),
    ("strong", "weak"): ("man", "rope", "team", "horse"),
    ("cheap", "expensive"): ("car", "ring", "meal", "hotel"),
    ("thick", "thin"): ("book", "wall", "ice", "rope"),
    ("deep", "shallow"): ("river", "lake", "hole", "pool"),
    ("high", "low"): ("wall", "shelf", "price", "bridge"),
    ("soft", "hard"): ("bed", "pillow", "ground", "seat"),
    ("dangerous", "safe"): ("road", "bridge", "city", "game"),
    ("early", "late"): ("train", "bus", "flight", "guest"),
    ("dark", "bright"): ("room", "street", "sky", "hall"),
    ("rough", "smooth"): ("road", "sea", "wall", "skin"),
    ("public", "private"): ("park", "school", "beach", "meeting"),
    ("simple", "complex"): ("plan", "problem", "machine", "rule"),
    ("awake", "asleep"): ("baby", "cat", "guard", "child"),
}
DENIED: Sequence[str] = (
    "The {k} is {x}, so the {k} is",
    "It is known that the {k} is {x}. Therefore the {k} must be",
    "How is the {k}? The {k} is {x}, which means that it is",
)


def possession(length: Length) -> Iterator[Block]:
    """Of two people one has a thing and the other does not; the corrupt prompt turns it round."""
    objects = known(OBJECTS, length)
    for names in pairs(answers(NAMES, length), "possession"):
        things = draw(objects, len(LEVELS), "possession", names)
        for number, (template, has, lacks, queries) in enumerate(HAVING):
            for (query, is_turned), thing in zip(LEVELS, things, strict=True):
                ordered = names[::-1] if is_turned else names
                texts = []
                for clauses in ((has, lacks), (lacks, has)):
                    told = [
                        clause.format(name=name, k=thing)
                        for clause, name in zip(clauses, ordered, strict=True)
                    ]
                    text = f"{template.format(a=told[0], b=told[1])} {queries[query]}"
                    texts.append(text.format(k=thing))
                yield _denials("possession", number, texts, ordered, query, is_turned)


def colours(length: Length) -> Iterator[Block]:
    """A thing has one colour and not another; the corrupt prompt denies the other one."""
    objects = known(OBJECTS, length)
    for names in pairs(answers(COLOURS, length), "colours"):
        things = draw(objects, len(LEVELS), "colours", names)
        for number, (template, queries) in enumerate(COLOURED):
            for (query, is_turned), thing in zip(LEVELS, things, strict=True):
                first, second = ordered = names[::-1] if is_turned else names
                texts = [
                    f"{template} {queries[query]}".format(a=a, b=b, k=thing)
                    for a, b in ((first, f"not {second}"), (f"not {first}", second))
                ]
                yield _denials("colours", number, texts, ordered, query, is_turned)


def _denials(
    family: str, number: int, texts: Sequence[str], ordered: Sequence[str], query: str,
    is_turned: bool,
) -> Block:  # fmt: skip
    """Two rows: the second word is denied, or the first."""
    rows = []
    for denied, (clean, corrupt) in (("second", texts), ("first", texts[::-1])):
        first_is_right = (denied == "second") == (query == "with")
        target, foil = ordered if first_is_right else ordered[::-1]
        order = "ba" if is_turned else "ab"
        rows.append(
            Draft(
                family=family, template=f"{family}-{number}", group=group(*ordered),
                cell=cell(family, denied=denied, query=query, order=order),
                clean=clean, corrupt=corrupt, target=f" {target}", foil=f" {foil}",
            )
        )  # fmt: skip
    return tuple(rows)


def states(length: Length) -> Iterator[Block]:
    """What a thing is if it is not the opposite, and what it is if that is said outright."""
    for words in hashed(STATES, "states"):
        if len(answers(words, length)) < len(words):
            continue
        things = hashed(known(STATES[words], length), "states", words)
        for number, template in enumerate(DENIED):
            for form, thing in itertools.product(("denied", "affirmed"), things):
                particle = "not" if form == "denied" else "still"
                texts = {word: template.format(k=thing, x=f"{particle} {word}") for word in words}
                rows = []
                for said, other in (words, words[::-1]):
                    target, foil = (other, said) if form == "denied" else (said, other)
                    rows.append(
                        Draft(
                            family="states", template=f"states-{number}", group=group(*words),
                            cell=cell("states", form=form), clean=texts[said],
                            corrupt=texts[other], target=f" {target}", foil=f" {foil}",
                        )
                    )  # fmt: skip
                yield tuple(rows)
