"""The Open Inference Protocol, as Triton's own client speaks it to a real server process, and by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from models import kernels
from serve.answers import probabilities
from serve.engine import Engine
from serve.http.tensors import Tensor, strings
from tests.serve.harness import TEXTS, Process, Serving, problem_of

N, K = len(TEXTS), 10


@pytest.fixture
def triton(server: Process) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(scope="module")
def expected(engine: Engine) -> tuple[np.ndarray, np.ndarray]:
    """Scores fp32 [N, K] and labels int32 [N, K]."""
    rows = [kernels.topk(engine.encode([text.ids]), engine.bundle.head, K) for text in engine.new_tokenizer()(TEXTS)]
    return np.concatenate([scores for scores, _ in rows]), np.concatenate([labels for _, labels in rows])


def texts(shape: list[int], *, binary: bool = True) -> InferInput:
    tensor = InferInput("text", shape, "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in TEXTS], dtype=object).reshape(shape), binary_data=binary)
    return tensor


def infer(client: httpx.Client, model: str = "topics", **body: Any) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return client.post(f"/v2/models/{model}/infer", content=json.dumps(body).encode(), headers=headers)


def tensor(*data: Any, **fields: Any) -> dict[str, Any]:
    return {"name": "text", "shape": [len(data)], "datatype": "BYTES", "data": list(data), **fields}


def test_a_server_that_is_ready_says_so(triton: InferenceServerClient, engine: Engine) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("topics")
    assert triton.is_model_ready("topics", engine.version)
    assert not triton.is_model_ready("other")
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]


@pytest.mark.parametrize("with_version", [False, True])
def test_metadata(triton: InferenceServerClient, engine: Engine, with_version: bool) -> None:
    assert triton.get_model_metadata("topics", engine.version if with_version else "") == {
        "name": "topics",
        "versions": [engine.version],
        "platform": "fanin",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "label_ids", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "scores", "datatype": "FP32", "shape": [-1, -1]},
            {"name": "label_keys", "datatype": "BYTES", "shape": [-1, -1]},
            {"name": "label_names", "datatype": "BYTES", "shape": [-1, -1]},
        ],
    }


@pytest.mark.parametrize("binary_out", [None, True, False])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("shape", [[N], [N, 1]])
def test_it_gives_the_exact_top_k_in_json_and_in_binary(
    triton: InferenceServerClient,
    expected: tuple[np.ndarray, np.ndarray],
    shape: list[int],
    binary_in: bool,
    binary_out: bool | None,
) -> None:
    outputs = None
    if binary_out is not None:
        outputs = [InferRequestedOutput(name, binary_data=binary_out) for name in ("scores", "label_ids")]
    result = triton.infer("topics", [texts(shape, binary=binary_in)], outputs=outputs, request_id="seven")
    label_ids, scores = result.as_numpy("label_ids"), result.as_numpy("scores")
    assert (label_ids.dtype, scores.dtype) == (np.int64, np.float32)
    assert label_ids.shape == scores.shape == (N, K)
    np.testing.assert_array_equal(label_ids, expected[1])
    np.testing.assert_allclose(scores, probabilities(expected[0]), rtol=1e-4)
    assert result.get_response()["id"] == "seven"
    assert [output["name"] for output in result.get_response()["outputs"]] == (
        ["scores", "label_ids"] if outputs else ["label_ids", "scores"]
    )


def test_keys_and_names_of_labels_are_given_when_asked_for(
    triton: InferenceServerClient, expected: tuple[np.ndarray, np.ndarray], engine: Engine
) -> None:
    outputs = [InferRequestedOutput("label_keys"), InferRequestedOutput("label_names", binary_data=False)]
    result = triton.infer(
        "topics", [texts([N])], model_version=engine.version, outputs=outputs, parameters={"top_k": 3}, timeout=10_000_000
    )
    assert [[key.decode() for key in row] for row in result.as_numpy("label_keys")] == [
        [f"t-{label}" for label in row[:3]] for row in expected[1]
    ]
    assert result.as_numpy("label_names")[0][0] == f"topic {expected[1][0][0]}"
    assert result.as_numpy("label_ids") is None


def test_parameters_mean_what_they_mean_in_predict(client: httpx.Client, expected: tuple[np.ndarray, np.ndarray]) -> None:
    answer = infer(client, inputs=[tensor(*TEXTS)], parameters={"top_k": 2, "scores": "logit", "truncate": False}).json()
    scores = answer["outputs"][1]
    assert scores["shape"] == [N, 2]
    np.testing.assert_allclose(np.reshape(scores["data"], (N, 2)), expected[0][:, :2], rtol=1e-4, atol=1e-5)
    assert "id" not in answer


def test_what_is_wrong_is_told_in_the_way_that_its_clients_read(triton: InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="there is no model 'other'") as caught:
        triton.infer("other", [texts([N])])
    assert caught.value.status() == "404"
    with pytest.raises(InferenceServerException, match=r"/parameters/top_k: is 5000, at most 1000"):
        triton.infer("topics", [texts([N])], parameters={"top_k": 5000})
    with pytest.raises(InferenceServerException, match="encoded as gzip"):
        triton.infer("topics", [texts([N])], request_compression_algorithm="gzip")


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/other/ready", "/v2/models/topics/versions/1"])
def test_an_unknown_model_or_version_is_404(client: httpx.Client, path: str) -> None:
    problem = problem_of(client.get(path), 404, "unknown-model")
    assert problem["error"] == problem["detail"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/inputs"),
        ({"inputs": []}, "/inputs"),
        ({"inputs": [tensor("a"), tensor("a")]}, "/inputs"),
        ({"inputs": [tensor("a", name="image")]}, "/inputs/0/name"),
        ({"inputs": [tensor("a", datatype="FP32")]}, "/inputs/0/datatype"),
        ({"inputs": [tensor("a", shape=[2])]}, "/inputs/0/shape"),
        ({"inputs": [tensor("a", shape=[1, 2])]}, "/inputs/0/shape"),
        ({"inputs": [tensor("a", shape=[])]}, "/inputs/0/shape"),
        ({"inputs": [tensor("a", shape=[10**30])]}, "/inputs/0/shape"),
        ({"inputs": [tensor("a", data=None)]}, "/inputs/0"),
        ({"inputs": [tensor("a", parameters={"binary_data_size": 4})]}, "/inputs/0/parameters/binary_data_size"),
        ({"inputs": [tensor("a", " ")]}, "/inputs/0/data/1"),
        ({"inputs": [tensor("a", "\ud800")]}, "/inputs/0/data/1"),
        ({"inputs": [tensor(*["a"] * 129)]}, "/inputs/0/data"),
        ({"inputs": [tensor("a")], "parameters": {"top_k": 0}}, "/parameters/top_k"),
        ({"inputs": [tensor("a")], "parameters": {"sequence_id": 3}}, "/parameters/sequence_id"),
        ({"inputs": [tensor("a")], "outputs": [{"name": "logits"}]}, "/outputs/0/name"),
        (
            {"inputs": [tensor("a", " ".join(TEXTS))], "parameters": {"truncate": False}},
            "/inputs/0/data/1",
        ),
    ],
)
def test_what_is_not_valid_is_named_by_its_place(client: httpx.Client, body: dict[str, Any], pointer: str) -> None:
    problem = problem_of(infer(client, **body), 422, "invalid-request")
    assert pointer in [error["pointer"] for error in problem["errors"]]
    assert problem["error"] == problem["detail"]


@pytest.mark.parametrize(
    ("length", "binary", "status"),
    [
        (None, struct.pack("<I", 5) + b"a te", 400),  # all of it is taken for JSON
        ("x", b"", 400),
        ("-1", b"", 400),
        ("1000000", b"", 400),
        ("9" * 5000, b"", 400),
        ("right", struct.pack("<I", 5) + b"a te", 422),
        ("right", struct.pack("<I", 1 << 31) + b"a text", 422),
        ("right", struct.pack("<I", 2) + b"\xff\xff", 422),
        ("right", b"\1\0", 422),
    ],
)
def test_binary_data_that_do_not_fit_are_refused(client: httpx.Client, length: str | None, binary: bytes, status: int) -> None:
    size = len(binary)
    head = b'{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":%d}}]}' % size
    headers = {"Content-Type": "application/octet-stream"}
    if length is not None:
        headers["Inference-Header-Content-Length"] = str(len(head)) if length == "right" else length
    response = client.post("/v2/models/topics/infer", content=head + binary, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]


def test_a_server_that_still_loads_is_live_but_not_ready(serving: Serving) -> None:
    with serving(load=False) as local, InferenceServerClient(local.url.removeprefix("http://")) as triton:
        assert triton.is_server_live()
        assert not triton.is_server_ready()
        assert not triton.is_model_ready("topics")
        with pytest.raises(InferenceServerException, match="loading"):
            triton.infer("topics", [texts([N])])


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)))))
def test_binary_strings_come_back_as_they_went(values: list[str]) -> None:
    assert strings(Tensor("t", "BYTES", [values]).as_binary()) == values


@given(st.binary())
def test_any_bytes_are_strings_or_an_error(data: bytes) -> None:
    try:
        found = strings(data)
    except ValueError:
        return
    assert Tensor("t", "BYTES", [found]).as_binary() == data
