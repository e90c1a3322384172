"""Files of claims: read with every problem told at once, and frozen before a run."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from allostasis.analysis.claims import (
    Arms,
    Claim,
    ClaimError,
    Estimand,
    Proved,
    Select,
    across_models,
)


class Frozen(TypedDict):
    """Claims as they stand before a run.

    Attributes:
        text: Canonical JSON for claims.json: sorted keys, UTF-8, LF.
        hash: sha256 of that text.
        hashes: sha256 of each claim's own canonical JSON, by id.
    """

    text: str
    hash: str
    hashes: dict[str, str]


def load(folder: Path, exp: str) -> list[Claim]:
    """Read an experiment's claims.

    Args:
        folder: The experiment's package, which holds claims.yaml.
        exp: The experiment; claims that name another one by `exp:` are left out.

    Returns:
        The claims in the file's order; none where there is no file.

    Raises:
        ClaimError: A claim is not valid; the message lists every problem in the file.
    """
    path = folder / "claims.yaml"
    if not path.is_file():
        return []
    claims = read(path.read_text(encoding="utf-8"), origin=str(path))
    return [claim for claim in claims if claim.exp in {None, exp}]


def read(text: str, *, origin: str) -> list[Claim]:
    """Read claims from YAML.

    Args:
        text: A list of claims.
        origin: What errors call it.

    Raises:
        ClaimError: As for `load`.
    """
    try:
        entries = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ClaimError(f"{origin} is no YAML that can be read: {error}") from error
    if not isinstance(entries, list):
        raise ClaimError(f"{origin}: expected a list of claims, got {type(entries).__name__}")
    claims: list[Claim] = []
    problems: list[str] = []
    for number, entry in enumerate(entries):
        try:
            claims.append(Claim.model_validate(entry))
        except ValidationError as error:
            named = entry.get("id") if isinstance(entry, dict) else None
            name = named or f"claim number {number + 1}"
            problems += [f"{name}: {_explain(problem)}" for problem in error.errors()]
    problems += _cross_check(claims) if not problems else []
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ClaimError(f"{origin} has {count}:\n  " + "\n  ".join(problems))
    return claims


def _explain(problem: Any) -> str:
    """One pydantic error as a line that names the nearest key."""
    where = ".".join(str(word) for word in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *parents, key = problem["loc"]
        models: dict[Any, type[BaseModel]] = {
            "estimand": Estimand, "arms": Arms, "select": Select, "proved": Proved,
        }  # fmt: skip
        model = models.get(parents[-1], Claim) if parents else Claim
        near = difflib.get_close_matches(str(key), model.model_fields, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(model.model_fields)}"
        return f"{where}: no such key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict) else f"={problem['input']!r}"
    return f"{where}{shown}: {message}" if where else message


def _cross_check(claims: list[Claim]) -> list[str]:
    ids = [claim.id for claim in claims]
    problems = [
        f"{name}: this id is used twice" for name in sorted({i for i in ids if ids.count(i) > 1})
    ]
    for claim in claims:
        for name in (*claim.all_of, *claim.requires):
            if name not in ids:
                near = difflib.get_close_matches(name, ids, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                problems.append(f"{claim.id}: names '{name}', which is no claim of this file{hint}")
            elif name == claim.id:
                problems.append(f"{claim.id}: names itself")
    across = across_models(claims)
    apart = {(claim.exp, claim.family): claim.id for claim in claims if claim.id in across}
    for claim in claims:
        mixed = [
            n for n in (*claim.all_of, *claim.requires) if (n in across) != (claim.id in across)
        ]
        if mixed:
            problems.append(f"{claim.id}: names {', '.join(mixed)}, but `unit: model` stands apart")
        if claim.id not in across and (claim.exp, claim.family) in apart:
            other = apart[claim.exp, claim.family]
            problems.append(f"{claim.id}: shares its family with {other}, whose unit is a model")
    # one pass in file order must settle every claim
    for position, claim in enumerate(claims):
        later = set(ids[position + 1 :])
        problems += [
            f"{claim.id}: '{name}' stands after it; atoms and preconditions come first"
            for name in (*claim.all_of, *claim.requires)
            if name in later
        ]
    return problems


def freeze(claims: list[Claim]) -> Frozen:
    """Canonical JSON and hashes of claims, to be stored before the first training step.

    A claim's hash covers everything that it says and nothing else, so that adding a claim later
    leaves the others' hashes as they are.
    """
    contents = [claim.model_dump(mode="json", exclude_none=True) for claim in claims]
    text = _canonical(contents)
    return {
        "text": text,
        "hash": _sha256(text),
        "hashes": {c.id: _sha256(_canonical(d)) for c, d in zip(claims, contents, strict=True)},
    }


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
