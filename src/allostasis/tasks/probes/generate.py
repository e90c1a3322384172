"""A corpus for one tokenizer: blocks of rows, taken in turn from every cell and template."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial

from allostasis.tasks.probes import facts
from allostasis.tasks.probes.drafts import Block, Draft, Family
from allostasis.tasks.probes.encoded import Asker, Form
from allostasis.tasks.probes.rows import Corpus, Probe

FAMILIES: Mapping[Corpus, Mapping[str, Family]] = {
    "facts": {name: partial(facts.family, name) for name in facts.KNOWN},
}
SEED = 0
"""Of the corpora: a run's seed draws from them and makes no other."""
FEWEST = 60
MOST = 2_000


@dataclass
class Generated:
    """Rows that a tokenizer can be asked.

    Attributes:
        rows: The corpus.
        dropped: Rows that were offered and cannot be asked, by the first reason.
        pool: Prompts by form and length, whether or not they are in a row.
    """

    rows: list[Probe]
    dropped: Counter[str] = field(default_factory=Counter)
    pool: dict[Form, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


def generate(corpus: Corpus, asker: Asker, *, n: int) -> Generated:
    """Rows of a corpus: families in equal parts, and in each the same of every cell and template.

    A block that the tokenizer cannot ask is passed over for the next one of its kind, until `n` rows
    are found or no block is left.

    Args:
        corpus: Which one.
        asker: The tokenizer.
        n: Rows wanted.

    Raises:
        ValueError: Fewer than 60 rows can be asked, or none of a family's cell.
    """
    families = FAMILIES[corpus]
    made = Generated([])
    wanted = {name: n // len(families) for name in families}
    for name in sorted(families)[: n % len(families)]:
        wanted[name] += 1
    for name, family in sorted(families.items()):
        for draft in _take(family, asker, wanted[name], made):
            number = len(made.rows)
            made.rows.append(Probe(id=f"{corpus}-{number:04d}", corpus=corpus, **asdict(draft)))
    if len(made.rows) < FEWEST:
        raise ValueError(
            f"only {len(made.rows)} of {n} rows of '{corpus}' can be asked under this tokenizer, "
            f"and {FEWEST} are needed; passed over: {dict(made.dropped)}"
        )
    return made


def _take(family: Family, asker: Asker, wanted: int, made: Generated) -> list[Draft]:
    """Rows of one family, block by block."""
    kinds: dict[tuple[str, ...], deque[Block]] = defaultdict(deque)
    for block in family(SEED, asker.length):
        kinds[block[0].template, *sorted({draft.cell for draft in block})].append(block)
    taken: list[Draft] = []
    used: Counter[str] = Counter()
    while kinds and len(taken) < wanted:
        for kind in sorted(kinds):
            block = _next(kinds[kind], used, asker, made)
            if block is None:
                del kinds[kind]
                continue
            taken += block
            used[block[0].group] += 1
            if len(taken) >= wanted:
                break
    return taken


def _next(blocks: deque[Block], used: Counter[str], asker: Asker, made: Generated) -> Block | None:
    """The next block that can be asked, of a group that was taken least often; None without one."""
    while blocks:
        block = min(blocks, key=lambda block: used[block[0].group])
        blocks.remove(block)
        asked = [asker.ask(draft) for draft in block]
        reasons = [found for found in asked if isinstance(found, str)]
        if not reasons:
            return block
        made.dropped.update(reasons)
    return None
