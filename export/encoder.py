"""A trained encoder as an ONNX file that takes batches of any size and texts of any length.

input_ids, attention_mask int64 [B, S] → embedding fp32 [B, D]

With int8 the weights of the transformer's matrix products are rounded to 7 bits, with a scale per output; what they are
multiplied with is rounded to 8 bits while running, with a scale per batch. 7 bits, because processors without VNNI add pairs of
products in 16 bits. A text's embedding then depends a little on the texts it shares a batch with.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass
from tokenizers import Tokenizer

from models.encoder import Encoder, EncoderError

INPUTS, OUTPUT = ("input_ids", "attention_mask"), "embedding"
_OPSET = 20  # the first with Gelu as one operator
_MAX_INLINE = 1_800_000_000  # bytes; protobuf ends at 2 GiB, so larger weights go to a file beside


def export_encoder(encoder: Encoder, path: Path, dtype: str = "fp32") -> None:
    """Writes `path`, and `path`.data beside it when the weights are too large for one file; EncoderError.

    dtype   "fp32" or "int8", of the weights of matrix products
    """
    external = sum(parameter.nbytes for parameter in encoder.parameters()) > _MAX_INLINE
    if dtype == "fp32":
        return _export(encoder, path, external)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / path.name
        _export(encoder, whole, external)
        _quantize(whole, path, external)


def _export(encoder: Encoder, path: Path, external: bool) -> None:
    """Writes it in fp32, the weights to a file beside if `external`.

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
    with _eager_attention(encoder), _quiet("torch.onnx"):
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
        program.save(path, external_data=external)


def _quantize(whole: Path, path: Path, external: bool) -> None:
    """Writes to `path` the graph in `whole` with int8 weights."""
    from export import onnx_runtime  # noqa: F401  telemetry is off before the next line imports ONNX Runtime
    from onnxruntime.quantization import QuantType, quantize_dynamic  # isort: skip

    model = onnx.load(whole, load_external_data=False)
    del model.graph.value_info[:]  # the quantizer transposes weights and stumbles over their shapes there
    onnx.save(model, whole)
    with _quiet("root"), _temporary_files_in(whole.parent):
        try:
            quantize_dynamic(
                whole,
                path,
                op_types_to_quantize=["MatMul"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=external,
                extra_options={"MatMulConstBOnly": True},
            )
        except DecodeError as error:  # onnx writes a file for the quantizer and does not say when it finds no room
            raise OSError(ENOSPC, "a file that the quantizer reads was cut short; is the disk full?") from error


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
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """The quantizer's are as large as the model: they go where there is room for that."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """They warn of optional packages and steps and of their own deprecated calls; none of it concerns the user."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
