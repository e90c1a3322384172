"""What is wrong with a corpus, counted: repeats, leaks, imbalance, and what needs no model."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from allostasis.tasks.probes.encoded import REASONS, Asker, Split
from allostasis.tasks.probes.rows import Probe, mentions

Choice = Literal["target", "foil"] | None
EASY = 0.65
"""Share of a corpus that a shortcut may answer."""
UNEVEN = 1
"""How far counts that should be equal may differ."""


def _first(target: Sequence[int], foil: Sequence[int]) -> Choice:
    places = {"target": min(target, default=None), "foil": min(foil, default=None)}
    said = {name: place for name, place in places.items() if place is not None}
    return _only([name for name, place in said.items() if place == min(said.values())])


def _last(target: Sequence[int], foil: Sequence[int]) -> Choice:
    return _more(max(target, default=-1), max(foil, default=-1))


def _most(target: Sequence[int], foil: Sequence[int]) -> Choice:
    return _more(len(target), len(foil))


def _least(target: Sequence[int], foil: Sequence[int]) -> Choice:
    return _more(-len(target), -len(foil))


def _unmentioned(target: Sequence[int], foil: Sequence[int]) -> Choice:
    return _more(not target, not foil)


def _more(target: int, foil: int) -> Choice:
    return None if target == foil else _only(["target" if target > foil else "foil"])


def _only(names: Sequence[str]) -> Choice:
    if len(names) != 1:
        return None
    return "target" if names[0] == "target" else "foil"


SHORTCUTS: Mapping[str, Callable[[Sequence[int], Sequence[int]], Choice]] = {
    "first": _first,
    "last": _last,
    "most": _most,
    "least": _least,
    "unmentioned": _unmentioned,
}
"""Which answer is chosen from where the prompt mentions either; None: it does not say."""


def shortcut_accuracy(rows: Sequence[Probe]) -> dict[str, float]:
    """Share of rows that each shortcut answers right; half a row where it does not say.

    Example:
        >>> row = Probe("0", "c", None, None, None, None, "A or B, not A:", "", " B", " A")
        >>> shortcut_accuracy([row])
        {'first': 0.0, 'last': 0.0, 'most': 0.0, 'least': 1.0, 'unmentioned': 0.5}
    """
    worth: dict[Choice, float] = {"target": 1.0, "foil": 0.0, None: 0.5}
    said = [(mentions(row.clean, row.target), mentions(row.clean, row.foil)) for row in rows]
    return {
        name: sum(worth[choose(target, foil)] for target, foil in said) / len(said)
        for name, choose in SHORTCUTS.items()
    }


def audit(
    rows: Sequence[Probe],
    splits: Mapping[str, Split] | None,
    asker: Asker | None,
    *,
    hash_ok: bool | None,
) -> dict[str, Any]:
    """Counts of what should not be, and the scores of shortcuts.

    Args:
        rows: The corpus.
        splits: The split of each row by its id, where there are splits.
        asker: A tokenizer; what needs one is null without.
        hash_ok: Whether the rows are those that were split, where that is known.

    Returns:
        `rows`, `unique_clean`, `duplicate_clean`, `unique_targets`; `constant_label`, 1 where all
        rows have one target; `target_equals_foil`; `target_ends_prompt`; `target_in_prompt_only`
        and `foil_in_prompt_only`, rows whose clean prompt mentions one answer alone;
        `cross_split_clean`, rows of `val` and `test` that share a prompt with another split;
        `cross_split_group`, groups in more than one; `balance_max_deviation`, how much more often a
        word is target than foil in its family, or less; `position_imbalance`, the same for target
        and foil as the one that comes first; by a tokenizer `multi_token_target` and the other
        reasons to drop a row, each counted by itself; `hash_ok`; `shortcut_accuracy` of the corpus,
        and of each family under `families`.
    """
    clean = Counter(row.clean for row in rows)
    targets = {row.target for row in rows}
    told = [(_tells(row, row.target), _tells(row, row.foil)) for row in rows]
    families: dict[str, list[Probe]] = defaultdict(list)
    for row in rows:
        families[row.family or "all"].append(row)
    return {
        "rows": len(rows),
        "unique_clean": len(clean),
        "duplicate_clean": len(rows) - len(clean),
        "unique_targets": len(targets),
        "constant_label": int(len(targets) == 1),
        "target_equals_foil": sum(row.target.strip() == row.foil.strip() for row in rows),
        "target_ends_prompt": sum(_ends(row) for row in rows),
        "target_in_prompt_only": sum(target and not foil for target, foil in told),
        "foil_in_prompt_only": sum(foil and not target for target, foil in told),
        **_tokens(rows, asker),
        **_leaks(rows, splits),
        "balance_max_deviation": max(map(_deviation, families.values())),
        "position_imbalance": max(map(_position, families.values())),
        "hash_ok": hash_ok,
        "shortcut_accuracy": shortcut_accuracy(rows),
        "families": {
            name: {"rows": len(some), "shortcut_accuracy": shortcut_accuracy(some)}
            for name, some in sorted(families.items())
        },
    }


def faults(found: Mapping[str, Any]) -> list[str]:
    """What an audit found that a corpus of ours may not have."""
    zero = (
        "duplicate_clean", "constant_label", "target_equals_foil", "target_ends_prompt", *REASONS,
        "cross_split_clean", "cross_split_group",
    )  # fmt: skip
    told = [f"{name} is {found[name]}, not 0" for name in zero if found[name]]
    for name in ("balance_max_deviation", "position_imbalance"):
        if found[name] > UNEVEN:
            told.append(f"{name} is {found[name]}, more than {UNEVEN}")
    one_only = [found["target_in_prompt_only"], found["foil_in_prompt_only"]]
    if abs(one_only[0] - one_only[1]) > UNEVEN:
        told.append(f"{one_only[0]} prompts mention the target alone, {one_only[1]} the foil alone")
    for name, share in found["shortcut_accuracy"].items():
        if share > EASY:
            told.append(f"the shortcut '{name}' answers {share:.0%}, more than {EASY:.0%}")
    if found["hash_ok"] is False:
        told.append("the rows are not those that were split")
    return told


def _tells(row: Probe, answer: str) -> bool:
    return bool(mentions(row.clean, answer))


def _ends(row: Probe) -> bool:
    words = re.findall(r"\w+", row.clean)
    return bool(words) and words[-1].lower() == row.target.strip().lower()


def _tokens(rows: Sequence[Probe], asker: Asker | None) -> dict[str, int | None]:
    if asker is None:
        return dict.fromkeys(REASONS)
    counts = Counter(reason for row in rows for reason in asker.reasons(row))
    return {reason: counts[reason] for reason in REASONS}


def _leaks(rows: Sequence[Probe], splits: Mapping[str, Split] | None) -> dict[str, int | None]:
    if splits is None:
        return {"cross_split_clean": None, "cross_split_group": None}
    seen: dict[str, set[Split]] = defaultdict(set)
    groups: dict[str, set[Split]] = defaultdict(set)
    for row in rows:
        for text in (row.clean, row.corrupt):
            seen[text].add(splits[row.id])
        groups[row.cluster].add(splits[row.id])
    leaking = [
        row
        for row in rows
        if splits[row.id] != "train" and any(len(seen[t]) > 1 for t in (row.clean, row.corrupt))
    ]
    return {
        "cross_split_clean": len(leaking),
        "cross_split_group": sum(len(held) > 1 for held in groups.values()),
    }


def _deviation(rows: Sequence[Probe]) -> int:
    counts = Counter(row.target for row in rows)
    counts.subtract(row.foil for row in rows)
    return max(map(abs, counts.values()))


def _position(rows: Sequence[Probe]) -> int:
    """How much more often the target comes first than the foil, or less, where both are said."""
    firsts = [
        _first(target, foil)
        for row in rows
        if (target := mentions(row.clean, row.target)) and (foil := mentions(row.clean, row.foil))
    ]
    return abs(firsts.count("target") - firsts.count("foil"))
