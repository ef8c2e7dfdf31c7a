"""RUN/report.html: what happened in a run, or in several side by side, on one page that needs nothing else.

`python -m train` writes it when it ends; `python -m train.report` makes it again from config.json and metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from models.files import write_text
from train.report import sections
from train.report.record import ReportError, read

__all__ = ["ReportError", "write"]


def write(runs: Sequence[Path], out: Path) -> None:
    """Writes the report of one or several run directories to the file `out`. ReportError names a run that cannot be read."""
    records = read(runs)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(out, templates.get_template("report.html").render(sections.of(records)))
