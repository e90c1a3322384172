"""Checks a config against the signatures that it will call, before anything is built."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import pkgutil
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError

from allostasis.core.config import BLOCKS, RunConfig

ALLOWED = ("allostasis", "lightning")
"""Packages that a `_target_` may come from; `allow: [mine]` in a config adds others."""

IMPLIED = {"trainer": "lightning.Trainer"}
"""What a block without a `_target_` of its own is given to."""

SUPPLIED: Mapping[str, frozenset[str]] = {
    "module": frozenset({"model", "task"}),
    "trainer": frozenset({"accelerator", "devices", "default_root_dir", "logger", "callbacks"}),
    "logger": frozenset({"identity", "folder"}),
}
"""Parameters that the run itself supplies when it builds a block."""

FIELDS = tuple(f.name for f in fields(RunConfig))
"""Names of the top-level settings."""

DIRECTIVES = ("_target_", "_convert_", "_recursive_", "_partial_")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config.

    Attributes:
        setting: The full key, with its value where the value is what is wrong: `module.p='abc'`.
        reason: What is wrong, what is allowed, what may have been meant.
    """

    setting: str
    reason: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.reason}"


def check(cfg: DictConfig) -> list[Problem]:
    """Everything that is wrong with a composed config; empty if it can be run.

    The top-level fields come first, without importing what the blocks name. Only if they are right
    are the `_target_`s imported and each block held against the signature that it will call.

    Args:
        cfg: A composed config, with or without its `hydra` part.
    """
    return [*_check_fields(cfg)] or [*_check_blocks(cfg)]


def refusal(problems: Iterable[str | Problem], *, kind: str = "run") -> str:
    """The message for all that is wrong with a config, one problem a line."""
    lines = [f"  {problem}" for problem in problems]
    count = f"{len(lines)} problem{'s' if len(lines) != 1 else ''}"
    return "\n".join([f"The {kind} was not started; its config has {count}:", *lines])


