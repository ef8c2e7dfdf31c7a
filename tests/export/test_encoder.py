"""The exported encoder computes what the torch encoder does, for any batch and length."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from export import encoder as export_encoder_module
from export.encoder import export_encoder, export_tokenizer
from export.onnx_runtime import onnxruntime
from models.encoder import Encoder, EncoderConfig, Pooling
from tests.export.conftest import TEXTS, small_encoder

LONGEST = 24


def run(file: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    assert [(node.name, node.type) for node in session.get_inputs()] == [
        ("input_ids", "tensor(int64)"),
        ("attention_mask", "tensor(int64)"),
    ]
    (output,) = session.get_outputs()
    assert (output.name, output.type) == ("embedding", "tensor(float)")
    embedding: np.ndarray = session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    return embedding


def assert_same(encoder: Encoder, file: Path, batch: int, length: int) -> None:
    """Both encoders on random tokens, each row with its own padding."""
    rng = np.random.default_rng(batch * 1000 + length)
    mask = (np.arange(length) < rng.integers(1, length, (batch, 1), endpoint=True)).astype(np.int64)
    ids = np.where(mask, rng.integers(5, encoder.tokenizer.get_vocab_size(), mask.shape), encoder.pad_id)
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    embedding = run(file, ids, mask)
    assert embedding.dtype == np.float32
    assert embedding.shape == (batch, encoder.width)
    np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3, 40])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, LONGEST])
def test_any_batch_and_length(exported: Path, batch: int, length: int) -> None:
    assert_same(small_encoder(), exported / "encoder.onnx", batch, length)


def tiny(pooling: Pooling, max_length: int, layers: int = 1) -> Encoder:
    config = EncoderConfig(pooling, max_length, dropout=0.5)
    return Encoder.small(TEXTS * 3, config, vocabulary=150, width=16, layers=layers, heads=2, seed=3)


@pytest.mark.slow
def test_a_bag_of_words(tmp_path: Path) -> None:
    encoder = tiny("mean", LONGEST, layers=0)
    export_encoder(encoder, tmp_path / "encoder.onnx")
    for batch, length in ((1, 1), (4, 9)):
        assert_same(encoder, tmp_path / "encoder.onnx", batch, length)


@pytest.mark.slow
def test_last_token_pooling_and_the_shortest_length(tmp_path: Path) -> None:
    encoder = tiny("last", 3).train()  # exported without dropout though it is training
    export_encoder(encoder, tmp_path / "encoder.onnx")
    for batch, length in ((1, 1), (1, 2), (5, 3)):
        assert_same(encoder.eval(), tmp_path / "encoder.onnx", batch, length)


@pytest.mark.slow
def test_large_weights_go_to_a_file_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_encoder_module, "_MAX_INLINE", 1_000)
    encoder = tiny("cls", LONGEST)
    attention = encoder.transformer.config._attn_implementation
    export_encoder(encoder, tmp_path / "encoder.onnx")
    assert encoder.transformer.config._attn_implementation == attention
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.onnx", "encoder.onnx.data"]
    assert_same(encoder, tmp_path / "encoder.onnx", 3, 5)
    assert_same(encoder, tmp_path / "encoder.onnx", 1, 1)
    assert capfd.readouterr() == ("", "")  # the exporter's warnings stay away from the user


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True])
def test_int8_multiplies_integers_and_stays_near(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if beside:
        monkeypatch.setattr(export_encoder_module, "_MAX_INLINE", 1_000)
    encoder = small_encoder()
    export_encoder(encoder, tmp_path / "encoder.onnx", "int8")
    names = ["encoder.onnx", "encoder.onnx.data"] if beside else ["encoder.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert b"MatMulInteger" in (tmp_path / "encoder.onnx").read_bytes()
    for batch, length in ((1, 1), (7, LONGEST)):
        ids = np.random.default_rng(batch).integers(5, encoder.tokenizer.get_vocab_size(), (batch, length))
        with torch.inference_mode():
            expected = encoder(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64)).numpy()
        embedding = run(tmp_path / "encoder.onnx", ids, np.ones_like(ids))
        assert 0 < np.abs(embedding - expected).max() < 0.2 * np.abs(expected).max()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_file_says_nothing_of_the_machine_that_made_it(exported: Path) -> None:
    assert not re.search(rb"site-packages|\.py\b|Traceback", (exported / "encoder.onnx").read_bytes())


@pytest.mark.slow
def test_an_encoder_that_cannot_be_exported_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadsItsInput(Encoder):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids, attention_mask) if input_ids.sum() > 7 else input_ids.float()

    encoder = tiny("mean", LONGEST)
    encoder.__class__ = ReadsItsInput
    with pytest.raises(ValueError, match=r"an encoder of type bert cannot be exported to ONNX: \S[^\n]*$"):
        export_encoder(encoder, tmp_path / "encoder.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_file_truncates_and_pads_as_the_encoder_was_trained() -> None:
    encoder = small_encoder()
    tokenizer = Tokenizer.from_str(export_tokenizer(encoder))
    texts = [*TEXTS, "file " * 100, "x"]
    encodings = tokenizer.encode_batch(texts)
    assert {len(encoding.ids) for encoding in encodings} == {LONGEST}
    assert encodings[-1].ids[-1] == encoder.pad_id
    assert encodings[-1].attention_mask[-1] == 0
    assert [tokenizer.encode(text).ids for text in texts] == encoder.tokenize(texts)
    assert encoder.tokenizer.truncation is None  # the encoder's own is as it was
    assert encoder.tokenizer.padding is None
