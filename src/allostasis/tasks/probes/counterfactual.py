"""Counterfactuals: two things have swapped their colours, their capitals or their food.

The corrupt prompt either tells the world as it is, or asks for the other thing; both make the foil
right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from allostasis.tasks.probes.drafts import (
    Block,
    Draft,
    Family,
    Length,
    answered,
    cell,
    group,
    pairs,
)
from allostasis.tasks.probes.facts import CAPITALS, COLOURS, read_facts

FOOD = read_facts("""
    cows: grass, rabbits: carrots, monkeys: bananas, bears: honey, pandas: bamboo, squirrels: nuts
    birds: seeds, dogs: bones, cats: fish, lions: meat, horses: hay, frogs: flies, pigs: corn
    spiders: insects, goats: leaves, bats: fruit, ants: sugar, chickens: grain, mice: cheese
    whales: shrimp, deer: berries, worms: soil, snakes: eggs
""")
# first {x} and {y} with what they get, {u} and {v}; then the one that is asked for
WORLDS: Mapping[str, tuple[Mapping[str, str], Sequence[str]]] = {
    "colours": (
        COLOURS,
        (
            "In a world where the {x} is {u} and the {y} is {v}, the colour of the {z} is",
            "Imagine that the {x} turned {u} and the {y} turned {v}. The colour of the {z} is now",
            "In this story the {x} is {u}, while the {y} is {v}. The {z} of the story has the "
            "colour",
        ),
    ),
    "capitals": (
        CAPITALS,
        (
            "Imagine that the capital of {x} is {u} and the capital of {y} is {v}. In that world, "
            "the capital of {z} is",
            "Suppose that {x} and {y} swapped capitals: {x} got {u} and {y} got {v}. Now the "
            "capital of {z} is",
            "In a novel, {u} is the capital of {x} and {v} is the capital of {y}. So in the novel "
            "the capital of {z} is",
        ),
    ),
    "food": (
        FOOD,
        (
            "Suppose that {x} eat only {u} and {y} eat only {v}. What do {z} eat? They eat",
            "In a strange land {x} live on {u} and {y} live on {v}. In this land {z} eat",
            "After the change, {x} feed on {u} and {y} feed on {v}. Since then {z} feed on",
        ),
    ),
}


def swapped(family: str, length: Length) -> Iterator[Block]:
    """Two things with each other's values, each of them asked for once."""
    every, templates = WORLDS[family]
    facts = answered(every, length)
    for things in pairs(tuple(facts), family):
        if facts[things[0]] == facts[things[1]]:
            continue
        levels = itertools.product(enumerate(templates), (False, True), ("world", "asked"))
        for (number, template), is_turned, kind in levels:
            x, y = things[::-1] if is_turned else things
            swap = {"x": x, "y": y, "u": facts[y], "v": facts[x]}
            true = {"x": x, "y": y, "u": facts[x], "v": facts[y]}
            rows = []
            for asked, other in ((x, y), (y, x)):
                corrupt = (true | {"z": asked}) if kind == "world" else (swap | {"z": other})
                rows.append(
                    Draft(
                        family=family, template=f"{family}-{number}-{kind}", group=group(x, y),
                        cell=cell(
                            family, true="second" if asked == x else "first",
                            asked="a" if asked == things[0] else "b",
                        ),
                        clean=template.format(**swap, z=asked), corrupt=template.format(**corrupt),
                        target=f" {facts[other]}", foil=f" {facts[asked]}",
                    )
                )  # fmt: skip
            yield tuple(rows)


FAMILIES: Mapping[str, Family] = {name: partial(swapped, name) for name in WORLDS}
