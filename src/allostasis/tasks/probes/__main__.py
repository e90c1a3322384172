"""Makes the probe corpora, or the variants of them that a tokenizer can ask."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from allostasis.tasks.probes.generate import generate
from allostasis.tasks.probes.rows import CORPORA, write
from allostasis.tasks.probes.splits import write_splits
from allostasis.tasks.probes.tokenizers import named
from allostasis.tasks.probes.variants import write_variants

EXAMPLES = """
  python -m allostasis.tasks.probes build --out data/            the four corpora, for SmolLM2
  python -m allostasis.tasks.probes build --out mine/ --model gpt2 --n 1000
  python -m allostasis.tasks.probes variant --model mistral_7b   data/ without what it cannot ask
"""


def main(argv: list[str] | None = None) -> int:
    """Do what the words say."""
    parser = argparse.ArgumentParser(
        prog="python -m allostasis.tasks.probes",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="make corpora from the project's words and templates")
    build.add_argument("--out", type=Path, default=Path("data"), help="folder (default: data)")
    build.add_argument("--n", type=int, default=240, help="rows a corpus (default: 240)")
    variant = commands.add_parser("variant", help="drop the rows that a tokenizer cannot ask")
    variant.add_argument("--data", type=Path, default=Path("data"), help="folder (default: data)")
    for command in (build, variant):
        command.add_argument(
            "--model", default="smollm2", help="model=, owner/name or folder (default: smollm2)"
        )
        command.add_argument(
            "--corpora", nargs="+", choices=CORPORA, default=CORPORA, help="default: all four"
        )
    words = parser.parse_args(argv)
    try:
        told = _build(words) if words.command == "build" else _variant(words)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(told))
    return 0


def _build(words: argparse.Namespace) -> list[str]:
    if not 60 <= words.n <= 2_000:
        raise ValueError(f"--n {words.n}: a corpus has 60 to 2,000 rows")
    asker = named(words.model).asker
    words.out.mkdir(parents=True, exist_ok=True)
    told = []
    for corpus in words.corpora:
        made = generate(corpus, asker, n=words.n)
        path = words.out / f"{corpus}.jsonl"
        write(path, made.rows)
        write_splits(path, made.rows, made.splits)
        told.append(f"{path}: {len(made.rows)} of {words.n} rows")
    return told


def _variant(words: argparse.Namespace) -> list[str]:
    corpora = [words.data / f"{corpus}.jsonl" for corpus in words.corpora]
    if absent := [str(path) for path in corpora if not path.is_file()]:
        raise FileNotFoundError(
            f"there is no {', no '.join(absent)}; make it with python -m allostasis.tasks.probes "
            f"build --out {words.data}"
        )
    told = write_variants(corpora, named(words.model))
    return [
        f"{words.data / found['file']}: {found['kept']} of {found['rows']} rows; dropped "
        f"{ {reason: n for reason, n in found['dropped'].items() if n} or 'none' }"
        for found in told["corpora"].values()
    ]


if __name__ == "__main__":
    raise SystemExit(main())
