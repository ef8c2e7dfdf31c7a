"""Tokenizer, encoder and head as the server runs them, against the plain way of doing the same."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from export.bundle import BundleError, open_bundle
from models import kernels
from models.kernels import cpu, reference
from serve.engine import CpuEngine, Engine
from tests.kernels.cases import SCREENING
from tests.serve.harness import MAX_LENGTH, TEXTS


def sequences(engine: Engine, *texts: str) -> list[list[int]]:
    return [tokens.ids for tokens in engine.new_tokenizer()(texts)]


def test_padding_and_company_do_not_change_an_embedding(engine: Engine) -> None:
    texts = sequences(engine, *TEXTS, "a", " ".join(TEXTS))
    together = engine.encode(texts)
    alone = np.concatenate([engine.encode([ids]) for ids in texts])
    assert together.shape == (len(texts), 96)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_top_k_is_that_of_the_reference(engine: Engine) -> None:
    x = engine.encode(sequences(engine, *TEXTS))
    scores, labels = engine.topk(x, 10)
    expected_scores, expected_labels = reference.topk(x, engine.bundle.head, 10)
    np.testing.assert_array_equal(labels, expected_labels)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-5)


def test_it_looks_in_8_bits_first_where_the_processor_can(engine: Engine) -> None:
    blocks = [screen for screen in kernels.screen(engine.bundle.head) if screen]
    assert bool(blocks) == (cpu.level() in SCREENING)
    assert engine.added_bytes() == {"screen": sum(screen.nbytes for screen in blocks)}


def test_every_length_is_padded_a_little_and_to_few_shapes(engine: Engine) -> None:
    padded = [engine.padded(length) for length in range(1, MAX_LENGTH + 1)]
    assert all(length <= to <= MAX_LENGTH for length, to in enumerate(padded, 1))
    assert padded == sorted(padded)
    assert padded[-1] == MAX_LENGTH
    assert len(set(padded)) <= 4


def test_threads_go_to_the_head_as_well(bundle_path: Path) -> None:
    assert Engine.open(bundle_path).threads == cpu.default_threads()
    Engine.open(bundle_path, threads=1)
    assert cpu.threads() == 1


def test_warm_up_takes_some_time(engine: Engine) -> None:
    assert engine.warm_up(max_inputs=4, max_tokens=64) > 0


def test_an_encoder_of_another_width_is_refused(bundle_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    with pytest.raises(BundleError, match=r"encoder\.onnx: gives .*96.*the head reads 97"):
        CpuEngine(replace(bundle, manifest=replace(bundle.manifest, width=97)), threads=1)


def test_an_encoder_that_is_no_onnx_is_refused(bundle_path: Path, tmp_path: Path) -> None:
    bundle = open_bundle(bundle_path)
    (tmp_path / "encoder.onnx").write_bytes(b"not a graph")
    (tmp_path / "tokenizer.json").write_bytes(bundle.tokenizer_file.read_bytes())
    with pytest.raises(BundleError, match=r"encoder\.onnx: ONNX Runtime cannot load it"):
        CpuEngine(replace(bundle, path=tmp_path), threads=1)


@pytest.mark.parametrize(
    "text", ["a", " ".join(TEXTS), " ".join(TEXTS * 500), "word" * 5000, TEXTS[0] + " " * 50_000 + TEXTS[1]]
)
def test_a_long_text_has_the_same_first_tokens_as_the_whole(bundle_path: Path, engine: Engine, text: str) -> None:
    whole = Tokenizer.from_file(str(bundle_path / "tokenizer.json"))
    whole.no_padding()
    expected = whole.encode(text)
    (tokens,) = engine.new_tokenizer()([text])
    assert tokens.ids == expected.ids
    assert tokens.truncated == bool(expected.overflowing)


def test_of_a_book_only_the_beginning_is_tokenized(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, read = engine.new_tokenizer(), []
    encode = tokenizer._encode_whole
    monkeypatch.setattr(tokenizer, "_encode_whole", lambda text: read.append(len(text)) or encode(text))
    assert tokenizer([" ".join(TEXTS * 10_000)])[0].truncated
    assert sum(read) < 10_000


def test_tokenizers_of_several_threads_do_not_meet(engine: Engine) -> None:
    expected = engine.new_tokenizer()(TEXTS)
    failures: list[object] = []

    def work() -> None:
        tokenizer = engine.new_tokenizer()
        try:
            failures.extend(tokens for _ in range(200) if (tokens := tokenizer(TEXTS)) != expected)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
