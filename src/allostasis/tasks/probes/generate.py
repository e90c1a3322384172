"""A corpus for one tokenizer: blocks of rows, taken in turn from every cell and template."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from allostasis.tasks.probes import counterfactual, facts, logical, negation
from allostasis.tasks.probes.drafts import Block, Draft, Family
from allostasis.tasks.probes.encoded import LEAST_REFERENCES, Asker, Form, Split
from allostasis.tasks.probes.rows import Corpus, Probe
from allostasis.tasks.probes.splits import assign

FAMILIES: Mapping[Corpus, Mapping[str, Family]] = {
    "facts": facts.FAMILIES,
    "negation": {
        "possession": negation.possession,
        "colours": negation.colours,
        "states": negation.states,
    },
    "counterfactual": counterfactual.FAMILIES,
    "logical": {
        "either": logical.either,
        "conditional": logical.conditional,
        "syllogism": logical.syllogism,
        "operators": logical.operators,
    },
}
FEWEST = 60
RESERVED = 0.3
"""Part of a family's groups that is taken only after all others were taken twice; for `val`."""


@dataclass
class Generated:
    """Rows that a tokenizer can be asked.

    Attributes:
        rows: The corpus.
        splits: The split of each row, by its id.
        dropped: Rows that were offered and cannot be asked, by the first reason.
        n_extra: The last rows: what `val` has beyond what was asked for.
        pool: For each form and length of a row, prompts that are in no row.
    """

    rows: list[Probe] = field(default_factory=list)
    splits: dict[str, Split] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    n_extra: int = 0
    pool: dict[Form, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


def generate(corpus: Corpus, asker: Asker, *, n: int, n_val: int = 0, n_pool: int = 0) -> Generated:
    """Rows of a corpus: families in equal parts, and in each the same of every cell and template.

    A block that the tokenizer cannot ask, or whose prompts are too few of their form for a mean, is
    passed over for the next one of its kind, until `n` rows are found or no block is left.

    Args:
        corpus: Which one.
        asker: The tokenizer.
        n: Rows wanted, all splits together.
        n_val: Groups of `val` that every cell shall have at least; what is missing is made beyond
            `n`, from groups that are in no split.
        n_pool: Further prompts of each row's form and length, in no row.

    Raises:
        ValueError: Fewer than 60 rows can be asked, or none of a cell.
    """
    made = Generated()
    stocks = {name: Stock(family, asker, made) for name, family in FAMILIES[corpus].items()}
    names = sorted(stocks)
    for number, name in enumerate(names):
        wanted = n // 2 // len(names) + (number < n // 2 % len(names))
        _number(corpus, stocks[name].take(wanted), made)
    _check(corpus, stocks, made, n)
    made.splits = assign(made.rows)
    for name in names:
        _extend(corpus, stocks[name], n_val, made)
    for name in names:
        made.pool |= stocks[name].prompts(n_pool)
    return made


def _number(corpus: Corpus, drafts: Sequence[Draft], made: Generated) -> list[Probe]:
    first = len(made.rows)
    rows = [
        Probe(id=f"{corpus}-{first + i:04d}", corpus=corpus, **asdict(draft))
        for i, draft in enumerate(drafts)
    ]
    made.rows += rows
    return rows


def _check(corpus: Corpus, stocks: Mapping[str, Stock], made: Generated, n: int) -> None:
    empty = [name for name, stock in stocks.items() if not stock.cells]
    found = {row.cell for row in made.rows}
    empty += [cell for stock in stocks.values() for cell in stock.cells if cell not in found]
    if len(made.rows) < FEWEST or empty:
        problem = f"there is none of {', '.join(empty)}" if empty else f"{FEWEST} are needed"
        raise ValueError(
            f"{len(made.rows)} of {n} rows of '{corpus}' can be asked under this tokenizer, and "
            f"{problem}; passed over: {dict(made.dropped) or 'nothing'}. Take a model whose "
            f"vocabulary has more English words, or a file of your own with task.file"
        )


def _extend(corpus: Corpus, stock: Stock, n_val: int, made: Generated) -> None:
    """Make rows of `val` from groups that are in no split, as far as there are any."""
    stock.release()
    elsewhere = {row.cluster for row in made.rows if made.splits[row.id] != "val"}
    held: dict[str, set[str]] = defaultdict(set)
    for row in made.rows:
        if made.splits[row.id] == "val":
            held[row.cell or ""].add(row.cluster)
    for kind in itertools.cycle(stock.kinds):
        short = {kind for kind in stock.kinds if any(len(held[c]) < n_val for c in kind[1:])}
        if short <= stock.spent:
            return
        if kind not in short - stock.spent:
            continue
        no_news = set.intersection(*(held[cell] for cell in kind[1:]))
        block = stock.next(kind, without=elsewhere | no_news) or ()
        made.n_extra += len(block)
        made.splits |= {row.id: "val" for row in _number(corpus, block, made)}
        for draft in block:
            held[draft.cell].add(draft.group)


class Stock:
    """The blocks of a family that are left.

    Args:
        family: Where they come from.
        asker: The tokenizer.
        made: Told what is passed over.

    Attributes:
        cells: Every cell of the family.
        kinds: Templates with the cells of their blocks.
        taken: Rows that were taken.
        spent: Kinds of which no block is left.
    """

    def __init__(self, family: Family, asker: Asker, made: Generated) -> None:
        self._asker, self._made = asker, made
        self._left: dict[tuple[str, ...], list[Block]] = defaultdict(list)
        for block in family(asker.length):
            self._left[block[0].template, *sorted({draft.cell for draft in block})].append(block)
        self.kinds = sorted(self._left)
        self._offered = {kind: tuple(blocks) for kind, blocks in self._left.items()}
        self.cells = sorted({cell for kind in self.kinds for cell in kind[1:]})
        self.taken: list[Draft] = []
        self.spent: set[tuple[str, ...]] = set()
        groups = [*dict.fromkeys(b[0].group for bs in self._left.values() for b in bs)]
        self._used: Counter[str] = Counter()
        self._reserved = Counter(dict.fromkeys(groups[round(len(groups) * (1 - RESERVED)) :], 2))
        self._said: set[str] = set()
        self._usual: dict[Form, bool] = {}

    def take(self, n: int) -> list[Draft]:
        """The rows of at most `n` blocks, one from each kind in turn."""
        blocks: list[Block] = []
        for kind in itertools.cycle(self.kinds):
            if len(blocks) == n or self.spent.issuperset(self.kinds):
                break
            if (block := self.next(kind)) is not None:
                blocks.append(block)
        return [draft for block in blocks for draft in block]

    def release(self) -> None:
        """Let reserved groups be taken as any other."""
        self._reserved.clear()

    def next(self, kind: tuple[str, ...], without: Collection[str] = ()) -> Block | None:
        """The next block of a kind that can be asked, of a group taken least often.

        Args:
            kind: Template and cells.
            without: Groups that are not to be taken.

        Returns:
            The block; None if there is none, and the kind is spent.
        """
        blocks, used = self._left[kind], self._used + self._reserved
        open_ = [block for block in blocks if block[0].group not in without]
        for block in sorted(open_, key=lambda block: used[block[0].group]):
            blocks.remove(block)
            reasons = [why for draft in block if isinstance(why := self._asker.ask(draft), str)]
            self._made.dropped.update(reasons)
            is_new = self._said.isdisjoint(draft.clean for draft in block)
            if not reasons and is_new and self._is_usual(kind, block):
                self._used[block[0].group] += 1
                self._said |= {draft.clean for draft in block}
                self.taken += block
                return block
        self.spent.add(kind)
        return None

    def _is_usual(self, kind: tuple[str, ...], block: Block) -> bool:
        """Whether every prompt of a block has enough others of its form and length."""
        for draft in block:
            form = self._form(draft)
            if form not in self._usual:
                others = itertools.islice(self._like(kind, form), LEAST_REFERENCES + 1)
                self._usual[form] = len(list(others)) > LEAST_REFERENCES
            if not self._usual[form]:
                self._made.dropped["rare_length"] += 1
        return all(self._usual[self._form(draft)] for draft in block)

    def _like(self, kind: tuple[str, ...], form: Form) -> Iterator[str]:
        """Clean prompts of a form that can be asked, each once."""
        seen: set[str] = set()
        for draft in itertools.chain.from_iterable(self._offered[kind]):
            if draft.clean in seen or self._form(draft) != form:
                continue
            seen.add(draft.clean)
            if not isinstance(self._asker.ask(draft), str):
                yield draft.clean

    def prompts(self, n: int) -> dict[Form, tuple[tuple[int, ...], ...]]:
        """At most `n` prompts that were not taken for each form and length of those that were."""
        found: dict[Form, tuple[tuple[int, ...], ...]] = {}
        taken = {self._form(draft) for draft in self.taken}
        for form in sorted(taken, key=str) if n else ():
            (kind,) = (kind for kind in self.kinds if kind[0] == form[1] and form[2] in kind[1:])
            free = (text for text in self._like(kind, form) if text not in self._said)
            found[form] = tuple(self._asker.prompt(text) for text in itertools.islice(free, n))
        return found

    def _form(self, draft: Draft) -> Form:
        length = len(self._asker.prompt(draft.clean))
        return draft.family, draft.template, draft.cell, length
