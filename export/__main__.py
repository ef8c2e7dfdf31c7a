"""`python -m export RUN --out BUNDLE`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from export.bundle import Bundle, BundleError, check_target, write_bundle
from export.convert import DTYPES, convert_values
from export.encoder import export_encoder, export_tokenizer
from export.parity import ParityError, prove
from export.run import Run, RunError, load_model
from models.encoder import EncoderError
from models.head import HeadError
from models.kernels import cpu

_INPUT_ERRORS = (RunError, BundleError, EncoderError, HeadError, OSError)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code, which --help explains."""
    given = _parser().parse_args(argv)
    try:
        check_target(given.out, given.force)
        _export(given)
    except _INPUT_ERRORS as error:
        return _fail(str(error), 2)
    except ParityError as error:
        return _fail(f"the bundle does not answer as the checkpoint does, and is not kept: {error}", 1)
    except KeyboardInterrupt:
        return _fail("stopped; nothing was written", 130)
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
    parser.add_argument("--force", action="store_true", help="replace BUNDLE if it is a bundle")
    return parser


def _export(given: argparse.Namespace) -> None:
    torch.set_num_threads(cpu.threads())
    run = Run(given.run)
    checkpoint = run.checkpoint(given.checkpoint)
    heldout, metrics = run.heldout(), run.metrics(checkpoint)
    print(f"reading {checkpoint}")
    encoder, head = load_model(checkpoint)
    packed = convert_values(head, given.head_dtype) if given.head_dtype else head

    def write_encoder(path: Path) -> None:
        print("exporting the encoder to ONNX")
        export_encoder(encoder, path)

    def proof(bundle: Bundle) -> dict[str, Any]:
        print(f"comparing bundle and checkpoint on {len(heldout)} held-out texts")
        parity = prove(bundle, encoder=encoder, trained=head, packed=packed, labels=run.labels(), heldout=heldout)
        print("\n" + parity.table() + "\n")
        return asdict(parity)

    manifest = write_bundle(
        given.out,
        name=given.name or given.out.resolve().name,
        head=packed,
        labels=run.labels(),
        tokenizer=export_tokenizer(encoder),
        max_length=encoder.config.max_length,
        write_encoder=write_encoder,
        metrics=metrics,
        prove=proof,
        force=given.force,
    )
    print(f"{given.out}: {manifest.summary()}")


def _fail(message: str, code: int) -> int:
    print(f"python -m export: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
