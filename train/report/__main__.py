"""`python -m train.report RUN [RUN …] [--out FILE]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train import report


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for bad flags and runs that cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report",
        description="Make RUN/report.html again, or compare several runs on one page.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory that python -m train made")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (default for one run: RUN/report.html)")
    arguments = parser.parse_args(argv)
    if arguments.out is None and len(arguments.runs) > 1:
        parser.error("several runs need --out FILE")
    out = arguments.out or arguments.runs[0] / "report.html"
    try:
        report.write(arguments.runs, out)
    except (report.ReportError, OSError) as error:
        print(f"python -m train.report: error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
