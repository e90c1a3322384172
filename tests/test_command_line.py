"""The order of words in a command."""

from hypothesis import given
from hypothesis import strategies as st

from allostasis.__main__ import hoist

FLAGS = st.sampled_from([
    ["-m"], ["--multirun"], ["--cfg", "job"], ["-c", "all"], ["--resolve"], ["-h"], ["--help"],
    ["-cd", "my_conf"], ["--config-dir", "my_conf"], ["--info", "searchpath"], ["--version"],
])  # fmt: skip
OVERRIDES = st.sampled_from([
    "seed=0,1,2", "seed=3", "condition=high_wd", "module.betas=[0.9,0.98]", "~trainer.max_steps",
    "++module.p=7", "exp=grokking", "preset=quick", "module.text='a -m b'", "module.lr=-1",
])  # fmt: skip


@given(st.lists(FLAGS, max_size=3), st.lists(OVERRIDES, max_size=6), st.data())
def test_flags_may_stand_anywhere_and_both_keep_their_order(
    flags: list[list[str]], overrides: list[str], data: st.DataObject
) -> None:
    words = [[word] for word in overrides]
    places = sorted(data.draw(st.lists(st.integers(0, len(words)), min_size=3, max_size=3)))
    for place, flag in reversed([*zip(places, flags, strict=False)]):
        words.insert(place, flag)
    command = [part for word in words for part in word]
    assert hoist(command) == ([part for flag in flags for part in flag], overrides)


@given(st.lists(st.text(max_size=8), max_size=8))
def test_no_word_is_lost_or_made_up(words: list[str]) -> None:
    flags, overrides = hoist(words)
    known = [word for word in words if not word.startswith(("-", "+exp="))]
    assert [word for word in overrides if word in known] == overrides
    assert len(flags) + len(overrides) >= len(words)


def test_a_plus_before_exp_is_dropped_and_no_other() -> None:
    assert hoist(["+exp=a,b", "+seed=1", "++exp=a"])[1] == ["exp=a,b", "+seed=1", "++exp=a"]


def test_a_flag_with_its_value_behind_an_equals_sign_is_two_words() -> None:
    assert hoist(["--config-dir=my_conf", "exp=a"]) == (["--config-dir", "my_conf"], ["exp=a"])


def test_info_alone_means_all() -> None:
    assert hoist(["--info", "exp=a"]) == (["--info", "all"], ["exp=a"])
