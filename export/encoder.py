"""A trained encoder as an ONNX file that takes batches of any size and texts of any length.

input_ids, attention_mask int64 [B, S] → embedding fp32 [B, D]
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass
from tokenizers import Tokenizer

from models.encoder import Encoder, EncoderError

INPUTS, OUTPUT = ("input_ids", "attention_mask"), "embedding"
_OPSET = 20  # the first with Gelu as one operator
_MAX_INLINE = 1_800_000_000  # bytes; protobuf ends at 2 GiB, so larger weights go to a file beside


def export_encoder(encoder: Encoder, path: Path) -> None:
    """Writes `path`, and `path`.data beside it when the weights are too large for one file; EncoderError.

    Plain "eager" attention is exported: torch's fused one does not decompose for every architecture (T5), and is no faster in
    ONNX Runtime.
    """
    # Sizes of 1 would be taken for constants; the mask has padding because a mask of ones may be dropped.
    length = max(2, min(8, encoder.config.max_length))
    input_ids = torch.zeros(2, length, dtype=torch.int64)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -1] = 0
    shape = {
        0: torch.export.Dim("batch", min=1),
        1: torch.export.Dim("length", min=1, max=max(length, encoder.config.max_length)),
    }
    with _eager_attention(encoder), _quiet():
        try:
            program = torch.onnx.export(
                encoder.eval(),
                (input_ids, attention_mask),
                dynamo=True,
                input_names=INPUTS,
                output_names=[OUTPUT],
                dynamic_shapes=dict.fromkeys(INPUTS, shape),
                opset_version=_OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            kind, reason = encoder.transformer.config.model_type, str(error.__cause__ or error).partition("\n")[0]
            raise EncoderError(f"an encoder of type {kind} cannot be exported to ONNX: {reason}") from error
        assert program is not None  # None only without dynamo
        # An inner value may have the output's name, and the metadata holds stack traces of this machine.
        Sequential(NameFixPass(), ClearMetadataAndDocStringPass())(program.model)
        weights = sum(parameter.nbytes for parameter in encoder.parameters())
        program.save(path, external_data=weights > _MAX_INLINE)


def export_tokenizer(encoder: Encoder) -> str:
    """The encoder's tokenizer as JSON: truncates to the encoder's length and pads to the longest text of a batch."""
    tokenizer = Tokenizer.from_str(encoder.tokenizer.to_str())
    tokenizer.enable_truncation(encoder.config.max_length)
    tokenizer.enable_padding(pad_id=encoder.pad_id, pad_token=tokenizer.id_to_token(encoder.pad_id) or "")
    text: str = tokenizer.to_str()
    return text


@contextmanager
def _eager_attention(encoder: Encoder) -> Iterator[None]:
    before = encoder.transformer.config._attn_implementation
    encoder.transformer.set_attn_implementation("eager")
    try:
        yield
    finally:
        encoder.transformer.set_attn_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of optional packages and of its own deprecated calls; none of it concerns the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
