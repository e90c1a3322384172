"""Why Hydra cannot compose a command: all reasons, where Hydra stops at the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import CompactHydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from allostasis.core.config import BLOCKS, conf_dir
from allostasis.core.names import nearest, suggest
from allostasis.core.validate import FIELDS, Problem, check_field

EXTRAS = {"joblib": "parallel", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""Launchers that come with an extra of this package."""


def command_problems(
    words: Sequence[str], *, config_dir: str | None, is_sweep: bool
) -> list[Problem]:
    """What is wrong with a command that Hydra refused.

    Args:
        words: Overrides, as `key=value`.
        config_dir: The user's own folder of configs, where the command names one.
        is_sweep: Whether `a,b` stands for several runs.
    """
    path = create_config_search_path(str(conf_dir()))
    if config_dir:
        schema = SearchPathQuery(provider="schema")
        path.prepend("command-line", f"file://{Path(config_dir).resolve()}", anchor=schema)
    version.setbase("1.3")
    loader = ConfigLoaderImpl(path)
    return composition_problems(words, loader=loader, config_name="config", is_sweep=is_sweep)


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

    try:
        base = loader.load_configuration(config_name, choices, run_mode=RunMode.RUN)
    except CompactHydraException as error:
        return [*problems, _explain(error)]
    homes = {str(key): f"{block}.{key}" for block in reversed(BLOCKS) for key in base[block]}
    for override, values in settings:
        for value in values:
            word = f"{override.get_key_element()}={value}"
            if override.is_delete():
                word = word.removesuffix("=")
            try:
                loader.load_configuration(config_name, [*choices, word], run_mode=RunMode.RUN)
            except CompactHydraException as error:
                single = parser.parse_overrides([word])[0]
                problems += _explain_setting(single, error, homes)
    return problems


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [*override.sweep_string_iterator()] if override.is_discrete_sweep() else []
    return [override.get_value_element_as_str()]


def _unknown_option(group: str, value: str, options: Sequence[str]) -> Problem:
    setting = f"{group}={value}"
    if group == "exp":
        near = nearest(value, options)
        meant = f"; did you mean '{near}'?" if near else ""
        listed = ", ".join(sorted(options))
        return Problem(setting, f"no such experiment{meant} (experiments: {listed})")
    if group == "hydra/launcher" and value in EXTRAS:
        return Problem(setting, f"not installed: pip install 'allostasis[{EXTRAS[value]}]'")
    return Problem(setting, f"no such {group}; {suggest(value, options)}")


def _explain_setting(
    override: Override, error: CompactHydraException, homes: Mapping[str, str]
) -> list[Problem]:
    key = override.key_or_group
    if key in homes and key not in FIELDS:
        return [Problem(key, f"no such setting; did you mean '{homes[key]}'?")]
    value = override.value()
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if key in FIELDS and (problems := check_field(key, plain)):
        return problems
    explained = _explain(error)
    if explained.setting == "config":
        return [Problem(f"{key}={override.get_value_element_as_str()}", explained.reason)]
    return [explained]


def _explain(error: CompactHydraException) -> Problem:
    """An unknown name with the nearest known one, else Hydra's own words on one line."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        parent, name = cause.full_key.rpartition(".")[0::2]
        siblings = FIELDS if not parent else [str(key) for key in cause.parent_node or ()]
        return Problem(cause.full_key, f"no such setting; {suggest(name, siblings)}")
    text = " ".join(line.strip() for line in str(error).splitlines() if "full_key:" not in line)
    if isinstance(cause, OmegaConfBaseException) and str(cause).splitlines()[0] not in text:
        text = f"{text}: {str(cause).splitlines()[0]}"
    return Problem("config", text)
