"""Label filters: the best of the labels that may be given, each request with its own."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from models import kernels
from serve.engine import Engine
from tests.serve.harness import LABELS, TEXTS, Serving, problem_of

FILTERS: list[dict[str, Any] | None] = [
    {"allow": ["t-3", "t-77", "t-200", "t-499", "t-3"]},
    None,
    {"deny": [f"t-{i}" for i in range(0, LABELS, 2)]},
    {"allow": [f"t-{i}" for i in range(100, 400)], "deny": [f"t-{i}" for i in range(200, 500)]},
    {"allow": ["t-9"]},
    {},
    {"allow": None, "deny": []},
    {"allow": [f"t-{i}" for i in range(LABELS)], "deny": ["t-1"]},
]


def ask(client: httpx.Client, **body: Any) -> list[list[tuple[str, float]]]:
    """Per text the (id, logit) of its labels."""
    response = client.post("/predict", json={"scores": "logit", **body})
    assert response.status_code == 200, response.text
    return [[(row["id"], row["score"]) for row in one["labels"]] for one in response.json()["predictions"]]


def expected(engine: Engine, text: str, labels: dict[str, Any] | None, k: int) -> list[tuple[str, float]]:
    """From all scores of the text, best first, those that the filter leaves."""
    (tokens,) = engine.new_tokenizer()([text])
    scores, order = kernels.topk(engine.encode([tokens.ids]), engine.bundle.head, LABELS)
    allow, deny = (labels or {}).get("allow"), (labels or {}).get("deny", [])
    every = (
        (engine.bundle.labels.id(label), score) for label, score in zip(order[0].tolist(), scores[0].tolist(), strict=True)
    )
    return [(text, score) for text, score in every if (allow is None or text in allow) and text not in deny][:k]


def assert_same(found: list[tuple[str, float]], wanted: list[tuple[str, float]]) -> None:
    assert [text for text, _ in found] == [text for text, _ in wanted]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 10, 1000])
@pytest.mark.parametrize("labels", FILTERS, ids=range(len(FILTERS)))
def test_the_answer_is_the_exact_top_k_of_what_may_be_given(
    client: httpx.Client, engine: Engine, labels: dict[str, Any] | None, top_k: int
) -> None:
    found = ask(client, inputs=TEXTS[:2], top_k=top_k, labels=labels)
    for text, one in zip(TEXTS[:2], found, strict=True):
        assert_same(one, expected(engine, text, labels, top_k))


def test_requests_of_one_batch_have_their_own_filters(serving: Serving, engine: Engine) -> None:
    with serving() as local, httpx.Client(base_url=local.url, timeout=30) as client, ThreadPoolExecutor(17) as pool:
        local.engine.gate.clear()
        first = pool.submit(ask, client, inputs="a")
        assert local.engine.entered.wait(10)
        asked = [(text, labels) for text in TEXTS[:2] for labels in FILTERS]
        found = [pool.submit(ask, client, inputs=text, labels=labels) for text, labels in asked]
        while local.metric("queue_inputs") < len(asked):
            time.sleep(0.005)
        local.engine.gate.set()
        for (text, labels), answer in zip(asked, found, strict=True):
            assert_same(answer.result()[0], expected(engine, text, labels, 10))
        assert len(first.result()[0]) == 10
        assert max(local.engine.batches) > 4


def test_min_score_and_probabilities_go_with_a_filter(client: httpx.Client, engine: Engine) -> None:
    labels = {"allow": ["t-3", "t-77", "t-200"]}
    best, *_, worst = expected(engine, TEXTS[0], labels, 10)
    body = {"inputs": TEXTS[0], "labels": labels, "top_k": 10, "return_names": False}
    rows = client.post("/predict", json=body).json()["predictions"][0]["labels"]
    np.testing.assert_allclose(rows[0]["score"], 1 / (1 + np.exp(-best[1])), rtol=1e-4)
    assert len(ask(client, **body, min_score=(best[1] + worst[1]) / 2)[0]) < 3


@pytest.mark.parametrize(
    ("labels", "faults"),
    [
        ({"allow": ["t-1", "x", "t-2", ""]}, {"/labels/allow/1": "'x'", "/labels/allow/3": "''"}),
        ({"allow": ["t-1"], "deny": ["t-500"]}, {"/labels/deny/0": "'t-500'"}),
        ({"deny": ["half a pair \ud800"]}, {"/labels/deny/0": "no label has id"}),
        ({"deny": ["T-1"]}, {"/labels/deny/0": "'T-1'"}),
        ({"allow": []}, {"/labels": "leave no label"}),
        ({"allow": ["t-1", "t-2"], "deny": ["t-2", "t-1"]}, {"/labels": "leave no label"}),
        ({"deny": [f"t-{i}" for i in range(LABELS)]}, {"/labels": "leave no label"}),
        ({"allow": "t-1"}, {"/labels/allow": "list"}),
        ({"allow": [1]}, {"/labels/allow/0": "string"}),
        ({"allow": [["t-1"]]}, {"/labels/allow/0": "string"}),
        ({"deny": None}, {"/labels/deny": "list"}),
        ({"only": ["t-1"]}, {"/labels/only": "not permitted"}),
        (["t-1"], {"/labels": "dictionary"}),
    ],
)
def test_a_filter_that_cannot_be_is_named_by_its_place(client: httpx.Client, labels: Any, faults: dict[str, str]) -> None:
    content = json.dumps({"inputs": "a", "labels": labels}).encode()
    response = client.post("/predict", content=content, headers={"Content-Type": "application/json"})
    errors = problem_of(response, 422, "invalid-request")["errors"]
    assert [error["pointer"] for error in errors] == list(faults)
    for error, words in zip(errors, faults.values(), strict=True):
        assert words in error["detail"]


def test_of_many_unknown_ids_the_first_are_named(client: httpx.Client) -> None:
    response = client.post("/predict", json={"inputs": "a", "labels": {"allow": [f"u-{i}" for i in range(1000)]}})
    errors = problem_of(response, 422, "invalid-request")["errors"]
    assert [error["pointer"] for error in errors] == [*(f"/labels/allow/{i}" for i in range(8)), "/labels"]
    assert errors[-1]["detail"] == "992 more ids are of no label"


def test_a_filter_may_have_so_many_labels(serving: Serving) -> None:
    with serving(max_filter_labels=3) as local, httpx.Client(base_url=local.url, timeout=30) as client:
        assert client.get("/info").json()["limits"]["max_filter_labels"] == 3
        assert len(ask(client, inputs="a", labels={"allow": ["t-1", "t-2"], "deny": ["t-2"]})[0]) == 1
        response = client.post("/predict", json={"inputs": "a", "labels": {"allow": ["t-1", "t-2"], "deny": ["t-2", "t-3"]}})
        (error,) = problem_of(response, 422, "invalid-request")["errors"]
        assert error == {"pointer": "/labels", "detail": "has 4 ids, at most 3 are taken"}