def check_field(name: str, value: Any) -> list[Problem]:
    """Everything that is wrong with one top-level setting's type and range.

    Example:
        >>> print(*check_field("seed", -1))
        seed=-1: input should be greater than or equal to 0
    """
    return [*_check_value(name, value, _adapters(RunConfig)[name])]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name that was most likely meant, or None if nothing is near.

    Example:
        >>> nearest("weight_decy", ["lr", "weight_decay"])
        'weight_decay'
    """
    known = {known.casefold(): known for known in names}
    close = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.6)
    return known[close[0]] if close else None


def suggest(name: str, names: Iterable[str]) -> str:
    """What to say of an unknown name: what may have been meant, else all that there is."""
    names = sorted(names)
    near = nearest(name, names)
    if near is not None:
        return f"did you mean '{near}'?"
    return f"there are {', '.join(names)}" if names else "there are none"


def _check_fields(cfg: DictConfig) -> Iterator[Problem]:
    for name in cfg:
        if name not in FIELDS and name != "hydra":
            yield Problem(str(name), f"no such setting; {suggest(str(name), FIELDS)}")
    missing = [name for name in FIELDS if name not in cfg]
    yield from (Problem(name, "missing; every config has it") for name in missing)
    if missing:
        return
    if not cfg.name:
        yield Problem("exp", "no experiment is chosen; `python -m allostasis` lists them")
        return
    try:
        fields = {name: _plain(cfg[name]) for name in FIELDS if name not in BLOCKS}
    except OmegaConfBaseException as error:
        yield Problem("config", _first_line(error))
        return
    for name, value in fields.items():
        yield from check_field(name, value)
    if cfg.conditions and cfg.condition not in cfg.conditions:
        reason = f"the design has no such condition; {suggest(cfg.condition, cfg.conditions)}"
        yield Problem(f"condition={cfg.condition!r}", reason)
    for name in ("name", "condition"):
        if not re.fullmatch(r"\w[\w.+-]*", cfg[name]):
            reason = "names a folder: letters, digits and _ . + - only"
            yield Problem(f"{name}={cfg[name]!r}", reason)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", cfg.device):
        reason = "allowed are auto, cpu, cuda, cuda:<index> and mps"
        yield Problem(f"device={cfg.device!r}", reason)
    if not cfg.stages or not {*cfg.stages} <= {"fit", "test"}:
        yield Problem(f"stages={list(cfg.stages)}", "allowed are fit, test, or both")


def _check_blocks(cfg: DictConfig) -> Iterator[Problem]:
    allowed = (*ALLOWED, *cfg.allow)
    for block in BLOCKS:
        node = cfg[block]
        if node and "_target_" not in node and block not in IMPLIED:
            reason = f"nothing reads it: {block} has no _target_; choose one of the group '{block}'"
            yield from (Problem(f"{block}.{name}", reason) for name in node)
        yield from _check_node(
            node, block, allowed, SUPPLIED.get(block, frozenset()), IMPLIED.get(block)
        )


def _check_node(
    node: DictConfig | ListConfig,
    where: str,
    allowed: tuple[str, ...],
    supplied: frozenset[str] = frozenset(),
    implied: str | None = None,
) -> Iterator[Problem]:
    values: dict[str, Any] = {}
    broken: set[str] = set()
    is_list = isinstance(node, ListConfig)
    names: list[Any] = [*range(len(node))] if is_list else [*node]
    for name in names:
        key = f"{where}[{name}]" if is_list else f"{where}.{name}"
        try:
            values[str(name)] = node[name]
        except OmegaConfBaseException as error:
            yield Problem(key, _first_line(error))
            broken.add(str(name))
            continue
        if OmegaConf.is_config(values[str(name)]):
            inner = [*_check_node(values[str(name)], key, allowed)]
            yield from inner
            if inner:
                broken.add(str(name))
    target = values.get("_target_", implied)
    if isinstance(node, DictConfig) and target is not None:
        yield from _check_call(target, values, where, allowed, supplied, broken)


def _check_call(
    path: Any,
    values: Mapping[str, Any],
    where: str,
    allowed: tuple[str, ...],
    supplied: frozenset[str],
    broken: set[str],
) -> Iterator[Problem]:
    target = _locate(path, allowed)
    if isinstance(target, str):
        yield Problem(f"{where}._target_={path!r}", target)
        return
    parameters = _parameters(target)
    adapters = _adapters(target)
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {
        k for k, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    for name, value in values.items():
        if name in DIRECTIVES:
            continue
        if name in supplied:
            yield Problem(f"{where}.{name}", "the run supplies it; it cannot be set")
        elif name not in named and not is_open:
            reason = f"{target.__name__} has no such parameter; {suggest(name, named - supplied)}"
            yield Problem(f"{where}.{name}", reason)
        elif name in adapters and name not in broken and not _has_target(value):
            yield from _check_value(f"{where}.{name}", _plain(value), adapters[name])
    if not values.get("_partial_", False):
        required = {k for k in named if parameters[k].default is inspect.Parameter.empty}
        for name in sorted(required - supplied - broken - {*values}):
            yield Problem(f"{where}.{name}", f"missing; {target.__name__} does not work without it")


def _has_target(value: Any) -> bool:
    if isinstance(value, DictConfig):
        return "_target_" in value or any(_has_target(entry) for entry in value.values())
    return isinstance(value, ListConfig) and any(_has_target(entry) for entry in value)


def _check_value(where: str, value: Any, adapter: TypeAdapter[Any]) -> Iterator[Problem]:
    """Hold a value against a type as it stands, so that '5' is no 5; the laxer reason says more."""
    try:
        adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as strict:
        try:
            adapter.validate_python(value)
            reasons = strict
        except ValidationError as lax:
            reasons = lax
        found: dict[str, list[str]] = {}
        for error in reasons.errors():
            key, part = where, value
            for step in error["loc"]:
                # a location also names the branch of a union, which is no part of the value
                if isinstance(part, list) and isinstance(step, int) and step < len(part):
                    key, part = f"{key}[{step}]", part[step]
                elif isinstance(part, dict) and step in part:
                    key, part = f"{key}.{step}", part[step]
            found.setdefault(f"{key}={part!r}", []).append(_decapitalised(error["msg"]))
        for setting, messages in found.items():
            yield Problem(setting, " or ".join(dict.fromkeys(messages)))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _first_line(error: OmegaConfBaseException) -> str:
    return _decapitalised(str(error).partition("\n")[0])


def _decapitalised(text: str) -> str:
    return text[:1].lower() + text[1:]


def _locate(path: Any, allowed: tuple[str, ...]) -> Callable[..., Any] | str:
    """The class or function that a dotted path names, or why it may not be called."""
    packages = " and ".join(allowed)
    if not isinstance(path, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", path):
        return "not a dotted path to a class or function"
    if path.partition(".")[0] not in allowed:
        return f"only classes and functions of {packages} are built; `allow: [...]` adds packages"
    try:
        found = _resolve(path)
    except _NotThereError as error:
        return str(error)
    except ModuleNotFoundError as error:
        return f"cannot be imported: {_decapitalised(str(error))}; is it installed?"
    if not callable(found):
        return f"{type(found).__name__} is no class or function"
    # a path may lead through an allowed module to what it imports: `allostasis.run.os.system`
    if getattr(found, "__module__", "").partition(".")[0] not in allowed:
        return f"leads out of {packages}, to {getattr(found, '__module__', 'nowhere')}"
    return found


class _NotThereError(Exception):
    """A dotted path ends before its last word."""


def _resolve(path: str) -> Any:
    found: Any = None
    parts = path.split(".")
    for depth, part in enumerate(parts):
        name = ".".join(parts[: depth + 1])
        if depth and hasattr(found, part):
            found = getattr(found, part)
        elif depth and not isinstance(found, ModuleType):
            raise _NotThereError(f"{parts[depth - 1]} has no '{part}'")
        else:
            try:
                found = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name:
                    raise
                has = (
                    f"{'.'.join(parts[:depth])} has no '{part}'"
                    if depth
                    else f"no package '{name}'"
                )
                raise _NotThereError(f"{has}; {suggest(part, _members(found))}") from error
    return found


def _members(module: ModuleType | None) -> set[str]:
    """Submodules of a package, and what a module itself defines."""
    if module is None:
        return set()
    submodules = {entry.name for entry in pkgutil.iter_modules(getattr(module, "__path__", []))}
    own = {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    return submodules | own


@cache
def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(target).parameters


@cache
def _adapters(target: Callable[..., Any]) -> Mapping[str, TypeAdapter[Any]]:
    """Checkers of the parameters whose annotation a config value can meet."""
    function = target.__init__ if isinstance(target, type) else target
    try:
        hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except NameError:  # an annotation that only type checkers can read
        return {}
    adapters: dict[str, TypeAdapter[Any]] = {}
    for name, hint in hints.items():
        try:
            adapters[name] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        except (PydanticUserError, PydanticUndefinedAnnotation):  # no type that YAML can write
            continue
    return adapters
