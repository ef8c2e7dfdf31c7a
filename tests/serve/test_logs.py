"""The log, and CORS, of a server process that has both."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve import logs
from tests.serve.harness import TEXTS, Process, problem_of

ORIGIN = {"Origin": "https://example.org"}


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def request(**changes: Any) -> None:
    fields = {"id": "id-1", "method": "POST", "route": "/predict", "code": 200, "seconds": 0.0123, "client": "10.0.0.1"}
    logs.request(**(fields | {"inputs": 2, "tokens": 9} | changes))


def test_a_request_is_one_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("text", "info")
    request()
    line = capsys.readouterr().err
    expected = "INFO fanin.requests: POST /predict 200 in 12.300 ms, inputs 2, tokens 9, id id-1, client 10.0.0.1\n"
    assert line.endswith(expected)


def test_a_request_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("json", "info")
    request()
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time").endswith("+00:00")
    assert line.pop("message").startswith("POST /predict 200")
    assert line == {
        "level": "INFO",
        "logger": "fanin.requests",
        "method": "POST",
        "route": "/predict",
        "code": 200,
        "duration_ms": 12.3,
        "inputs": 2,
        "tokens": 9,
        "request_id": "id-1",
        "client": "10.0.0.1",
    }


def test_requests_are_not_logged_above_info(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("json", "warning")
    request()
    assert capsys.readouterr().err == ""


def test_failures_and_warnings_are_one_line_of_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("json", "warning")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("some.library").exception("it failed")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    failure, warning = map(json.loads, capsys.readouterr().err.splitlines())
    assert (failure["level"], failure["logger"], failure["message"]) == ("ERROR", "some.library", "it failed")
    assert failure["exception"].endswith("ValueError: two\nlines")
    assert (warning["logger"], warning["level"]) == ("py.warnings", "WARNING")
    assert "DeprecationWarning: old" in warning["message"]


def test_a_server_that_logs_json_and_answers_other_origins(bundle_path: Path) -> None:
    process = Process(bundle_path, "--log-format", "json", "--log-level", "info", "--cors-origin", ORIGIN["Origin"])
    with httpx.Client(base_url=process.url, timeout=30) as client:
        answer = client.post("/predict", json={"inputs": TEXTS[:2]}, headers={"X-Request-Id": "mine", **ORIGIN})
        assert answer.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        assert "Server-Timing" in answer.headers["access-control-expose-headers"]
        refused = client.post("/predict", json={"inputs": ""}, headers=ORIGIN)
        problem_of(refused, 422, "invalid-request")
        assert refused.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        asked = {**ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = client.options("/predict", headers=asked)
        assert preflight.status_code == 200
        assert "POST" in preflight.headers["access-control-allow-methods"]
        other = client.options("/predict", headers={**asked, "Origin": "https://example.com"})
        problem_of(other, 400, "cors-refused")
        assert "access-control-allow-origin" not in other.headers
        client.get("/some/private/path")
    status, log = process.end()
    assert status == 0
    lines = [json.loads(line) for line in log.splitlines()]
    requests = [line for line in lines if line["logger"] == "fanin.requests"]
    assert [(line["route"], line["code"]) for line in requests] == [
        ("/predict", 200), ("/predict", 422), ("unmatched", 200), ("unmatched", 400), ("unmatched", 404)
    ]  # fmt: skip
    assert (requests[0]["request_id"], requests[0]["inputs"], requests[0]["client"]) == ("mine", 2, "127.0.0.1")
    assert requests[0]["tokens"] == answer.json()["usage"]["tokens"]
    others = [line for line in lines if line["logger"] == "uvicorn.error"]
    assert others
    assert all(line.keys() == {"level", "logger", "message", "time"} for line in others)
    labels = {label["name"] for prediction in answer.json()["predictions"] for label in prediction["labels"]}
    assert not any(text in log for text in ("private", TEXTS[0], *labels))


def test_other_origins_are_not_answered_unless_they_are_named(client: httpx.Client) -> None:
    assert "access-control-allow-origin" not in client.get("/livez", headers=ORIGIN).headers
    asked = {**ORIGIN, "Access-Control-Request-Method": "POST"}
    problem_of(client.options("/predict", headers=asked), 405, "method-not-allowed")


@pytest.mark.parametrize("flags", [["--cors-origin", "example.org"], ["--log-level", "all"], ["--log-format", "xml"]])
def test_a_wrong_setting_is_an_error_that_names_the_flag(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from serve.settings import parse

    monkeypatch.setattr(sys, "argv", ["serve", "bundle", *flags])
    with pytest.raises(SystemExit, match="2"):
        parse()
    assert flags[0] in capsys.readouterr().err
