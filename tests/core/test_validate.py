"""What the checker finds in a config, against signatures made for the purpose."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Gt, Lt
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from allostasis.core.config import RunConfig
from allostasis.core.names import nearest, suggest
from allostasis.core.validate import check, refusal

Check = Callable[..., list[str]]


class Inner:
    def __init__(self, *, rate: Annotated[float, Gt(0)] = 1.0) -> None: ...


class Outer:
    def __init__(
        self,
        *,
        model: object,
        task: object,
        p: Annotated[int, Gt(2)] = 113,
        op: Literal["add", "subtract"] = "add",
        betas: tuple[Annotated[float, Lt(1)], Annotated[float, Lt(1)]] = (0.9, 0.98),
        limit: int | None = None,
        inner: Inner | None = None,
        many: list[Inner] | None = None,
        either: int | str = 0,
    ) -> None: ...


def demand(*, model: object, task: object, wanted: int) -> None: ...


def swallow(**anything: Any) -> None: ...


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> Check:
    """Check a config whose module is a class of the package `mine`."""
    package = ModuleType("mine")
    for thing in (Inner, Outer, demand, swallow):
        monkeypatch.setattr(thing, "__module__", "mine")
        setattr(package, thing.__name__, thing)
    package.system = __import__("os").system
    monkeypatch.setitem(sys.modules, "mine", package)

    def run(target: str = "mine.Outer", /, *, fields: Any = None, **module: Any) -> list[str]:
        cfg = OmegaConf.structured(RunConfig)
        given = {"name": "x", "allow": ["mine"], "module": {"_target_": target, **module}}
        merged = OmegaConf.merge(cfg, given, fields or {})
        assert isinstance(merged, DictConfig)
        return [str(problem) for problem in check(merged)]

    return run


def test_a_config_that_fits_its_signatures_has_no_problem(problems: Check) -> None:
    inner = {"_target_": "mine.Inner", "rate": 2}
    assert problems(p=5, op="subtract", betas=[0.5, 0], inner=inner, many=[inner], limit=None) == []


def test_each_kind_of_problem_is_told_in_the_order_of_the_config(problems: Check) -> None:
    assert problems(p="abc", weight=1, op="times", betas=[0.5, 1.5], pp=1) == [
        "module.p='abc': input should be a valid integer, unable to parse string as an integer",
        "module.weight: Outer has no such parameter; "
        "there are betas, either, inner, limit, many, op, p",
        "module.op='times': input should be 'add' or 'subtract'",
        "module.betas[1]=1.5: input should be less than 1",
        "module.pp: Outer has no such parameter; did you mean 'p'?",
    ]


@pytest.mark.parametrize("value", ["5", True, 5.0])
def test_what_only_resembles_an_integer_is_refused(problems: Check, value: object) -> None:
    assert problems(p=value) == [f"module.p={value!r}: input should be a valid integer"]


def test_the_reasons_of_a_union_stand_side_by_side(problems: Check) -> None:
    assert problems(either=[1]) == [
        "module.either=[1]: input should be a valid integer or input should be a valid string"
    ]


def test_a_missing_parameter_is_told_unless_the_run_supplies_it(problems: Check) -> None:
    assert problems("mine.demand") == ["module.wanted: missing; demand does not work without it"]
    assert problems("mine.demand", _partial_=True) == []
    assert problems("mine.demand", wanted=3, model=1) == [
        "module.model: the run supplies it; it cannot be set"
    ]


def test_an_open_signature_is_checked_for_existence_only(problems: Check) -> None:
    assert problems("mine.swallow", anything=1, goes="here") == []


def test_nested_targets_are_checked_where_they_stand(problems: Check) -> None:
    bad = {"_target_": "mine.Inner", "rate": 0}
    assert problems(inner=bad, many=[bad, {"_target_": "mine.Iner"}]) == [
        "module.inner.rate=0: input should be greater than 0",
        "module.many[0].rate=0: input should be greater than 0",
        "module.many[1]._target_='mine.Iner': mine has no 'Iner'; did you mean 'Inner'?",
    ]


def test_an_interpolation_that_leads_nowhere_is_told_and_not_taken_for_missing(
    problems: Check,
) -> None:
    assert problems("mine.demand", wanted="${conditions.a.b}") == [
        "module.wanted: interpolation key 'conditions.a.b' not found"
    ]
    assert problems(betas=["${nowhere}", 0.5]) == [
        "module.betas[0]: interpolation key 'nowhere' not found"
    ]
    assert problems(p="???") == ["module.p: missing mandatory value: module.p"]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("os.system", "only classes and functions of allostasis and lightning and mine are built"),
        ("mine.system", "leads out of allostasis and lightning and mine, to posix"),
        ("allostasis.core.records.os.remove", "leads out of allostasis and lightning and mine"),
        ("mine", "not a dotted path to a class or function"),
        ("mine.Outer()", "not a dotted path to a class or function"),
        ("mine.Outer.nothing", "Outer has no 'nothing'"),
        ("allostasis.core.config.BLOCKS", "tuple is no class or function"),
        ("allostasis.cor.config.X", "allostasis has no 'cor'; did you mean 'core'?"),
        ("lightnin.Trainer", "only classes and functions of allostasis"),
    ],
)
def test_a_target_outside_the_allowed_packages_is_never_built(
    problems: Check, target: str, reason: str
) -> None:
    (problem,) = problems(target)
    assert problem.startswith(f"module._target_={target!r}: {reason}")


def test_a_target_of_a_package_that_is_not_allowed_is_not_even_imported(
    problems: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    assert len(problems("this.s")) == 1
    assert "this" not in sys.modules


def test_a_target_whose_dependency_is_missing_says_which(
    problems: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = problems("needy.Thing", fields={"allow": ["needy"]})
    assert problem == (
        "module._target_='needy.Thing': cannot be imported, for want of the module "
        "'a_package_that_nobody_has'; is it installed?"
    )


def test_settings_that_nothing_reads_are_told(problems: Check) -> None:
    assert problems(fields={"logger": {"project": "x"}}) == [
        "logger.project: nothing reads it: logger has no _target_; choose one of the group 'logger'"
    ]


def test_the_trainer_takes_lightnings_own_arguments_but_not_what_the_run_decides(
    problems: Check,
) -> None:
    trainer = {"max_steps": -1, "max_stpes": 3, "devices": 2, "log_every_n_steps": "x"}
    assert problems(fields={"trainer": trainer}) == [
        "trainer.max_stpes: Trainer has no such parameter; did you mean 'max_steps'?",
        "trainer.devices: the run supplies it; it cannot be set",
        "trainer.log_every_n_steps='x': input should be a valid integer, "
        "unable to parse string as an integer",
    ]


def test_fields_are_checked_before_anything_is_imported(problems: Check) -> None:
    fields = {"seed": -1, "condition": "b", "conditions": {"a1": {}, "c": {}}}
    assert problems("mine.Nothing", fields=fields) == [
        "seed=-1: input should be greater than or equal to 0",
        "condition='b': the design has no such condition; there are a1, c",
    ]


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".", "-x"])
def test_a_condition_that_would_leave_its_folder_is_refused(problems: Check, name: str) -> None:
    (problem,) = problems(fields={"condition": name})
    assert problem == f"condition={name!r}: names a folder: letters, digits and _ . + - only"


def test_a_refusal_counts_its_problems() -> None:
    assert refusal(["a: b"]) == "The run was not started; its config has 1 problem:\n  a: b"
    assert "has 2 problems:\n  a\n  b" in refusal(["a", "b"], kind="sweep")


NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20)
# two of them are more than two slips apart, as `model` and `module` are not
APART = ("weight_decay", "train_frac", "max_steps", "eval_every", "seed", "conditions", "engine")


@given(NAMES, st.lists(NAMES, max_size=8))
def test_a_suggestion_is_always_one_of_the_names(name: str, names: list[str]) -> None:
    assert nearest(name, names) in {None, *names}


@given(st.sampled_from(APART), st.data())
def test_a_name_with_one_letter_lost_doubled_or_swapped_is_found_again(
    name: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(name) - 2))
    lost = name[:at] + name[at + 1 :]
    doubled = name[:at] + name[at] + name[at:]
    swapped = name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    assert nearest(data.draw(st.sampled_from([lost, doubled, swapped])), APART) == name


@given(NAMES, st.lists(NAMES, max_size=8, unique=True))
def test_a_suggestion_names_the_nearest_or_all(name: str, names: list[str]) -> None:
    near = nearest(name, names)
    said = suggest(name, names)
    assert near in said if near else all(known in said for known in names)
