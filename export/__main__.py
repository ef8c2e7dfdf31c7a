"""`python -m export RUN --out BUNDLE`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export.convert import DTYPES, ENCODER_DTYPES
from models.extras import missing


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code, which --help explains."""
    given = _parser().parse_args(argv)
    try:
        from export.pack import INPUT_ERRORS, ParityError, pack  # torch takes seconds to load; --help should not

        manifest = pack(
            given.run,
            given.out,
            checkpoint=given.checkpoint,
            name=given.name,
            head_dtype=given.head_dtype,
            encoder_dtype=given.encoder_dtype,
            torch_encoder=given.torch_encoder,
            force=given.force,
        )
    # These two first: the others' names are not there when an import fails or is interrupted.
    except ImportError as error:
        return _fail(missing(error, "train"), 2)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was written", 130)
    except INPUT_ERRORS as error:
        return _fail(str(error), 2)
    except ParityError as error:
        return _fail(f"the bundle does not answer as the checkpoint does, and is not kept: {error}", 1)
    print(f"{given.out}: {manifest.summary()}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Packs a trained model into a bundle: one folder that `python -m serve` maps from disk. "
        "Before the bundle gets its name, it must answer the run's held-out texts as the checkpoint does.",
        epilog="exit codes: 0 done, 1 the bundle's answers differ from the checkpoint's (nothing is kept), "
        "2 the command cannot be carried out, 130 stopped by Ctrl-C",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory that `python -m train` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write; it must not exist")
    parser.add_argument("--checkpoint", metavar="STEP", help="checkpoint to pack, such as step-00001234 (default: the latest)")
    parser.add_argument("--name", help="the model's name in answers and metrics (default: the last part of BUNDLE)")
    parser.add_argument("--head-dtype", choices=DTYPES, help="round the head's values to this format (default: as trained)")
    parser.add_argument(
        "--encoder-dtype",
        choices=ENCODER_DTYPES,
        default="fp32",
        help="of the encoder's matrix products; int8 is up to 1.6 times as fast on a CPU, and changes scores (default: fp32)",
    )
    parser.add_argument(
        "--torch-encoder",
        action="store_true",
        help="also put the encoder in as torch reads it, for `python -m serve --encoder-runtime torch` on a GPU",
    )
    parser.add_argument("--force", action="store_true", help="replace BUNDLE if it is a bundle")
    return parser


def _fail(message: str, code: int) -> int:
    print(f"python -m export: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
