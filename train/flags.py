"""The command line of `python -m train`, made from the settings."""

from __future__ import annotations

import argparse
from dataclasses import Field, fields
from typing import Any

from train.settings import PRETRAINED, Settings


def parse(argv: list[str] | None) -> tuple[dict[str, Any], bool]:
    """The settings given on the command line, by field name, and whether to resume. Exits with 2 on a bad flag."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        usage="python -m train --data DIR --out RUN [flags]\n       python -m train --out RUN --resume",
        description="Train a text classifier with a sparse output layer, encoder and head together.",
        epilog="Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops. "
        "Exit codes: 0 finished, 1 diverged, 2 bad flags or data, 130 stopped by Ctrl-C, 143 by SIGTERM.",
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for spec in fields(Settings):
        facts = spec.metadata
        if facts["group"] not in groups:
            groups[facts["group"]] = parser.add_argument_group(facts["group"])
        kind: dict[str, Any] = {"type": facts["parse"], "choices": facts["choices"], "metavar": facts["unit"]}
        if spec.default is False:
            kind = {"action": argparse.BooleanOptionalAction}
        groups[facts["group"]].add_argument("--" + spec.name.replace("_", "-"), help=_help(spec), **kind)
    groups["files"].add_argument(
        "--resume",
        action="store_true",
        help="go on from RUN's last checkpoint, with its settings; a run that has none starts again, and with --data a run "
        "that is not there begins",
    )
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume", False)
    if "out" not in given:
        parser.error("--out is missing")
    return given, resume


def _help(spec: Field[Any]) -> str:
    text = spec.metadata["help"]
    if isinstance(spec.default, bool) or spec.default in ("", None):
        return text
    shown = f"{spec.default:g}" if isinstance(spec.default, float) else spec.default
    other = f", with a pretrained encoder {PRETRAINED[spec.name]:g}" if spec.name in PRETRAINED else ""
    return f"{text} (default: {shown}{other})"
