"""What a `_target_` names: whether it may be called, and what it takes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError

from allostasis.core.names import suggest

ALLOWED = ("allostasis", "lightning")
"""Packages that a `_target_` may come from; `allow: [mine]` in a config adds others."""


def locate(path: Any, allowed: tuple[str, ...]) -> Callable[..., Any] | str:
    """The class or function that a dotted path names, or why it may not be called.

    Args:
        path: What stands at `_target_`.
        allowed: Packages that may be imported, and that it must be defined in.
    """
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
        return f"cannot be imported, for want of the module '{error.name}'; is it installed?"
    if not callable(found):
        return f"{type(found).__name__} is no class or function"
    # a path may lead through an allowed module to what it imports: `allostasis.run.os.system`
    home = getattr(found, "__module__", None) or "nowhere"
    if home.partition(".")[0] not in allowed:
        return f"leads out of {packages}, to {home}"
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
                if not depth:
                    raise _NotThereError(f"there is no package '{part}'") from error
                parent = ".".join(parts[:depth])
                near = suggest(part, _members(found))
                raise _NotThereError(f"{parent} has no '{part}'; {near}") from error
    return found


def _members(module: ModuleType) -> set[str]:
    """Submodules of a package, and what a module itself defines."""
    submodules = {entry.name for entry in pkgutil.iter_modules(getattr(module, "__path__", []))}
    own = {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    return submodules | own


@cache
def parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a class or function takes."""
    return inspect.signature(target).parameters


@cache
def adapters(target: Callable[..., Any]) -> Mapping[str, TypeAdapter]:
    """Checkers of the parameters whose annotation a config value can meet."""
    function = target.__init__ if isinstance(target, type) else target
    try:
        hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except NameError:  # an annotation that only type checkers can read
        return {}
    found: dict[str, TypeAdapter] = {}
    for name, hint in hints.items():
        try:
            found[name] = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        except (PydanticUserError, PydanticUndefinedAnnotation):  # no type that YAML can write
            continue
    return found
