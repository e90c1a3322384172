"""Why Hydra cannot compose a command: all reasons, where Hydra stops at the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from allostasis.core.validate import FIELDS, Problem, check_field, suggest

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override

EXTRAS = {"joblib": "parallel", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""Launchers that come with an extra of this package."""


def composition_problems(
    words: Sequence[str], *, loader: ConfigLoader, config_name: str | None, is_sweep: bool
) -> list[Problem]:
    """Try the words of a command one by one.

    Args:
        words: Overrides, as `key=value`.
        loader: Hydra's loader, which knows the search path.
        config_name: The primary config.
        is_sweep: Whether `a,b` stands for several runs.

    Returns:
        What is wrong; empty if the words compose.
    """
    problems: list[Problem] = []
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[tuple[Override, list[str]]] = []
    for word in words:
        try:
            override = parser.parse_overrides([word])[0]
        except OverrideParseException:
            problems.append(Problem(word, "cannot be read; settings are written key=value"))
            continue
        if override.is_sweep_override() and not is_sweep:
            reason = "several values make a sweep, which needs -m"
            problems.append(Problem(word, reason))
        elif override.is_sweep_override() and not override.is_discrete_sweep():
            problems.append(Problem(word, "cannot be swept; write the values out: a,b,c"))
        else:
            parsed.append((override, _values(override)))

    choices: list[str] = []
    settings: list[tuple[Override, list[str]]] = []
    for override, values in parsed:
        options = loader.get_group_options(override.key_or_group)
        if not options:
            settings.append((override, values))
            continue
        unknown = [value for value in values if value not in {*options, "null"}]
        for value in unknown:
            problems.append(_unknown_option(override.key_or_group, value, options))
        choices += [f"{override.get_key_element()}={v}" for v in values if v not in unknown][:1]

    def error_of(*extra: str) -> CompactHydraException | None:
        try:
            loader.load_configuration(config_name, [*choices, *extra], run_mode=RunMode.RUN)
        except CompactHydraException as error:
            return error
        return None

    error = error_of()
    if error is not None:
        return [*problems, _explain(error)]
    groups = [name for name in loader.list_groups("") if name != "hydra"]
    for override, values in settings:
        for value in values:
            word = f"{override.get_key_element()}={value}"
            error = error_of(override.input_line or word if override.is_delete() else word)
            if error is not None:
                problems += _explain_setting(override, value, error, groups)
    return problems


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [*override.sweep_string_iterator()] if override.is_discrete_sweep() else []
    return [override.get_value_element_as_str()]


def _unknown_option(group: str, value: str, options: Sequence[str]) -> Problem:
    setting = f"{group}={value}"
    if group == "exp":
        listed = ", ".join(sorted(options))
        near = suggest(value, options)
        experiments = near if near.startswith("there") else f"{near} There are {listed}"
        return Problem(setting, f"no such experiment; {experiments}")
    if group == "hydra/launcher" and value in EXTRAS:
        return Problem(setting, f"not installed: pip install 'allostasis[{EXTRAS[value]}]'")
    return Problem(setting, f"no such {group}; {suggest(value, options)}")


def _explain_setting(
    override: Override, value: str, error: CompactHydraException, groups: Sequence[str]
) -> Iterator[Problem]:
    key = override.key_or_group
    cause = error.__cause__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        known = [*FIELDS, *groups]
        if "." in key:
            known = [str(name) for name in cause.parent_node or ()]
        yield Problem(key, f"no such setting; {suggest(key.rpartition('.')[2], known)}")
        return
    if key in FIELDS and override.is_sweep_override() is False:
        plain = override.value()
        found = [*check_field(key, OmegaConf.to_container(plain) if OmegaConf.is_config(plain) else plain)]
        if found:
            yield from found
            return
    yield Problem(f"{key}={value}", _explain(error).reason)


def _explain(error: CompactHydraException) -> Problem:
    """Hydra's own words on one line, with the nearest name where a name is what is wrong."""
    cause = error.__cause__ or error.__context__
    text = " ".join(line.strip() for line in str(error).splitlines() if "full_key:" not in line)
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        return Problem(cause.full_key, f"no such setting; {suggest(cause.full_key, FIELDS)} ({text})")
    if isinstance(cause, OmegaConfBaseException) and str(cause).splitlines()[0] not in text:
        text = f"{text}: {str(cause).splitlines()[0]}"
    return Problem("config", text)
