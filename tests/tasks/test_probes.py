"""Probe corpora: whether their answers are right, and what their design promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest

from allostasis.tasks.probes import facts
from allostasis.tasks.probes.encoded import Encoded
from allostasis.tasks.probes.generate import FAMILIES, Generated, generate
from allostasis.tasks.probes.rows import CORPORA, Corpus, Probe, data_hash, records
from allostasis.tasks.probes.splits import assign
from allostasis.tasks.probes.task import Probes

Askers = Callable[[str], Any]
TOKENIZERS = (
    "qwen2",  # tiny, word by word
    pytest.param("smollm2", marks=pytest.mark.slow),
    pytest.param("gemma3_270m", marks=pytest.mark.slow),
    pytest.param("gpt2", marks=pytest.mark.slow),
)


@pytest.fixture(scope="module")
def made(asker: Askers) -> Callable[[Corpus, str], Generated]:
    """A corpus under a tokenizer, made once."""

    @cache
    def of(corpus: Corpus, tokenizer: str) -> Generated:
        return generate(corpus, asker(tokenizer), n=240, n_val=10, n_pool=16)

    return of


Made = Callable[[Corpus, str], Generated]


# ---------------------------------------------------------------- the answers are right


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def place(text: str, word: str) -> int:
    return words(text).index(word)


def number(row: Probe) -> int:
    return int(str(row.template).rpartition("-")[2])


def parts(text: str, names: Sequence[str]) -> dict[str, str]:
    """What a text says behind each name, up to the next name."""
    ordered = sorted(names, key=text.index)
    cut = text.index(ordered[1])
    return {ordered[0]: text[:cut], ordered[1]: text[cut:]}


def solve(row: Probe, text: str) -> str:
    """The answer to a prompt, worked out from its words."""
    two = sorted((row.target.strip(), row.foil.strip()))
    told, _, asked = text.rpartition(". ")

    def other(word: str) -> str:
        return two[1 - two.index(word)]

    match row.family:
        case "possession":
            is_denied = {name: " not " in said for name, said in parts(told, two).items()}
            wanted = " not " in asked or " without " in asked
            return next(name for name in two if is_denied[name] == wanted)
        case "colours" if row.corpus == "negation":
            denied = next(word for word in two if f"not {word}" in told)
            return denied if " not " in asked else other(denied)
        case "states":
            particle, said = re.findall(r"\b(not|still) (\w+)", text)[0]
            return other(said) if particle == "not" else said
        case "either":
            fact, query = re.split(r"so the|The person|So the", text.partition(". ")[2])
            name = next(word for word in two if word in fact)
            is_turned = (" not " in fact) != bool(re.search(r"\b(not|without)\b", query))
            return other(name) if is_turned else name
        case "conditional":
            (fact,) = re.findall(r"(?:It|The light|The card) is (\w+)\.", text)
            rule = re.sub(r"(?:It|The light|The card) is \w+\.", "", text)
            behind = words(rule)[place(rule, fact) :]
            return next(word for word in behind if word in two)
        case "syllogism":
            rules = dict(re.findall(r"something is a (\w+), it is (?:a )?(\w+)", text))
            rules |= dict(re.findall(r"(?:[Ee]very|[Ee]ach|\b[Aa]) (\w+) is (?:a )?(\w+)", told))
            (thing,) = re.findall(r"has a (\w+), so|This is a (\w+)|A (\w+) is always", text)
            found = "".join(thing)
            while found not in two:
                found = rules[found]
            return found
        case "operators":
            wanted, held = re.findall(r"\ba (\w+)", asked), parts(told, two)
            test = all if " and " in asked else any
            (name,) = (name for name in two if test(f"a {x}" in held[name] for x in wanted))
            return name
        case _ if row.corpus == "counterfactual":
            things = sorted(str(row.group).split("|"), key=lambda name: text.index(f" {name}"))
            values = sorted(two, key=lambda value: place(text, value))
            last = max(things, key=lambda name: [m.start() for m in re.finditer(name, text)][-1])
            return values[things.index(last)]
        case _:
            every = {x: y for known in facts.KNOWN[str(row.family)] for x, y in known.items()}
            things = str(row.group).split("|")
            (before, behind) = facts.TEMPLATES[str(row.family)][number(row)].split("{x}", 1)
            (thing,) = (x for x in things if text.startswith(f"{before}{x}{behind[:4]}"))
            return every[thing]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("corpus", CORPORA)
def test_the_target_is_right_after_the_clean_prompt_and_the_foil_after_the_corrupt_one(
    made: Made, corpus: Corpus, tokenizer: str
) -> None:
    for row in made(corpus, tokenizer).rows:
        assert f" {solve(row, row.clean)}" == row.target, row
        assert f" {solve(row, row.corrupt)}" == row.foil, row


# ---------------------------------------------------------------- the design


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("corpus", CORPORA)
def test_every_rule_holds(made: Made, asker: Askers, corpus: Corpus, tokenizer: str) -> None:
    encode = asker(tokenizer).prompt
    found = made(corpus, tokenizer)
    rows = found.rows[: len(found.rows) - found.n_extra]
    assert 200 <= len(rows) <= 240
    assert len({row.clean for row in found.rows}) == len(found.rows)
    assert len({row.id for row in found.rows}) == len(found.rows)
    for row in found.rows:
        clean = encode(row.clean)
        assert len(clean) == len(encode(row.corrupt))
        for answer in (row.target, row.foil):
            assert encode(row.clean + answer)[:-1] == clean
        assert row.target != row.foil
        assert words(row.clean)[-1] != row.target.strip()
        assert asker(tokenizer).unknown not in encode(row.clean + row.target)
    balance: dict[str, Counter[str]] = defaultdict(Counter)
    templates: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        balance[str(row.family)][row.target] += 1
        balance[str(row.family)][row.foil] -= 1
        templates[str(row.family)].add(str(row.template))
    assert max(abs(n) for counts in balance.values() for n in counts.values()) <= 1
    assert set(templates) == set(FAMILIES[corpus])
    assert min(map(len, templates.values())) >= 3
    sizes = Counter(row.family for row in rows)
    assert max(sizes.values()) - min(sizes.values()) <= 2


@pytest.mark.parametrize("corpus", CORPORA)
def test_crossed_factors_are_equally_often_at_every_level(made: Made, corpus: Corpus) -> None:
    found = made(corpus, "qwen2")
    rows = found.rows[: len(found.rows) - found.n_extra]
    for family in FAMILIES[corpus]:
        sizes = Counter(row.cell for row in rows if row.family == family)
        assert max(sizes.values()) - min(sizes.values()) <= 2, sizes


@pytest.mark.parametrize("corpus", CORPORA)
def test_no_shortcut_answers_more_than_65_percent(made: Made, corpus: Corpus) -> None:
    rows = made(corpus, "qwen2").rows
    right: Counter[str] = Counter()
    for row in rows:
        said = {word: words(row.clean).count(word.strip()) for word in (row.target, row.foil)}
        places = {word: row.clean.rfind(word) for word in said}
        firsts = {word: -row.clean.find(word) if said[word] else -9999 for word in said}
        for name, scores in (("most", said), ("last", places), ("first", firsts)):
            gap = scores[row.target] - scores[row.foil]
            right[name] += (gap > 0) + 0.5 * (gap == 0)
        right["unmentioned"] += 0.5 * (1 + (not said[row.target]) - (not said[row.foil]))
    right["least"] = len(rows) - right["most"]
    assert max(right.values()) <= 0.65 * len(rows), right


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("corpus", CORPORA)
def test_no_group_crosses_splits(made: Made, corpus: Corpus, tokenizer: str) -> None:
    found = made(corpus, tokenizer)
    held, said = defaultdict(set), defaultdict(set)
    for row in found.rows:
        held[row.group].add(found.splits[row.id])
        for text in (row.clean, row.corrupt):
            said[text].add(found.splits[row.id])
    assert max(map(len, held.values())) == 1
    assert max(map(len, said.values())) == 1


@pytest.mark.parametrize("corpus", CORPORA)
def test_splits_have_their_shares_of_the_corpus_and_of_every_cell(
    made: Made, corpus: Corpus
) -> None:
    found = made(corpus, "qwen2")
    rows = found.rows[: len(found.rows) - found.n_extra]
    splits = assign(rows)
    sizes = Counter(splits[row.id] for row in rows)
    for split, share in (("train", 0.5), ("val", 0.1), ("test", 0.4)):
        assert sizes[split] / len(rows) == pytest.approx(share, abs=0.02)
    cells = Counter((row.cell, splits[row.id]) for row in rows)
    for cell, n in Counter(row.cell for row in rows).items():
        assert cells[cell, "train"] / n == pytest.approx(0.5, abs=0.15)
        assert cells[cell, "test"] / n == pytest.approx(0.4, abs=0.15)


def test_more_rows_of_val_are_of_other_groups_and_in_every_cell(made: Made) -> None:
    found = made("logical", "qwen2")
    groups = defaultdict(set)
    for row in found.rows:
        if found.splits[row.id] == "val":
            groups[row.cell].add(row.group)
    assert set(groups) == {row.cell for row in found.rows}
    assert min(map(len, groups.values())) >= 10
    assert all(found.splits[row.id] == "val" for row in found.rows[-found.n_extra :])


CORPUS_HASH = """
import re
from dataclasses import asdict
from allostasis.tasks.probes.encoded import Asker
from allostasis.tasks.probes.generate import generate
from allostasis.tasks.probes.rows import CORPORA, data_hash
known = {}
encode = lambda text: [known.setdefault(w, len(known)) for w in re.findall(r"\\w+|[^\\w ]", text)]
for corpus in CORPORA:
    made = generate(corpus, Asker(encode, unknown=None), n=60, n_val=2)
    print(data_hash(map(asdict, made.rows)), sorted(made.splits.items()))
