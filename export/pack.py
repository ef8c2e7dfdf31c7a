"""From a run directory to a proven bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from export.bundle import TORCH_ENCODER, Bundle, BundleError, Manifest, check_target, write_bundle
from export.convert import convert_values
from export.encoder import export_encoder, export_tokenizer
from export.parity import ParityError, prove
from export.run import Run, RunError, load_model
from models.encoder import EncoderError
from models.head import HeadError
from models.kernels import cpu

__all__ = ["INPUT_ERRORS", "ParityError", "pack"]

INPUT_ERRORS = (RunError, BundleError, EncoderError, HeadError, OSError)  # what `pack` raises when a file or setting is wrong


def pack(
    run_folder: Path,
    out: Path,
    *,
    checkpoint: str | None,
    name: str | None,
    head_dtype: str | None,
    encoder_dtype: str,
    torch_encoder: bool,
    force: bool,
) -> Manifest:
    """Writes the bundle `out` and says on standard output what it does. INPUT_ERRORS; ParityError.

    checkpoint  the latest if None                  name   the last part of `out` if None
    head_dtype  as trained if None                  force  replaces an older bundle
    encoder_dtype  "fp32" or "int8"
    torch_encoder  also puts in the encoder as torch reads it, beside the ONNX file
    """
    check_target(out, force)
    run = Run(run_folder)
    source = run.checkpoint(checkpoint)
    heldout, metrics = run.heldout(), run.metrics(source)
    torch.set_num_threads(cpu.threads())
    print(f"reading {source}")
    encoder, head = load_model(source)
    packed = convert_values(head, head_dtype) if head_dtype else head

    def write_encoder(path: Path) -> None:
        print("exporting the encoder to ONNX")
        export_encoder(encoder, path, encoder_dtype)
        if torch_encoder:
            encoder.save(path.parent / TORCH_ENCODER)

    def proof(bundle: Bundle) -> dict[str, Any]:
        print(f"comparing bundle and checkpoint on {len(heldout)} held-out texts")
        parity = prove(
            bundle,
            encoder=encoder,
            trained=head,
            packed=packed,
            labels=run.labels(),
            heldout=heldout,
            encoder_dtype=encoder_dtype,
        )
        print("\n" + parity.table() + "\n")
        return asdict(parity)

    return write_bundle(
        out,
        name=name or out.resolve().name,
        head=packed,
        labels=run.labels(),
        tokenizer=export_tokenizer(encoder),
        max_length=encoder.config.max_length,
        write_encoder=write_encoder,
        metrics=metrics,
        prove=proof,
        force=force,
    )
