"""The engine of a GPU, on a GPU; without one, tests/test_interpreted.py runs this file in Triton's interpreter."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from export.bundle import Bundle, open_bundle, write_bundle
from export.encoder import export_encoder, export_tokenizer
from export.onnx_runtime import onnxruntime as ort
from models.encoder import Encoder, EncoderConfig
from models.head import Block, Head
from models.kernels import Subset, reference
from models.kernels.gpu.launch import INTERPRETED
from serve.engine import CpuEngine, DeviceLost
from serve.gpu.engine import Embeddings, GpuEngine
from serve.gpu.lanes import Lane
from serve.gpu.search import Search
from tests.serve.harness import TEXTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device"),
]
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
LABELS, MAX_LENGTH = 90, 16


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two blocks, an encoder for ONNX Runtime and one for torch."""
    path = tmp_path_factory.mktemp("gpu") / "bundle"
    encoder = Encoder.small(TEXTS * 5, EncoderConfig("mean", MAX_LENGTH), vocabulary=200, width=32, layers=1, heads=2, seed=1)
    rng = np.random.default_rng(2)
    every = rng.permutation(LABELS).astype(np.int32)
    blocks = (
        Block.random(every[:20], width=32, connectivity="dense", fan_in=32, group_size=16, rng=rng),
        Block.random(every[20:], width=32, connectivity="shared", fan_in=12, group_size=16, dtype="bf16", rng=rng),
    )

    def write_encoder(file: Path) -> None:
        export_encoder(encoder, file)
        encoder.save(file.parent / "encoder")

    write_bundle(
        path, name="topics", head=Head(32, LABELS, blocks), labels=((f"t-{i}", "") for i in range(LABELS)),
        tokenizer=export_tokenizer(encoder), max_length=MAX_LENGTH, write_encoder=write_encoder, metrics={},
    )  # fmt: skip
    return open_bundle(path)


