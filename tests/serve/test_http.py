"""The routes of a real server process over a real socket."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models import kernels
from models.kernels import cpu
from serve.engine import Engine
from tests.kernels.cases import SCREENING
from tests.serve.harness import LABELS, MAX_LENGTH, TEXTS, Process, problem_of


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_predictions_are_the_exact_top_k_of_the_bundle(client: httpx.Client, engine: Engine) -> None:
    answer = ask(client, inputs=TEXTS, top_k=7, scores="logit")
    tokens = engine.new_tokenizer()(TEXTS)
    for text, prediction in zip(tokens, answer["predictions"], strict=True):
        scores, labels = kernels.topk(engine.encode([text.ids]), engine.bundle.head, 7)
        assert [row["id"] for row in prediction["labels"]] == [f"t-{label}" for label in labels[0]]
        assert [row["name"] for row in prediction["labels"]] == [f"topic {label}" for label in labels[0]]
        np.testing.assert_allclose([row["score"] for row in prediction["labels"]], scores[0], rtol=1e-4, atol=1e-5)
        assert prediction["tokens"] == len(text.ids)
        assert prediction["truncated"] is False
    assert answer["model"] == "topics"
    assert answer["model_version"] == engine.version
    assert answer["usage"] == {"inputs": len(TEXTS), "tokens": sum(len(text.ids) for text in tokens)}


def test_one_text_needs_no_list(client: httpx.Client) -> None:
    single, listed = ask(client, inputs=TEXTS[0]), ask(client, inputs=[TEXTS[0]])
    assert single["predictions"] == listed["predictions"]
    assert len(single["predictions"][0]["labels"]) == 10


def test_probabilities_are_the_sigmoid_of_the_logits(client: httpx.Client) -> None:
    logits = ask(client, inputs=TEXTS[1], top_k=LABELS, scores="logit")["predictions"][0]["labels"]
    probabilities = ask(client, inputs=TEXTS[1], top_k=LABELS)["predictions"][0]["labels"]
    assert [row["id"] for row in logits] == [row["id"] for row in probabilities]
    z = np.array([row["score"] for row in logits])
    np.testing.assert_allclose([row["score"] for row in probabilities], 1 / (1 + np.exp(-z)), rtol=1e-9)


def test_min_score_speaks_the_unit_of_the_scores(client: httpx.Client) -> None:
    every = ask(client, inputs=TEXTS[0], top_k=50)["predictions"][0]["labels"]
    least = every[20]["score"]
    some = ask(client, inputs=TEXTS[0], top_k=50, min_score=least)["predictions"][0]["labels"]
    assert some == [row for row in every if row["score"] >= least]
    assert ask(client, inputs=TEXTS[0], scores="logit", min_score=1e9)["predictions"][0]["labels"] == []


def test_more_labels_than_there_are_gives_all_of_them(client: httpx.Client) -> None:
    labels = ask(client, inputs=TEXTS[0], top_k=1000)["predictions"][0]["labels"]
    assert {row["id"] for row in labels} == {f"t-{i}" for i in range(LABELS)}


def test_names_can_be_left_out(client: httpx.Client) -> None:
    rows = ask(client, inputs=TEXTS[0], return_names=False)["predictions"][0]["labels"]
    assert all(row.keys() == {"id", "score"} for row in rows)


def test_long_texts_are_cut_and_say_so(client: httpx.Client) -> None:
    long = " ".join(TEXTS * 200)
    cut, whole = ask(client, inputs=[long, TEXTS[0]])["predictions"]
    assert (cut["tokens"], cut["truncated"]) == (MAX_LENGTH, True)
    assert whole["truncated"] is False


def test_a_long_text_is_an_error_when_it_must_not_be_cut(client: httpx.Client) -> None:
    long = " ".join(TEXTS)
    response = client.post("/predict", json={"inputs": ["short", long, long], "truncate": False})
    errors = problem_of(response, 422, "invalid-request")["errors"]
    assert [error["pointer"] for error in errors] == ["/inputs/1", "/inputs/2"]
    assert str(MAX_LENGTH) in errors[0]["detail"]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/inputs"),
        ({"inputs": ""}, "/inputs"),
        ({"inputs": " \n\t"}, "/inputs"),
        ({"inputs": []}, "/inputs"),
        ({"inputs": ["a", ""]}, "/inputs/1"),
        ({"inputs": ["a", 3]}, "/inputs/1"),
        ({"inputs": ["a", ["b"]]}, "/inputs/1"),
        ({"inputs": 3}, "/inputs"),
        ({"inputs": None}, "/inputs"),
        ({"inputs": {"text": "a"}}, "/inputs"),
        ({"inputs": "half a pair: \ud800"}, "/inputs"),
        ({"inputs": ["a"] * 129}, "/inputs"),
        ({"inputs": "a", "top_k": 0}, "/top_k"),
        ({"inputs": "a", "top_k": -1}, "/top_k"),
        ({"inputs": "a", "top_k": 1001}, "/top_k"),
        ({"inputs": "a", "top_k": 10**30}, "/top_k"),
        ({"inputs": "a", "top_k": "5"}, "/top_k"),
        ({"inputs": "a", "top_k": 2.5}, "/top_k"),
        ({"inputs": "a", "top_k": True}, "/top_k"),
        ({"inputs": "a", "min_score": "high"}, "/min_score"),
        ({"inputs": "a", "scores": "percent"}, "/scores"),
        ({"inputs": "a", "return_names": "yes"}, "/return_names"),
        ({"inputs": "a", "truncate": 1}, "/truncate"),
        ({"inputs": "a", "timeout_ms": 0}, "/timeout_ms"),
        ({"inputs": "a", "timeout_ms": "soon"}, "/timeout_ms"),
        ({"inputs": "a", "top-k": 5}, "/top-k"),
        ({"inputs": "a", "a/b~c": 5}, "/a~1b~0c"),
        ({"inputs": "a", "texts": 1}, "/texts"),
    ],
)
def test_what_is_not_valid_is_named_by_its_place(client: httpx.Client, body: Any, pointer: str) -> None:
    content = json.dumps(body).encode()
    response = client.post("/predict", content=content, headers={"Content-Type": "application/json"})
    errors = problem_of(response, 422, "invalid-request")["errors"]
    assert [error["pointer"] for error in errors] == [pointer]
    assert errors[0]["detail"]


@pytest.mark.parametrize("content", [b"", b"[]", b'"text"', b"null"])
def test_a_body_that_is_no_object_is_told_what_one_looks_like(client: httpx.Client, content: bytes) -> None:
    response = client.post("/predict", content=content, headers={"Content-Type": "application/json"})
    problem = problem_of(response, 422, "invalid-request")
    assert problem["detail"] == 'the body must be an object such as {"inputs": "a text"}'
    assert [error["pointer"] for error in problem["errors"]] == [""]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON: Expecting property name enclosed in double quotes: character 2"),
        (b'{"inputs": "a"', "is not JSON: Expecting ',' delimiter: character 15"),
        (b"inputs=a", "is not JSON: Expecting value: character 1"),
        (b'{"inputs": "\xff"}', "is not JSON in UTF-8: invalid start byte: byte 13"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"inputs": "a", "top_k": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"inputs": "a", "min_score": NaN}', "is not JSON: NaN is no number"),
        (b'{"inputs": "a", "top_k": 1, "top_k": 2}', 'has "top_k" twice in one object'),
        ('{"inputs": "a"}'.encode("utf-16"), "is not JSON in UTF-8"),
        (b'\xef\xbb\xbf{"inputs": "a"}', "is not JSON"),
        (b"\0", "is not JSON"),
    ],
    ids=[
        "cut early",
        "cut late",
        "form",
        "not utf-8",
        "too deep",
        "too many digits",
        "NaN",
        "name twice",
        "utf-16",
        "BOM",
        "nul",
    ],
)
def test_what_is_not_json_is_400_with_the_reason(client: httpx.Client, content: bytes, reason: str) -> None:
    response = client.post("/predict", content=content, headers={"Content-Type": "application/json"})
    assert reason in problem_of(response, 400, "bad-json")["detail"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_a_body_that_is_not_called_json_is_415(client: httpx.Client, kind: str) -> None:
    response = client.post("/predict", content=b'{"inputs": "a"}', headers={"Content-Type": kind} if kind else {})
    problem_of(response, 415, "unsupported-media-type")


def test_a_compressed_body_is_415(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = client.post("/predict", content=gzip.compress(b'{"inputs": "a"}'), headers=headers)
    assert "gzip" in problem_of(response, 415, "unsupported-media-type")["detail"]


def test_json_may_name_its_charset(client: httpx.Client) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.post("/predict", content=b'{"inputs": "a"}', headers=headers).status_code == 200


def test_too_large_a_body_is_413_whether_announced_or_not(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    content = json.dumps({"inputs": "a" * (1 << 20)}).encode()
    chunks = (content[i : i + 65_536] for i in range(0, len(content), 65_536))
    for body in (content, chunks):
        problem = problem_of(client.post("/predict", content=body, headers=headers), 413, "body-too-large")
        assert "1048576 bytes" in problem["detail"]


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    problem_of(client.get("/nothing/here"), 404, "not-found")
    problem_of(client.get("/livez/"), 404, "not-found")
    response = client.get("/predict")
    problem_of(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/", "/docs", "/livez", "/readyz", "/info", "/metrics", "/nothing"])
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"])
    assert head.content == b""


@pytest.mark.parametrize("path", ["/health", "/readyz"])
def test_ready(client: httpx.Client, path: str) -> None:
    assert client.get(path).json() == {"status": "ready"}


def test_alive(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "alive"}


def test_info_says_what_is_served_but_not_its_labels(client: httpx.Client, engine: Engine) -> None:
    info = client.get("/info").json()
    assert (info["model"], info["model_version"], info["labels"], info["width"]) == ("topics", engine.version, LABELS, 96)
    assert [(block["connectivity"], block["dtype"], block["groups"], block["fan_in"]) for block in info["blocks"]] == [
        ("dense", "fp32", 2, 96),
        ("shared", "bf16", 15, 24),
    ]
    assert info["limits"]["max_length"] == MAX_LENGTH
    assert info["metrics"] == {"test": {"P@1": 0.5}}
    assert "topic 1" not in str(info)


def test_labels_by_id_keep_the_order_asked_for(client: httpx.Client) -> None:
    for ids in ("t-7,t-499,t-0", ["t-7", "t-499", "t-0"], ["t-7", "t-499,t-0"]):
        answer = client.get("/labels", params={"ids": ids}).json()
        assert answer == {"labels": [{"id": f"t-{i}", "name": f"topic {i}"} for i in (7, 499, 0)]}


def test_labels_by_part_of_their_name(client: httpx.Client) -> None:
    answer = client.get("/labels", params={"query": "PIC 49", "limit": 3}).json()
    assert [label["id"] for label in answer["labels"]] == ["t-49", "t-490", "t-491"]
    assert client.get("/labels", params={"query": "nothing of the kind"}).json() == {"labels": []}


@pytest.mark.parametrize(
    ("parameters", "status", "kind"),
    [
        ({}, 422, "invalid-request"),
        ({"ids": "t-1", "query": "topic"}, 422, "invalid-request"),
        ({"query": ""}, 422, "invalid-request"),
        ({"query": "a", "limit": 0}, 422, "invalid-request"),
        ({"query": "a", "limit": "many"}, 422, "invalid-request"),
        ({"ids": "t-1,t-500"}, 404, "unknown-label"),
        ({"ids": ","}, 404, "unknown-label"),
    ],
)
def test_label_questions_that_have_no_answer(client: httpx.Client, parameters: dict[str, Any], status: int, kind: str) -> None:
    problem_of(client.get("/labels", params=parameters), status, kind)


def test_a_request_keeps_the_id_it_came_with(client: httpx.Client) -> None:
    response = client.post("/predict", json={"inputs": "a"}, headers={"X-Request-Id": "my-id.7"})
    assert response.headers["x-request-id"] == response.json()["id"] == "my-id.7"


@pytest.mark.parametrize("given", ["", "x" * 129, 'quo"te', "spa ce"])
def test_an_id_that_is_unfit_for_logs_is_replaced(client: httpx.Client, given: str) -> None:
    made = client.get("/livez", headers={"X-Request-Id": given}).headers["x-request-id"]
    assert len(made) == 25
    assert made != given


def test_server_timing_adds_up(client: httpx.Client) -> None:
    header = client.post("/predict", json={"inputs": TEXTS}).headers["server-timing"]
    times = {name: float(duration) for name, duration in (part.split(";dur=") for part in header.split(", "))}
    assert times.keys() == {"tokenize", "queue", "encode", "head", "total"}
    assert all(duration >= 0 for duration in times.values())
    assert 0 < sum(times.values()) - times["total"] <= times["total"]


def test_the_api_describes_itself(client: httpx.Client) -> None:
    api = client.get("/openapi.json").json()
    assert {"/predict", "/health", "/readyz", "/livez", "/info", "/labels", "/metrics"} <= set(api["paths"])
    assert {"/v2", "/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"} <= set(api["paths"])
    predict = api["paths"]["/predict"]["post"]["responses"]
    assert set(predict) == {"200", "400", "408", "413", "415", "422", "429", "500", "503", "504"}
    for operation in (operation for operations in api["paths"].values() for operation in operations.values()):
        for code, answer in operation["responses"].items():
            if code == "200":
                continue
            schema = answer["content"]["application/problem+json"]["schema"]["$ref"].removeprefix("#/components/schemas/")
            assert {"type", "title", "status", "detail"} <= set(api["components"]["schemas"][schema]["properties"])
    asked = api["components"]["schemas"]["PredictRequest"]["properties"]
    assert asked["top_k"]["maximum"] == 1000
    assert [form["maxItems"] for form in asked["inputs"]["oneOf"] if form["type"] == "array"] == [128]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_its_pages_name_no_other_server(client: httpx.Client, path: str) -> None:
    page = client.get(path)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    # of addresses there is only the namespace of an icon
    assert page.text.replace("http://www.w3.org/2000/svg", "").count("://") == 0


@pytest.mark.parametrize("file", ["swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"])
def test_the_description_brings_its_files(client: httpx.Client, file: str) -> None:
    assert file in client.get("/docs").text
    assert client.get(f"/docs/{file}").status_code == 200


@pytest.mark.parametrize("file", ["absent.js", "%2e%2e%2fcore.py", "..%2f__init__.py"])
def test_the_description_brings_no_other_files(client: httpx.Client, file: str) -> None:
    problem_of(client.get(f"/docs/{file}"), 404, "not-found")


def test_metrics_parse_and_count_what_happened(server: Process) -> None:
    with httpx.Client(base_url=server.url) as client:

        def read() -> dict[tuple[str, ...], float]:
            families = text_string_to_metric_families(client.get("/metrics").text)
            samples = [sample for family in families for sample in family.samples]
            return {(sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value for sample in samples}

        before = read()
        ask(client, inputs=[TEXTS[0], " ".join(TEXTS)])
        client.get("/no/such/path/3f7a")
        client.get("/docs")
        after = read()
        grown = {key: after[key] - before.get(key, 0) for key in after}

    assert grown[("fanin_requests_total", "code=200", "route=/predict")] == 1
    assert grown[("fanin_requests_total", "code=404", "route=unmatched")] == 1
    assert grown[("fanin_requests_total", "code=200", "route=/docs")] == 1
    assert grown[("fanin_request_duration_seconds_count", "route=/predict")] == 1
    assert grown[("fanin_inputs_total",)] == grown[("fanin_input_tokens_count",)] == 2
    assert grown[("fanin_truncated_inputs_total",)] == 1
    for stage in ("tokenize", "queue", "encoder", "head", "serialize"):
        assert grown[("fanin_stage_duration_seconds_count", f"stage={stage}")] >= 1
        assert grown[("fanin_stage_duration_seconds_sum", f"stage={stage}")] > 0
    assert grown[("fanin_batch_inputs_sum",)] == 2
    assert after[("fanin_requests_in_progress",)] == 1
    assert after[("fanin_queue_tokens",)] == 0
    assert (after[("fanin_ready",)], after[("fanin_draining",)]) == (1, 0)
    assert after[("fanin_model_load_duration_seconds",)] > 0
    for component in ("encoder", "head", "labels", *(["screen"] if cpu.level() in SCREENING else [])):
        assert after[("fanin_model_bytes", f"component={component}", "device=cpu")] > 1000
    assert 50e6 < after[("fanin_host_memory_bytes", "kind=pss")] <= after[("fanin_host_memory_bytes", "kind=rss")] < 4e9
    assert not any("3f7a" in part for key in after for part in key)
