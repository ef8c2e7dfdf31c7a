"""API keys: where they come from, what they open, and that they are written nowhere."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from serve.http.gateway import Gateway
from serve.http.keys import ApiKeys, KeyCheck, KeysError
from serve.metrics import Metrics
from serve.service import Service
from serve.settings import Settings
from tests.serve.harness import Process, problem_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# who may ask\nfirst-key  # the batch job\n\nsecond-key\n")
    file.chmod(0o600)
    return file


def test_keys_come_from_a_file_and_from_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FANIN_API_KEYS", "third,fourth fifth")
    keys = ApiKeys(file)
    assert all(keys.match(key) for key in (b"first-key", b"second-key", b"third", b"fourth", b"fifth"))
    assert not any(keys.match(key) for key in (b"", b"first", b"first-key ", b"# who may ask", b"third,fourth", b"\xff"))


def test_without_keys_none_is_asked_for() -> None:
    assert not ApiKeys()
    assert not ApiKeys().match(b"")


@pytest.mark.parametrize(("content", "reason"), [(b"# nothing\n", "no API key"), (b"a key\n", "line 1"), (b"k\xff", "UTF-8")])
def test_a_file_without_usable_keys_is_an_error_that_quotes_none(file: Path, content: bytes, reason: str) -> None:
    file.write_bytes(content)
    with pytest.raises(KeysError, match=reason) as caught:
        ApiKeys(file)
    assert str(caught.value).startswith(str(file))
    assert "a key" not in str(caught.value)


def test_a_file_that_others_may_read_is_pointed_out(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    ApiKeys(file)
    assert caplog.messages == []
    file.chmod(0o644)
    ApiKeys(file)
    assert str(file) in caplog.text
    assert "first-key" not in caplog.text


def test_a_reload_that_fails_keeps_the_keys(file: Path) -> None:
    keys = ApiKeys(file)
    file.write_text("another-key")
    keys.reload()
    assert [keys.match(key) for key in (b"first-key", b"another-key")] == [False, True]
    file.unlink()
    with pytest.raises(KeysError, match="No such file"):
        keys.reload()
    assert keys.match(b"another-key")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer first-key"}, 200),
        ({"Authorization": "bearer  second-key"}, 200),
        ({"X-API-Key": "first-key"}, 200),
        ({}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer first-keyy"}, 401),
        ({"Authorization": "Basic first-key"}, 401),
        ({"X-API-Key": "FIRST-KEY"}, 401),
        ({"Authorization": "Bearer caf\u00e9"}, 401),
    ],
)
def test_who_is_let_in(file: Path, headers: dict[str, str], status: int) -> None:
    app = KeyCheck(PlainTextResponse("in"), ApiKeys(file), lambda path: path == "/open")
    client = TestClient(Gateway(app, Service(Settings(Path()), Metrics())))
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    response = client.get("/closed", headers=encoded)
    assert response.status_code == status
    if status == 401:
        problem_of(response, 401, "unauthorized")
        assert response.headers["www-authenticate"].startswith("Bearer")
    assert client.get("/open", headers=encoded).text == "in"


def test_a_server_with_keys(bundle_path: Path, file: Path) -> None:
    process = Process(bundle_path, "--api-keys-file", str(file), "--log-level", "info")
    opened = ["/", "/health", "/livez", "/readyz", "/metrics", "/docs", "/docs/swagger-ui.css", "/openapi.json"]
    opened += ["/v2/health/live", "/v2/health/ready"]
    closed = ["/info", "/labels?query=a", "/v2", "/v2/models/topics", "/v2/models/topics/ready", "/nothing", "/docs"[:-1]]
    key = {"Authorization": "Bearer first-key"}
    with httpx.Client(base_url=process.url, timeout=30) as client:
        assert {client.get(path).status_code for path in opened} == {200}
        for path in closed:
            problem_of(client.get(path), 401, "unauthorized")
            assert client.get(path, headers=key).status_code in (200, 404)
        huge = client.post("/predict", content=b"x" * 2_000_000)  # refused before its body is looked at
        problem_of(huge, 401, "unauthorized")
        assert client.post("/predict", json={"inputs": "a"}, headers=key).status_code == 200
        api = client.get("/openapi.json").json()
        assert set(api["components"]["securitySchemes"]) == {"bearer", "key"}
        for path, operations in api["paths"].items():
            for operation in operations.values():
                assert ("401" in operation["responses"]) == ("security" in operation) == (path not in opened)
    status, log = process.end()
    assert status == 0
    assert "first-key" not in log


def test_keys_that_cannot_be_had_end_the_server(bundle_path: Path, tmp_path: Path) -> None:
    from tests.serve.test_process import serve

    result = serve(str(bundle_path), "--port", "0", "--api-keys-file", str(tmp_path / "absent"))
    assert result.returncode == 2
    assert result.stderr == f"python -m serve: error: {tmp_path / 'absent'}: No such file or directory\n"


@pytest.fixture(autouse=True)
def _without_keys(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("FANIN_API_KEYS", raising=False)
    caplog.set_level(logging.WARNING)
