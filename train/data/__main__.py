"""`python -m train.data check DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from train.data.contract import DataError
from train.data.dataset import Dataset
from train.data.report import report
from train.data.statistics import split_facts


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 when the data can be trained on, 2 when not."""
    parser = argparse.ArgumentParser(prog="python -m train.data", description="Look at a data folder before training on it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="read all of a folder and print what is in it",
        description="Reads a data folder as training does, and prints its format, counts, repeated texts, lengths, how "
        "frequent labels are, and which labels of test train lacks. docs/data.md shows the formats.",
        epilog="Exit codes: 0 the data can be trained on; 2 it cannot, and the message names file, line and reason.",
    )
    check.add_argument("folder", type=Path, metavar="DIR", help="the folder that python -m train --data would get")
    check.add_argument("--titles-only", action="store_true", help="as for python -m train")
    given = parser.parse_args(argv)
    try:
        found = _check(given.folder, given.titles_only)
    except (DataError, OSError) as error:
        print(f"python -m train.data: error: {error}", file=sys.stderr)
        return 2
    print(found)
    return 0


def _check(folder: Path, titles_only: bool) -> str:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    data = Dataset(folder, titles_only=titles_only)
    labels = data.labels()
    facts = {
        split: split_facts(data, split, labels) for split in tqdm(data.splits, desc="reading", unit=" splits", disable=None)
    }
    return report(data, labels, facts)


if __name__ == "__main__":
    sys.exit(main())
