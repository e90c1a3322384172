"""WordNet's concepts of a tokenizer: counts that are known, and splits that leak nothing."""

from pathlib import Path

import pytest

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def made():
    from allostasis.models import packages, zoo
    from allostasis.tasks.concepts import Concepts

    if not packages.installed(packages.PACKAGED[SMOLLM2]):
        pytest.skip("SmolLM2 is not installed")
    tokenizer, digest = zoo.find_tokenizer(SMOLLM2)
    task = Concepts(seed=0)
    return task, tokenizer, digest, task.build(tokenizer, tokenizer_sha256=digest)


@pytest.mark.slow
def test_wordnet_gives_the_known_counts(made) -> None:  # T-09
    from allostasis.core import wordnet
    from allostasis.tasks.concepts import members, single_tokens

    nouns = wordnet.nouns()
    found = members(nouns, single_tokens(made[1], nouns))
    counts = [sum(len(words) >= least for words in found.values()) for least in (10, 20, 50)]
    assert counts == [1447, 759, 323]


@pytest.mark.slow
def test_no_lemma_and_no_token_is_on_two_sides(made) -> None:  # T-05
    tokens = made[3].tokens
    assert (tokens.groupby("token_id")["split"].nunique() == 1).all()
    lemmas = tokens["lemma"].str.lower()
    assert (tokens.groupby(lemmas)["split"].nunique() == 1).all()
    shares = tokens.drop_duplicates("lemma")["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.7, abs=0.02)


@pytest.mark.slow
def test_smaller_concepts_fall_on_the_same_sides(made) -> None:
    task, tokenizer, digest, table = made
    smaller = task.build(tokenizer, tokenizer_sha256=digest, min_lemmas=20)
    sides = [
        t.tokens.drop_duplicates("lemma").set_index("lemma")["split"] for t in (table, smaller)
    ]
    assert (sides[0] == sides[1].loc[sides[0].index]).all()


@pytest.mark.slow
def test_a_teacher_has_parents_apart_and_children_that_share_no_token(made) -> None:
    from allostasis.core import wordnet
    from allostasis.tasks.concepts import Selection, choose

    task, tokenizer, digest, _ = made
    table = task.build(tokenizer, tokenizer_sha256=digest, min_lemmas=20)
    chosen = choose(table, wordnet.nouns(), Selection())
    assert len(chosen) == 16
    for one in chosen:
        assert len(one.children) >= 3
        ids = [token for own in one.own for token in own.tolist()]
        assert len(ids) == len(set(ids))
        above = wordnet.nouns().ancestors(one.parent)
        assert not any(other.parent in above for other in chosen)
    with pytest.raises(
        ValueError, match=r"selection.parents=400: under this tokenizer \d+ parents"
    ):
        choose(table, wordnet.nouns(), Selection(parents=400))


@pytest.mark.slow
def test_a_table_of_another_tokenizer_is_refused(made, tmp_path: Path) -> None:
    from allostasis.tasks.concepts import read_table

    made[3].write(tmp_path)
    again = read_table(tmp_path, tokenizer_sha256=made[2])
    assert again.edges.equals(made[3].edges)
    with pytest.raises(ValueError, match=r"another|tokenizer with SHA-256"):
        read_table(tmp_path, tokenizer_sha256="0")


def test_a_hierarchy_drops_what_hardly_differs_from_a_child() -> None:
    import pyarrow as pa

    from allostasis.core.wordnet import Nouns
    from allostasis.tasks.concepts import hierarchy

    table = pa.table({
        "offset": [1, 2, 3, 4], "lemmas": [["a"], ["b"], ["c"], ["d"]],
        "hypernyms": [[], [1], [2], [2]],
    })  # fmt: skip
    parents, n_merged = hierarchy(Nouns(table), {1: 100, 2: 60, 3: 55, 4: 30})
    assert parents == {1: None, 3: 1, 4: 1}  # 2 has five lemmas more than 3
    assert n_merged == 1


def test_contexts_are_of_documents_that_train_nothing() -> None:  # T-10
    from allostasis.experiments.hsae import shifts
    from allostasis.models.lens import pretrained
    from allostasis.tasks.corpora import GLOSSES, documents, split_of

    train = {text for text in documents(GLOSSES) if split_of(text) == "train"}
    rest = [text for text in documents(GLOSSES) if split_of(text) != "train"]
    assert train.isdisjoint(rest)
    asked: list[str] = []
    model = pretrained(arch="gpt2")
    encode = model.encode

    def noted(text: str) -> list[int]:
        asked.append(text)
        return encode(text)

    model.encode = noted  # pyright: ignore[reportAttributeAccessIssue]
    shifts.contexts(model, 3)
    assert len(asked) == 3
    assert train.isdisjoint(asked)
