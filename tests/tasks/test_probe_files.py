"""Probe corpora on disk: their hash, their splits, their variants, and the validator's counts."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allostasis.tasks import validate_corpus
from allostasis.tasks.probes import __main__ as command
from allostasis.tasks.probes.audit import audit, faults, shortcut_accuracy
from allostasis.tasks.probes.encoded import REASONS, Asker
from allostasis.tasks.probes.rows import (
    CORPORA,
    Corpus,
    Probe,
    canonical,
    data_hash,
    read,
    records,
    write,
)
from allostasis.tasks.probes.splits import assign, read_splits, split_path, write_splits
from allostasis.tasks.probes.task import Probes
from allostasis.tasks.probes.tokenizers import Named
from allostasis.tasks.probes.variants import write_variants

DATA = Path(__file__).parents[2] / "data"
Askers = Callable[[str], Any]


def probe(number: int, **fields: Any) -> Probe:
    """A row without a fault, that differs from every other number's."""
    plain = {
        "id": f"mine-{number:04d}", "corpus": "mine", "family": "one", "template": "one-0",
        "cell": f"one:right={number % 2}", "group": f"g{number // 2}",
        "clean": f"Say B{number} or A{number} now:", "corrupt": f"Say A{number} or B{number} now:",
        "target": f" A{number}", "foil": f" B{number}",
    }  # fmt: skip
    if number % 2:
        plain |= {
            "clean": f"Say B{number - 1} or A{number - 1} then:",
            "corrupt": f"Say A{number - 1} or B{number - 1} then:",
            "target": f" B{number - 1}", "foil": f" A{number - 1}",
        }  # fmt: skip
    return Probe(**plain | fields)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A corpus of 40 rows with its splits."""
    path = tmp_path / "mine.jsonl"
    rows = [probe(number) for number in range(40)]
    write(path, rows)
    write_splits(path, rows, assign(rows))
    return path


# ---------------------------------------------------------------- rows and their hash


def test_a_file_is_read_as_it_was_written(mine: Path) -> None:
    rows = [probe(number) for number in range(40)]
    assert read(mine) == rows
    line = mine.read_bytes().splitlines(keepends=True)[0]
    assert list(json.loads(line)) == list(asdict(rows[0]))
    assert line.endswith(b"\n")
    assert not line.endswith(b"\r\n")


def test_a_file_with_the_four_fields_alone_is_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / "theirs.jsonl"
    path.write_text('{"clean": "a", "corrupt": "b", "target": " c", "foil": " d"}\n')
    (row,) = read(path)
    assert asdict(row) == {
        "id": "theirs-0000", "corpus": "theirs", "family": None, "template": None, "cell": None,
        "group": None, "clean": "a", "corrupt": "b", "target": " c", "foil": " d",
    }  # fmt: skip
    assert audit([row], assign([row]), None, hash_ok=None)["constant_label"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "row 1 is no JSON object"),
        ('{"clean": "a", "corrupt": "b", "target": " c"}', "row 1 has no text in 'foil'"),
        ('{"clean": "a", "prompt": "b"}', "row 1 has a field 'prompt'; known are id, corpus"),
        ('{"clean": 1, "corrupt": "b", "target": "", "foil": ""}', "no text in 'clean'"),
    ],
)
def test_a_line_that_is_no_row_is_an_error_that_says_which(
    tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read(path)


def test_an_id_that_comes_twice_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "twice.jsonl", [probe(0), probe(1, id="mine-0000")])
    with pytest.raises(ValueError, match="'mine-0000' stands in more than one row"):
        read(tmp_path / "twice.jsonl")


@pytest.mark.parametrize("end", [b"\r\n", b"\r", b"\n\n"])
def test_crlf_and_lf_have_one_hash(mine: Path, end: bytes) -> None:
    before, splits = data_hash(records(mine)), read_splits(mine, read(mine))
    mine.write_bytes(b"\xef\xbb\xbf" + mine.read_bytes().replace(b"\n", end))
    assert data_hash(records(mine)) == before
    assert read_splits(mine, read(mine)) == splits


def test_one_character_changes_the_hash(mine: Path) -> None:
    before = data_hash(records(mine))
    mine.write_text(mine.read_text().replace("Say B6 or", "say B6 or"))
    after = data_hash(records(mine))
    assert after != before
    told = rf"expected {before}, got {after}; the first row that differs is mine-0006\."
    with pytest.raises(ValueError, match=told):
        read_splits(mine, read(mine))
    task = Probes(seed=0, corpus="facts", file=str(mine), sha256=before)
    with pytest.raises(ValueError, match=told):
        task.build(lambda text: [len(text)], NoUnknown())
    split_path(mine).unlink()
    with pytest.raises(ValueError, match=f"set task.sha256={after}"):
        task.build(lambda text: [len(text)], NoUnknown())


def test_rows_without_a_group_that_ask_the_same_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "theirs.jsonl"
    texts = [f"Prompt {n % 22}:" for n in range(200)]
    held = [{"clean": text, "corrupt": "No:", "target": " a", "foil": " b"} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in held))
    rows = read(path)
    splits = assign(rows)
    assert len({(row.clean, splits[row.id]) for row in rows}) == 22
    assert set(splits.values()) == {"train", "val", "test"}


def test_a_missing_row_is_named(mine: Path) -> None:
    lines = mine.read_text().splitlines(keepends=True)
    mine.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="row mine-0039 is missing"):
        read_splits(mine, read(mine))


class NoUnknown:
    unk_token_id = None


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


@given(st.dictionaries(TEXT, TEXT, max_size=5), st.randoms())
def test_the_hash_does_not_depend_on_key_order_or_unicode_form(
    record: dict[str, str], random: Any
) -> None:
    keys = list(record)
    random.shuffle(keys)
    other = {
        unicodedata.normalize("NFD", unicodedata.normalize("NFC", key)): unicodedata.normalize(
            "NFD", record[key]
        )
        for key in keys
    }
    if len(other) == len({unicodedata.normalize("NFC", key) for key in record}) == len(record):
        assert canonical(other) == canonical(record)


@given(st.lists(TEXT, min_size=1, max_size=4), st.sampled_from(["\n", "\r\n", "\r"]))
def test_the_hash_of_a_file_does_not_depend_on_its_line_ends(
    tmp_path_factory: pytest.TempPathFactory, texts: Sequence[str], end: str
) -> None:
    path = tmp_path_factory.mktemp("ends") / "rows.jsonl"
    held = [{"clean": text} for text in texts]
    path.write_bytes("".join(json.dumps(row) + end for row in held).encode())
    assert data_hash(records(path)) == data_hash(held)


# ---------------------------------------------------------------- the corpora of the repository


@pytest.mark.parametrize("corpus", CORPORA)
def test_the_corpora_of_the_repository_have_no_fault(asker: Askers, corpus: Corpus) -> None:
    path = DATA / f"{corpus}.jsonl"
    found = validate_corpus.validate(path, asker("smollm2"))
    assert faults(found) == []
    assert (found["rows"], found["unique_clean"], found["hash_ok"]) == (240, 240, True)
    written = json.loads((DATA / "corpus_audit.json").read_text(encoding="utf-8"))
    assert written["corpora"][corpus] == found
    assert b"\r" not in path.read_bytes()


@pytest.mark.slow
def test_the_corpora_of_the_repository_are_what_the_generator_writes(
    asker: Askers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asker("smollm2")
    assert command.main(["build", "--out", str(tmp_path)]) == 0
    assert "facts.jsonl: 240 of 240 rows" in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(f"{c}{end}" for c in CORPORA for end in (".jsonl", ".split.json"))
    for name in names:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


# ---------------------------------------------------------------- variants


def test_variant_drop_counts_sum(asker: Askers, tmp_path: Path) -> None:
    for corpus in CORPORA:
        for path in (DATA / f"{corpus}.jsonl", split_path(DATA / f"{corpus}.jsonl")):
            shutil.copy(path, tmp_path / path.name)
    paths = [tmp_path / f"{corpus}.jsonl" for corpus in CORPORA]
    told = write_variants(paths, Named("words", "0123456789", asker("qwen2")))
    assert told == json.loads((tmp_path / "drops.json").read_text())
    for path in paths:
        found, before = told["corpora"][path.stem], read(path)
        kept = read(tmp_path / found["file"])
        assert found["file"] == f"{path.stem}__01234567.jsonl"
        assert found["rows"] == len(before) == len(kept) + sum(found["dropped"].values())
        assert 0 < len(kept) == found["kept"] < len(before)
        assert set(found["dropped"]) == set(REASONS)
        assert set(found["reasons"]) == {row.id for row in before} - {row.id for row in kept}
        assert kept == [row for row in before if row.id not in found["reasons"]]
        assert all(asker("qwen2").reasons(row) == [] for row in kept)
        splits, held = read_splits(path, before), read_splits(tmp_path / found["file"], kept)
        assert held == {row.id: splits[row.id] for row in kept}


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["build", "--n", "20", "--out", str(tmp_path)]) == 1
    assert "--n 20: a corpus has 60 to 2,000 rows" in capsys.readouterr().err
    assert command.main(["variant", "--data", str(tmp_path)]) == 1
    assert "build --out" in capsys.readouterr().err
    assert command.main(["build", "--model", "gtp2", "--out", str(tmp_path)]) == 1
    assert "no model is called 'gtp2'; give a folder" in capsys.readouterr().err


# ---------------------------------------------------------------- the validator


@pytest.mark.parametrize(
    ("rows", "key", "count"),
    [
        ([probe(n, clean=f"Say {n % 22}:") for n in range(200)], "duplicate_clean", 178),
        ([probe(n, **({"foil": f" A{n}"} if n in (0, 4, 8) else {})) for n in range(20)],
         "target_equals_foil", 3),
        ([probe(n, clean=f"{n} says A", target=" A") for n in range(200)],
         "target_ends_prompt", 200),
        ([probe(n, target=" true") for n in range(20)], "constant_label", 1),
        ([probe(n, corrupt=f"One word more than that {n}:") for n in range(20)],
         "length_mismatch", 20),
        ([probe(n, target=" A A") for n in range(20)], "multi_token_target", 20),
        ([probe(n, target=" A", foil=" B") for n in range(20)], "balance_max_deviation", 20),
        ([probe(n, clean=f"{n}: A or B", target=" A", foil=" B") for n in range(20)],
         "position_imbalance", 20),
        ([probe(n, clean=f"{n}: A or C", target=" A", foil=" B") for n in range(20)],
         "target_in_prompt_only", 20),
        ([probe(n, clean=f"{n}: A or C", target=" B", foil=" A") for n in range(20)],
         "foil_in_prompt_only", 20),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_validator_counts_planted_faults(rows: list[Probe], key: str, count: int) -> None:
    found = audit(rows, None, by_words(), hash_ok=None)
    assert found[key] == count
    assert found["rows"] == len(rows)
    assert any(key in fault or str(count) in fault for fault in faults(found))


def by_words() -> Asker:
    """Reads rows word by word."""
    known: dict[str, int] = {}
    return Asker(
        lambda text: [known.setdefault(word, len(known)) for word in text.split()], unknown=None
    )


def test_validator_counts_prompts_and_groups_in_two_splits() -> None:
    rows = [probe(n) for n in range(40)]
    copies = [
        probe(n, id=f"copy-{n}", clean=rows[n].clean, corrupt=rows[n].corrupt) for n in range(20)
    ]
    splits: Any = dict.fromkeys([row.id for row in rows], "train")
    splits |= dict.fromkeys([row.id for row in copies], "test")
    found = audit([*rows, *copies], splits, None, hash_ok=None)
    assert (found["cross_split_clean"], found["cross_split_group"]) == (20, 10)
    assert found["multi_token_target"] is None


def test_a_plain_corpus_has_no_fault() -> None:
    rows = [probe(n) for n in range(40)]
    found = audit(rows, assign(rows), by_words(), hash_ok=True)
    assert faults(found) == []
    assert found["families"] == {
        "one": {"rows": 40, "shortcut_accuracy": found["shortcut_accuracy"]}
    }


@pytest.mark.parametrize(
    ("clean", "expected"),
    [
        ("A and B", (1, 0, 0.5, 0.5, 0.5)),
        ("B, A, B", (0, 0, 0, 1, 0.5)),
        ("only A", (1, 1, 1, 0, 0)),
        ("only B", (0, 0, 0, 1, 1)),
        ("neither", (0.5, 0.5, 0.5, 0.5, 0.5)),
    ],
)
def test_shortcuts_answer_from_mentions_alone(clean: str, expected: Sequence[float]) -> None:
    row = probe(0, clean=clean, target=" A", foil=" B")
    found = shortcut_accuracy([row])
    assert tuple(found.values()) == expected
    assert list(found) == ["first", "last", "most", "least", "unmentioned"]


def test_strict_fails_on_a_fault_and_says_which(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate_corpus.main([str(mine), "--strict"]) == 0
    assert "no fault" in capsys.readouterr().out
    mine.write_text(mine.read_text().replace("Say B6 or", "say B6 or"))
    assert validate_corpus.main([str(mine)]) == 0
    assert validate_corpus.main([str(mine), "--strict"]) == 1
    printed = capsys.readouterr()
    assert "FAULT: the rows are not those that were split" in printed.out
    assert "the first row that differs is mine-0006" in printed.err
    audits = json.loads(mine.with_name("corpus_audit.json").read_text())
    assert audits["corpora"]["mine"]["hash_ok"] is False
