"""Facts: capitals, opposites, young animals, what comes next, sums of two numbers, colours."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from allostasis.tasks.probes.drafts import Block, Draft, Family, Length, answered, group
from allostasis.tasks.probes.order import hashed

LEAST = 10
"""Entities of one length: fewer leave too few prompts for a mean to stand for one."""

Facts = Mapping[str, str]


def read_facts(text: str) -> dict[str, str]:
    """Facts written as `entity: answer`, separated by commas or line ends.

    Example:
        >>> read_facts("a b: c, d: e")
        {'a b': 'c', 'd': 'e'}
    """
    pairs = (entry.split(":") for entry in re.split(r"[,\n]", text) if entry.strip())
    return {entity.strip(): answer.strip() for entity, answer in pairs}


CAPITALS = read_facts("""
    France: Paris, England: London, Germany: Berlin, Italy: Rome, Spain: Madrid, Portugal: Lisbon
    Austria: Vienna, Greece: Athens, Ireland: Dublin, Poland: Warsaw, Hungary: Budapest
    Belgium: Brussels, Sweden: Stockholm, Norway: Oslo, Denmark: Copenhagen, Finland: Helsinki
    Russia: Moscow, Japan: Tokyo, China: Beijing, Thailand: Bangkok, Vietnam: Hanoi
    Indonesia: Jakarta, Egypt: Cairo, Kenya: Nairobi, Iran: Tehran, Iraq: Baghdad, Syria: Damascus
    Lebanon: Beirut, Cuba: Havana, Peru: Lima, Chile: Santiago, Canada: Ottawa, Scotland: Edinburgh
    Wales: Cardiff, Romania: Bucharest, Bulgaria: Sofia, Serbia: Belgrade, Afghanistan: Kabul
    Libya: Tripoli, Ghana: Accra, Qatar: Doha, Jordan: Amman, Nepal: Kathmandu
    Venezuela: Caracas, Colombia: Bogota, Turkey: Ankara, Netherlands: Amsterdam
""")
OPPOSITES = read_facts("""
    hot: cold, big: small, tall: short, fast: slow, rich: poor, young: old, happy: sad, hard: soft
    dark: light, full: empty, open: closed, good: bad, up: down, high: low, early: late, wet: dry
    clean: dirty, strong: weak, thick: thin, wide: narrow, deep: shallow, loud: quiet, left: right
    north: south, east: west, inside: outside, alive: dead, rough: smooth, first: last
    heavy: light, cheap: expensive, easy: difficult, safe: dangerous, sharp: dull, public: private
    asleep: awake, guilty: innocent, simple: complex, legal: illegal, fresh: stale, tight: loose
    positive: negative, visible: invisible, ancient: modern, above: below, before: after
    male: female, possible: impossible, bitter: sweet, absent: present, temporary: permanent
    minimum: maximum, active: passive, ugly: beautiful, odd: even, generous: selfish, near: far
""")
YOUNG = read_facts("""
    dog: puppy, cat: kitten, cow: calf, elephant: calf, whale: calf, dolphin: calf, lion: cub
    bear: cub, tiger: cub, leopard: cub, panda: cub, wolf: pup, seal: pup, shark: pup
    sheep: lamb, goat: kid, hen: chick, chicken: chick, penguin: chick, bird: chick, horse: foal
    donkey: foal, zebra: foal, kangaroo: joey, deer: fawn, duck: duckling, pig: piglet
    buffalo: calf, moose: calf, cheetah: cub, fox: cub, bat: pup, rat: pup, raccoon: kit
    rabbit: kit, parrot: chick, otter: pup, camel: calf, giraffe: calf, rhino: calf, hippo: calf
    sparrow: chick, gull: chick, beaver: kit, skunk: kit, ferret: kit, badger: cub, hyena: cub
    pony: foal, mule: foal, ewe: lamb, walrus: pup, yak: calf, flamingo: chick, wallaby: joey
    koala: joey, jaguar: cub, lynx: kit
