"""The sentences of the indirect-object task, and their tokens under any tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Literal, TypeVar

import numpy as np

Kind = Literal["name", "place", "object"]
Encode = Callable[[str], list[int]]
T = TypeVar("T")

# A and B open the sentence, S comes again (in an ABC prompt it is a third name). Every slot follows
# a space, and "a" stands before objects, so that none begins with a vowel.
TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {object} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {S} gave a {object} to",
    "While {A} and {B} were working at the {place}, {S} decided to give a {object} to",
    "After {A} and {B} had lunch at the {place}, {S} handed a {object} to",
    "The friends {A} and {B} found a {object} at the {place}. {S} gave it to",
    "One day {A} and {B} walked to the {place}. There {S} offered a {object} to",
    "As {A} and {B} were talking about the {place}, {S} showed a {object} to",
    "In the evening {A} and {B} came to the {place} with a {object}, and {S} handed it to",
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+|[^\w\s]", text))


NAMES = _words("""
    Adam Alan Alice Amanda Amy Andrew Angela Anna Anthony Arthur Barbara Benjamin Brian Charles
    Charlotte Christine Claire Daniel David Diana Edward Elizabeth Ellen Emily Emma Eric Fred George
    Hannah Harry Helen Henry Ian Jack James Jane Jason Jennifer Jessica John Joseph Julia Karen Kate
    Keith Kevin Larry Laura Linda Lisa Louis Lucy Luke Margaret Maria Martha Martin Mary Matthew
    Michael Michelle Nancy Nathan Nicole Oliver Patricia Paul Peter Philip Rachel Rebecca Richard
    Robert Roger Ryan Samuel Sandra Sara Sarah Scott Simon Sophie Stephen Steve Susan Thomas Tom
    Victoria William
""")
PLACES = _words("""
    airport bakery bank beach castle church cinema farm forest gallery garden gym harbor hospital
    hotel lake library mall market museum office palace park pool restaurant river school stadium
    station store theater village zoo
""")
OBJECTS = _words("""
    bag ball basket blanket book bottle box cake camera candle card coat coin computer cup drink
    flower gift guitar hat jacket key knife lamp letter map newspaper pen phone picture ring
    sandwich shirt sword ticket toy watch
""")
POOLS: Mapping[Kind, tuple[str, ...]] = {"name": NAMES, "place": PLACES, "object": OBJECTS}
# every word and punctuation mark that a sentence may hold
WORDS = tuple(
    dict.fromkeys((
        *_words(" ".join(re.sub(r"\{\w+\}", "", template) for template in TEMPLATES)),
        *NAMES, *PLACES, *OBJECTS,
    ))
)  # fmt: skip

_SLOTS: Mapping[Kind, tuple[str, ...]] = {
    "name": ("A", "B", "S"), "place": ("place",), "object": ("object",),
}  # fmt: skip
_LEAST: Mapping[Kind, int] = {"name": 20, "place": 3, "object": 3}


class Sentences:
    """The templates under one tokenizer, with the words that are single tokens there.

    Args:
        encode: Text to token ids.
        unknown: The id that stands for what the vocabulary lacks, or None.

    Attributes:
        token: The token of each usable word.
        names: Usable names; `places` and `objects` likewise.
        dropped: Words that are not one token, by kind.
        lengths: Number of tokens of each template.
        positions: Token position of each slot, by template.

    Raises:
        ValueError: Fewer than 20 names, 3 places or 3 objects are single tokens.
    """

    def __init__(self, encode: Encode, *, unknown: int | None) -> None:
        self._encode = encode
        usable: dict[Kind, dict[str, int]] = {
            kind: single_tokens(kind, encode, unknown=unknown) for kind in POOLS
        }
        self.dropped: dict[str, list[str]] = {
            kind: [word for word in pool if word not in usable[kind]]
            for kind, pool in POOLS.items()
        }
        for kind, found in usable.items():
            if len(found) < _LEAST[kind]:
                raise ValueError(
                    f"only {len(found)} of {len(POOLS[kind])} {kind}s are one token under this "
                    f"tokenizer, and the task needs {_LEAST[kind]}; dropped: "
                    f"{', '.join(self.dropped[kind])}. Take a model whose vocabulary has more "
                    f"English words, or add {kind}s to {kind.upper()}S in {__name__}"
                )
        self.token = {word: token for found in usable.values() for word, token in found.items()}
        self.names, self.places, self.objects = (
            list(usable["name"]), list(usable["place"]), list(usable["object"]),
        )  # fmt: skip
        words = fill(self.names, self.places[0], self.objects[0])
        self._skeletons = [encode(template.format(**words)) for template in TEMPLATES]
        self.lengths = [len(skeleton) for skeleton in self._skeletons]
        self.positions = [
            {slot: len(encode(head)) for slot, head in heads(template, words).items()}
            for template in TEMPLATES
        ]

    def tokens(self, template: int, words: Mapping[str, str]) -> tuple[int, ...]:
        """Tokens of a filled template, each word at its slot's position and nothing else moved.

        Raises:
            ValueError: The tokenizer reads this sentence in another way.
        """
        text = TEMPLATES[template].format(**words)
        ids = list(self._skeletons[template])
        for slot, position in self.positions[template].items():
            ids[position] = self.token[words[slot]]
        if (read := self._encode(text)) != ids:
            raise ValueError(
                f"'{text}' is {read} under this tokenizer, but its words, taken from other "
                f"sentences, are {ids}; the task needs a tokenizer whose tokens do not reach "
                f"across spaces and punctuation"
            )
        return tuple(ids)


def single_tokens(kind: Kind, encode: Encode, *, unknown: int | None) -> dict[str, int]:
    """The words of a kind that are one token, the same one, wherever a template has them.

    A word is one token in its place if it adds one to what stands before it and changes nothing
    there. A name also has to do so after the whole sentence, as an answer.
    """
    words = fill(NAMES, PLACES[0], OBJECTS[0])
    places = [
        (template, slot, encode(head))
        for template in TEMPLATES
        for slot, head in heads(template, words).items()
        if slot in _SLOTS[kind]
    ]
    ends = [template.format(**words) for template in TEMPLATES] if kind == "name" else []
    answered = [(text, encode(text)) for text in ends]
    first_head = heads(TEMPLATES[0], words)[_SLOTS[kind][0]]
    found: dict[str, int] = {}
    for word in POOLS[kind]:
        token = encode(f"{first_head} {word}")[-1]
        if token == unknown or token in found.values():
            continue
        in_place = all(
            encode(template.format(**words | {slot: word}))[: len(head) + 1] == [*head, token]
            for template, slot, head in places
        )
        if in_place and all(encode(f"{text} {word}") == [*ids, token] for text, ids in answered):
            found[word] = token
    return found


def fill(names: Sequence[str], place: str, thing: str) -> dict[str, str]:
    """What goes into a template's slots: the first three names are A, B and S."""
    return {"A": names[0], "B": names[1], "S": names[2], "place": place, "object": thing}


def heads(template: str, words: Mapping[str, str]) -> dict[str, str]:
    """What stands before each slot of a filled template, without the space.

    Example:
        >>> heads("When {A} met {B} in", {"A": "Mary", "B": "John"})
        {'A': 'When', 'B': 'When Mary met'}
    """
    before, text = {}, ""
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot is not None:
            before[slot] = text.removesuffix(" ")
            text += words[slot]
    return before


def shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    """The items in a random order."""
    return [items[i] for i in rng.permutation(len(items))]