@pytest.fixture(scope="module", autouse=True)
def _precision() -> Iterator[None]:
    """The engine lets the whole process multiply in TF32."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="session", params=["onnx", "torch"])
def engine(request: pytest.FixtureRequest, small_bundle: Bundle) -> GpuEngine:
    if request.param == "onnx" and DEVICE.type == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    engine = GpuEngine(small_bundle, 1, DEVICE, request.param)
    assert engine.warm_up(max_inputs=3, max_tokens=64) > 0
    return engine


@pytest.fixture(scope="session")
def sequences(small_bundle: Bundle) -> list[list[int]]:
    return [tokens.ids for tokens in CpuEngine(small_bundle, 1).new_tokenizer()([*TEXTS, "a", " ".join(TEXTS)])]


def assert_same_best(bundle: Bundle, x: np.ndarray, best: tuple[np.ndarray, np.ndarray], k: int, atol: float) -> None:
    """The labels are the best for x, or as good as these."""
    scores, labels = best
    every, order = reference.topk(x, bundle.head, LABELS)
    truth = np.take_along_axis(every, np.argsort(order, axis=1), axis=1)  # by label
    np.testing.assert_allclose(scores, every[:, :k], atol=atol)
    np.testing.assert_allclose(np.take_along_axis(truth, labels.astype(np.int64), axis=1), scores, atol=atol)
    assert all(len(set(row)) == len(row) for row in labels)


# TF32 has 10 bits of mantissa.
TOLERANCE = 1e-4 if INTERPRETED else 2e-2


@pytest.mark.parametrize("k", [1, 16, 17])
def test_answers_are_those_of_the_cpu(engine: GpuEngine, small_bundle: Bundle, sequences: list[list[int]], k: int) -> None:
    expected = CpuEngine(small_bundle, 1).encode(sequences)
    x = engine.encode(sequences)
    assert len(x) == len(sequences)
    np.testing.assert_allclose(x.tensor().cpu().numpy(), expected, atol=TOLERANCE)
    scores, labels = engine.topk(x, k)
    assert (scores.dtype, labels.dtype) == (np.float32, np.int32)
    assert_same_best(small_bundle, expected, (scores, labels), k, 10 * TOLERANCE)


def test_padding_rows_and_company_change_nothing(engine: GpuEngine, sequences: list[list[int]]) -> None:
    """Batches of up to 3 are recorded; larger ones run as they are."""
    together = engine.encode(sequences).tensor()
    for count in (1, 3, 5):
        few = engine.encode(sequences[:count])
        torch.testing.assert_close(few.tensor(), together[:count], atol=TOLERANCE, rtol=0)
        scores, labels = engine.topk(few, 5)
        assert scores.shape == labels.shape == (count, 5)


def test_rows_that_nobody_waits_for_are_left_out(engine: GpuEngine, sequences: list[list[int]]) -> None:
    x = engine.encode(sequences[:5])
    kept = x[[True, False, True, False, True]][[False, True, True]]
    assert len(kept) == 2
    every, some = engine.topk(x, 5), engine.topk(kept, 5)
    for whole, part in zip(every, some, strict=True):
        np.testing.assert_allclose(part, whole[[2, 4]], rtol=1e-5)
    for half in (slice(2), slice(2, None)):  # what the worker tries again when a batch fails
        for whole, part in zip(every, engine.topk(x[half], 5), strict=True):
            np.testing.assert_allclose(part, whole[half], rtol=1e-5)


def test_filters_are_exact(engine: GpuEngine, small_bundle: Bundle, sequences: list[list[int]]) -> None:
    """Allow-lists, deny-lists and no filter in one batch; of three allowed labels, three are found, and then nothing."""
    place_of = small_bundle.head.places()
    nothing = np.empty(0, np.int64)
    few, many = Subset.of(place_of, np.array([80, 3, 41]), nothing), Subset.of(place_of, None, np.arange(60))
    allowed = [few, None, many, few, None, many][: len(sequences)]
    x = engine.encode(sequences[: len(allowed)])
    scores, labels = engine.topk(x, 5, allowed)
    expected, order = reference.topk(x.tensor().cpu().numpy(), small_bundle.head, 5, allowed=allowed)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert set(labels[0][:3]) == {80, 3, 41}
    assert (labels[[0, 3], 3:] == -1).all()
    assert (labels[[2, 5]] >= 60).all()
    assert (labels == order).mean() > 0.9
    for one, other in zip(engine.topk(x, 20)[0][[1, 4]], engine.topk(x, 20, allowed)[0][[1, 4]], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_head_leaves_the_device_with_its_search(small_bundle: Bundle) -> None:
    """At once: after a reload nobody may look for cycles in a long time."""
    search = Search(small_bundle.head, DEVICE)
    search.record(2)
    head = weakref.ref(search._head)
    gc.disable()
    try:
        del search
        assert head() is None
    finally:
        gc.enable()


def test_embeddings_go_to_another_process_as_an_array(engine: GpuEngine, sequences: list[list[int]]) -> None:
    x = engine.encode(sequences[:4])[[True, False, True, True]]
    assert isinstance(x, Embeddings)
    there = pickle.loads(pickle.dumps(x))
    assert isinstance(there, np.ndarray)
    assert there.shape == (3, 32)
    for one, other in zip(engine.topk(x, 5), engine.topk(there, 5), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")  # of numpy, in the interpreter
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_numbers_that_are_not_finite_are_an_error(engine: GpuEngine, number: float) -> None:
    x = np.zeros((3, 32), np.float32)
    x[1, 4] = number
    with pytest.raises(OverflowError, match="x row 1"):
        engine.topk(x, 3)


class _FailedStream:
    """What a stream does after an illegal access: every call gives that error again."""

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_after_a_failure_of_the_device_no_error_is_a_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeviceLost is not an Exception: it ends the thread, and so the process, while a fault of a batch passes as it is."""
    lane = Lane(DEVICE)
    with pytest.raises(OverflowError), lane():
        raise OverflowError("x row 1")
    monkeypatch.setattr(lane, "_stream", _FailedStream())
    with pytest.raises(DeviceLost, match="illegal memory access") as caught:
        lane.wait()
    assert not isinstance(caught.value, Exception)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    with pytest.raises(DeviceLost), lane():
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_one_thread_encodes_while_another_searches(engine: GpuEngine, sequences: list[list[int]]) -> None:
    x = engine.encode(sequences)
    expected = engine.topk(x, 5)
    failures: list[object] = []

    def search() -> None:
        for _ in range(200):
            if any(not np.allclose(a, b) for a, b in zip(engine.topk(x, 5), expected, strict=True)):
                failures.append("other answers")

    thread = threading.Thread(target=search)
    thread.start()
    while thread.is_alive():
        engine.encode(sequences[:3])
    thread.join()
    assert not failures


@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_memory_of_the_device(engine: GpuEngine) -> None:
    memory = engine.device_memory()
    assert memory.keys() == {"used", "total", "allocated", "reserved", "peak"}
    assert 0 < memory["allocated"] <= memory["reserved"] <= memory["used"] <= memory["total"]
    assert memory["allocated"] <= memory["peak"]
