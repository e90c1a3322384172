"""A corpus on disk without the rows that a tokenizer cannot ask."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allostasis.tasks.probes.encoded import REASONS
from allostasis.tasks.probes.rows import Probe, read, write
from allostasis.tasks.probes.splits import assign, read_splits, split_path, write_splits
from allostasis.tasks.probes.tokenizers import Named


def write_variants(corpora: Sequence[Path], named: Named) -> dict[str, Any]:
    """Write `<corpus>__<tokenizer>.jsonl` with its splits beside each corpus, and `drops.json`.

    A row keeps its id and its split. `drops.json` lies in the folder of the first corpus.

    Args:
        corpora: Files of rows.
        named: The tokenizer.

    Returns:
        What `drops.json` says: for each corpus how many rows there were and are, how many were
        dropped for each reason, the first that holds, and the reason of each dropped row.

    Raises:
        ValueError: A corpus is not the one that was split.
    """
    told: dict[str, Any] = {"model": named.model, "tokenizer_sha256": named.sha256, "corpora": {}}
    for path in corpora:
        rows = read(path)
        splits = read_splits(path, rows) if split_path(path).is_file() else assign(rows)
        kept: list[Probe] = []
        reasons: dict[str, str] = {}
        for row in rows:
            asked = named.asker.ask(row)
            if isinstance(asked, str):
                reasons[row.id] = asked
            else:
                kept.append(row)
        variant = path.with_name(f"{path.stem}__{named.sha256[:8]}.jsonl")
        write(variant, kept)
        write_splits(variant, kept, splits)
        counts = Counter(reasons.values())
        told["corpora"][path.stem] = {
            "file": variant.name,
            "rows": len(rows),
            "kept": len(kept),
            "dropped": {reason: counts[reason] for reason in REASONS},
            "reasons": reasons,
        }
    text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    drops = corpora[0].with_name("drops.json")
    drops.write_text(text, encoding="utf-8", newline="\n")
    return told