"""


def test_generator_is_deterministic_across_hash_seeds() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", CORPUS_HASH],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) == len(CORPORA)


def test_a_vocabulary_without_the_words_is_refused_with_what_is_missing() -> None:
    task = Probes(seed=0, corpus="negation")

    class Nothing:
        unk_token_id = 0

    with pytest.raises(ValueError, match=r"0 of 240 rows of 'negation' .*possession.*task.file"):
        task.build(lambda text: [0] * len(text.split()), Nothing())


# ---------------------------------------------------------------- the task


@pytest.fixture(scope="module")
def tokenizer(asker: Askers) -> Any:
    class Named:
        unk_token_id = asker("qwen2").unknown

        def encode(self, text: str) -> list[int]:
            return [7, *asker("qwen2").prompt(text)]

    return Named()


Encode = Callable[[Corpus], Encoded]


@pytest.fixture(scope="module")
def encoded(tokenizer: Any) -> Encode:
    """A corpus under a tokenizer of words with a BOS, made once."""

    @cache
    def of(corpus: Corpus) -> Encoded:
        return Probes(seed=0, corpus=corpus).build(tokenizer.encode, tokenizer)

    return of


def test_examples_have_the_tokens_of_their_rows_behind_a_bos(
    encoded: Encode, tokenizer: Any
) -> None:
    examples = encoded("facts").examples
    for example in examples:
        assert list(example.clean_ids) == tokenizer.encode(example.row.clean)
        assert list(example.corrupt_ids) == tokenizer.encode(example.row.corrupt)
        answer = tokenizer.encode(example.row.clean + example.row.target)
        assert [*example.clean_ids, example.target_id] == answer
    assert len({example.example for example in examples}) == len(examples)


def test_roles_are_where_the_prompts_differ_and_the_last_token(encoded: Encode) -> None:
    for example in encoded("facts").examples:
        both = zip(example.clean_ids, example.corrupt_ids, strict=True)
        unlike = tuple(i for i, (clean, corrupt) in enumerate(both) if clean != corrupt)
        assert example.roles["changed"] == unlike
        assert example.roles["END"] == (len(example.clean_ids) - 1,)
        assert example.roles["first_changed"] == unlike[:1]
        assert example.roles["last_changed"] == unlike[-1:]
        assert example.roles["after_changed"] == (unlike[-1] + 1,)


@pytest.mark.parametrize("corpus", ["negation", "facts"])
def test_recency_is_the_answer_that_stands_last(encoded: Encode, corpus: Corpus) -> None:
    for example in encoded(corpus).examples:
        clean = words(example.row.clean)[::-1]
        said = [w for w in clean if w in (example.row.target[1:], example.row.foil[1:])]
        expected = 0 if not said else 1 if said[0] == example.row.target[1:] else -1
        assert example.recency == expected


def test_the_seed_changes_the_subsample_by_whole_groups(tokenizer: Any, encoded: Encode) -> None:
    other = Probes(seed=1, corpus="facts").build(tokenizer.encode, tokenizer)
    groups = []
    for one in (encoded("facts"), other):
        test, part = one.of("test"), one.drawn("test")
        groups.append({example.group for example in part})
        assert [e for e in test if e.group in groups[-1]] == list(part)
        assert 0.8 * len(test) <= len(part) < 0.8 * len(test) + 8
    assert encoded("facts").sha256 == other.sha256
    assert groups[0] != groups[1]


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_row_has_references_of_its_template_cell_and_length(
    encoded: Encode, corpus: Corpus
) -> None:
    examples = encoded(corpus).examples
    forms = {(e.clean_ids): (e.row.template, e.cell) for e in examples}
    for example in examples:
        others = encoded(corpus).references(example)
        assert 8 <= len(others) <= 16
        assert example.clean_ids not in others
        assert {len(ids) for ids in others} == {len(example.clean_ids)}
        known = {forms[ids] for ids in others if ids in forms}
        assert known <= {(example.row.template, example.cell)}


def test_too_few_references_are_an_error_that_says_so(tokenizer: Any, tmp_path: Any) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"clean": "The capital of France is", "corrupt": "The capital of Italy is", '
        '"target": " Paris", "foil": " Rome"}\n'
    )
    task = Probes(seed=0, corpus="facts", file=str(path), sha256=data_hash(records(path)))
    made = task.build(tokenizer.encode, tokenizer)
    assert [e.group for e in made.examples] == ["The capital of France is"]
    with pytest.raises(ValueError, match="only 0 other prompts"):
        made.references(made.examples[0])


def test_answers_of_several_tokens_are_kept_only_for_spans(tokenizer: Any, tmp_path: Any) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"clean": "The capital of France is", "corrupt": "The capital of Italy is", '
        '"target": " Paris city", "foil": " Rome"}\n'
    )
    build = [
        Probes(
            seed=0, corpus="facts", file=str(path), sha256=data_hash(records(path)), spans=spans
        ).build(tokenizer.encode, tokenizer)
        for spans in (False, True)
    ]
    assert (len(build[0].examples), build[0].dropped) == (0, {"multi_token_target": 1})
    assert len(build[1].examples[0].tokens.target) == 2


def test_all_rows_and_another_seed_are_refused() -> None:
    Probes(seed=0, corpus="facts", frac=1.0)
    with pytest.raises(ValueError, match="seed 3 would measure what seed 0"):
        Probes(seed=3, corpus="facts", frac=1.0)
