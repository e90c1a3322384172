"""WordNet's table: as it ships, and as it is made from WordNet's own file."""

from pathlib import Path

import pytest

LINES = [
    "  1 This software and database is being provided to you, the LICENSEE, by  ",
    "02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 003 @ 02083346 n 0000 @ 01317541 n "
    '0000 ~ 01322604 n 0000 | a member of the genus Canis; "the dog barked all night"  ',
    "09189157 15 n 01 Everest 0 001 @i 09359803 n 0000 | a mountain peak in the Himalayas  ",
]


def test_the_shipped_table_is_whole_and_closed_under_hypernyms() -> None:
    from allostasis.core import wordnet

    table = wordnet.load().to_pandas()
    assert len(table) == 82_115
    assert table["offset"].is_monotonic_increasing
    assert table["gloss"].str.len().min() > 0
    above = {int(offset) for some in table["hypernyms"] for offset in some}
    assert above <= set(table["offset"])
    roots = table[table["hypernyms"].map(len) == 0]
    assert [list(lemmas) for lemmas in roots["lemmas"]] == [["entity"]]


def test_a_line_of_wordnet_becomes_a_row() -> None:
    from allostasis.core import wordnet

    dog, everest = wordnet.build(LINES).to_pylist()
    assert dog == {
        "offset": 2084071,
        "lemmas": ["dog", "domestic_dog", "Canis_familiaris"],
        "gloss": "a member of the genus Canis",
        "examples": ["the dog barked all night"],
        "hypernyms": [2083346, 1317541],
        "lexfile": 5,
    }
    assert everest["hypernyms"] == [9359803]  # an instance counts


def test_a_changed_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from allostasis.core import wordnet

    wordnet.load.cache_clear()
    monkeypatch.setattr(wordnet, "SHA256", "0" * 64)
    with pytest.raises(wordnet.DataError, match="changed or cut short"):
        wordnet.load()
    wordnet.load.cache_clear()


def test_the_table_can_be_made_again(tmp_path: Path) -> None:
    from allostasis.core import wordnet

    (tmp_path / "data.noun").write_text("\n".join(LINES))
    with pytest.raises(SystemExit, match="0"):
        wordnet.main([str(tmp_path / "data.noun"), str(tmp_path / "made.parquet")])
    assert (tmp_path / "made.parquet").is_file()