""")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip
COLOURS = read_facts("""
    banana: yellow, lemon: yellow, corn: yellow, butter: yellow, sun: yellow, grass: green
    lettuce: green, broccoli: green, spinach: green, frog: green, cucumber: green, sky: blue
    ocean: blue, sea: blue, snow: white, milk: white, salt: white, rice: white, cotton: white
    coal: black, crow: black, raven: black, tar: black, blood: red, strawberry: red, cherry: red
    tomato: red, ruby: red, rose: red, carrot: orange, pumpkin: orange, chocolate: brown
    soil: brown, coffee: brown, mud: brown, emerald: green, sapphire: blue, swan: white
    flour: white, peas: green, moss: green, pickle: green, fire truck: red, lobster: red, brick: red
    ketchup: red, mustard: yellow, canary: yellow, sunflower: yellow, daisy: white, bone: white
    paper: white, toast: brown, bear: brown, wood: brown, ink: black, tire: black, night: black
    plum: purple, grape: purple, lavender: purple, violet: purple, pig: pink, flamingo: pink
""")


def _after(names: Sequence[str]) -> dict[str, str]:
    return dict(itertools.pairwise(names))


SUMS = {
    f"{NUMBERS[a]} and {NUMBERS[b]}": NUMBERS[a + b + 1] for a in range(9) for b in range(a + 1, 9)
}
# what follows in the same row is never another fact's answer: days go with days
KNOWN: Mapping[str, Sequence[Facts]] = {
    "after": (_after(MONTHS), _after(DAYS), _after(LETTERS), _after(NUMBERS)),
    "capital": (CAPITALS,),
    "colour": (COLOURS,),
    "opposite": (OPPOSITES,),
    "sum": (SUMS,),
    "young": (YOUNG,),
}
TEMPLATES: Mapping[str, Sequence[str]] = {
    "after": (
        "The one that comes right after {x} is",
        "If you start at {x} and go on by one, you get to",
        "What comes after {x}? After {x} comes",
        "First comes {x}, and right after {x} comes",
    ),
    "capital": (
        "The capital of {x} is",
        "The capital city of {x} is called",
        "In {x}, the government sits in the capital, the city of",
        "A trip to the capital of {x} is a trip to",
    ),
    "colour": (
        "The colour of the {x} is usually",
        "When you think of the {x}, the colour you see is",
        "What colour is the {x}? The usual colour of the {x} is",
        "Everybody knows the colour of the {x}, and that colour is",
    ),
    "opposite": (
        "The opposite of {x} is",
        "The word that means the opposite of {x} is",
        "What is the opposite of {x}? The opposite is",
        "If something is not {x} but the very opposite, it is",
    ),
    "sum": (
        "The sum of {x} is",
        "If you add {x}, you get",
        "When you count {x} together, the total is",
        "Adding up {x} gives a total of",
    ),
    "young": (
        "A young {x} is called a",
        "The name for a baby {x} is",
        "What do you call a young {x}? You call it a",
        "When a {x} has a baby, that baby is called a",
    ),
}


def entities(family: str, length: Length) -> Iterator[Block]:
    """Two entities of one length, each the other's corrupt prompt; each in one pair only."""
    for first, second in _pairs(family, length):
        for number, template in enumerate(TEMPLATES[family]):
            yield tuple(
                Draft(
                    family=family, template=f"{family}-{number}", cell=family,
                    group=group(first[0], second[0]),
                    clean=template.format(x=entity), corrupt=template.format(x=other),
                    target=f" {answer}", foil=f" {wrong}",
                )
                for (entity, answer), (other, wrong) in ((first, second), (second, first))
            )  # fmt: skip


def _pairs(family: str, length: Length) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Entities of one length and unlike answers that neither prompt mentions, two by two."""
    askable = [answered(facts, length) for facts in KNOWN[family]]
    sizes = Counter(length(entity) for facts in askable for entity in facts)
    for facts in askable:
        waiting = [entity for entity in hashed(facts, family) if sizes[length(entity)] >= LEAST]
        while waiting:
            first = waiting.pop(0)
            for second in waiting:
                said, answers = f"{first} {second}".split(), {facts[first], facts[second]}
                is_plain = len(answers) == 2 and answers.isdisjoint(said)
                if is_plain and length(second) == length(first):
                    waiting.remove(second)
                    yield (first, facts[first]), (second, facts[second])
                    break


FAMILIES: Mapping[str, Family] = {name: partial(entities, name) for name in KNOWN}
