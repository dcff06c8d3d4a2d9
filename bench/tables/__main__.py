"""Renders the tables of results in the READMEs from the CSVs.

So no table is typed by hand.

    python -m bench.tables [--check] [README ...]

Between ``<!-- table: NAME (from FILE.csv in MACHINE; python -m bench.tables) -->`` and
``<!-- end -->`` stands the table NAME of `bench.tables.specs`, made of that file of the folder
bench/results/MACHINE, and below it where the rows come from. A table may have several files, and
several folders, with commas between them. The folders' rows come in their order: the lower level is
named first.

Without ``--check`` the READMEs are rewritten. With it nothing is written, and the exit status is 1
with a diff where a README differs from the CSVs. The exit status is 2 when a marked table cannot be
made: a file, a row or a column is missing, or no such table is described.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT
from bench.tables.render import BLOCK, rewrite
from bench.tables.specs import TABLES
from bench.tables.types import TableError

READMES = [
    ROOT / name for name in ("README.md", "bench/README.md", "csrc/README.md", "docs/architecture.md", "docs/guide.md")
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readmes", nargs="*", type=Path, default=READMES)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 when a README differs from the CSVs"
    )
    arguments = parser.parse_args(argv)
    differs = False
    for readme in arguments.readmes:
        old = readme.read_text()
        try:
            new = rewrite(old, TABLES)
        except TableError as error:
            print(error, file=sys.stderr)
            return 2
        differs |= old != new
        if arguments.check:
            sys.stdout.writelines(
                difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(readme), "from the CSVs")
            )
            continue
        if old != new:
            readme.write_text(new)
        print(f"{len(BLOCK.findall(new))} tables in {readme}, {'rewritten' if old != new else 'nothing to change'}")
    return int(differs and arguments.check)


if __name__ == "__main__":
    sys.exit(main())
