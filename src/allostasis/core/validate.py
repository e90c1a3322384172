"""Checks a config against the signatures that it will call, before anything is built."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from allostasis.core.config import BLOCKS, RunConfig
from allostasis.core.names import suggest
from allostasis.core.targets import ALLOWED, adapters, locate, parameters

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

    The fields come first. Only if they are right are the `_target_`s imported and each block held
    against the signature that it will call.

    Args:
        cfg: A composed config, with or without its `hydra` part.
    """
    return check_fields(cfg) or check_blocks(cfg)


def check_fields(cfg: DictConfig) -> list[Problem]:
    """What is wrong with the top-level fields; imports nothing that the config names."""
    return [*_check_fields(cfg)]


def check_blocks(cfg: DictConfig) -> list[Problem]:
    """What is wrong with the blocks of a config whose fields are right."""
    return [*_check_blocks(cfg)]


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
    return [*_check_value(name, value, adapters(RunConfig)[name])]


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
    if not cfg.module:
        yield Problem("module", "missing; it says what happens in a step, by its _target_")
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
    target = locate(path, allowed)
    if isinstance(target, str):
        yield Problem(f"{where}._target_={path!r}", target)
        return
    takes, types = parameters(target), adapters(target)
    is_open = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    named = {k for k, p in takes.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    for name, value in values.items():
        if name in DIRECTIVES:
            continue
        if name in supplied:
            yield Problem(f"{where}.{name}", "the run supplies it; it cannot be set")
        elif name not in named and not is_open:
            reason = f"{target.__name__} has no such parameter; {suggest(name, named - supplied)}"
            yield Problem(f"{where}.{name}", reason)
        elif name in types and name not in broken and not _has_target(value):
            yield from _check_value(f"{where}.{name}", _plain(value), types[name])
    if not values.get("_partial_", False):
        required = {k for k in named if takes[k].default is inspect.Parameter.empty}
        for name in sorted(required - supplied - broken - {*values}):
            yield Problem(f"{where}.{name}", f"missing; {target.__name__} does not work without it")


def _has_target(value: Any) -> bool:
    if isinstance(value, DictConfig):
        return "_target_" in value or any(_has_target(entry) for entry in value.values())
    return isinstance(value, ListConfig) and any(_has_target(entry) for entry in value)


def _check_value(where: str, value: Any, adapter: TypeAdapter) -> Iterator[Problem]:
    """Hold a value against a type as it stands: '5' is no 5."""
    try:
        adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        reasons = _lax_reasons(adapter, value) or error.errors()
        found: dict[str, list[str]] = {}
        for reason in reasons:
            key, part = where, value
            for step in reason["loc"]:
                # a location also names the branch of a union, which is no part of the value
                if isinstance(part, list) and isinstance(step, int) and step < len(part):
                    key, part = f"{key}[{step}]", part[step]
                elif isinstance(part, dict) and step in part:
                    key, part = f"{key}.{step}", part[step]
            found.setdefault(f"{key}={part!r}", []).append(_words(reason["msg"]))
        for setting, messages in found.items():
            yield Problem(setting, " or ".join(dict.fromkeys(messages)))


def _lax_reasons(adapter: TypeAdapter, value: Any) -> Sequence[Mapping[str, Any]]:
    """Why a value cannot even be converted; a strict refusal says less of it."""
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        if any(reason["type"].endswith("_parsing") for reason in error.errors()):
            return error.errors()
    return ()


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _first_line(error: OmegaConfBaseException) -> str:
    return _decapitalised(str(error).partition("\n")[0])


def _words(message: str) -> str:
    return _decapitalised(message).replace("valid array", "valid list")  # YAML's word, not JSON's


def _decapitalised(text: str) -> str:
    return text[:1].lower() + text[1:]
