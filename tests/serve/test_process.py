"""`python -m serve` as a process: start, end, exit status, and what it keeps out of memory."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.serve.harness import ROOT, TEXTS, Process


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serve", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_serving_process_imports_no_torch(bundle_path: Path) -> None:
    code = f"""
import sys
import serve.server, serve.predict
from pathlib import Path
from serve.engine import Engine
engine = Engine.open(Path({str(bundle_path)!r}), threads=1)
engine.topk(engine.encode([engine.new_tokenizer()(["a text"])[0].ids]), 3)
print(sorted(name for name in ("torch", "transformers", "onnx", "train") if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_onnx_runtime_leaves_nothing_in_the_home_folder(bundle_path: Path, tmp_path: Path) -> None:
    """Its telemetry would keep a device id there, and a list of what to send."""
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    for words in (["serve.predict", str(bundle_path), *files], ["export.parity"]):
        command = [sys.executable, "-m", *words]
        subprocess.run(command, cwd=ROOT, env=environment | {"HOME": str(home)}, check=True, timeout=300, capture_output=True)
    assert list(home.rglob("*onnxruntime*")) == []


def test_it_says_what_it_serves_and_where(server: Process) -> None:
    assert server.greeting.startswith("topics: 500 labels at http://127.0.0.1:")
    assert int(server.url.rsplit(":", 1)[1]) > 0


def test_sigterm_under_load_loses_no_accepted_request(bundle_path: Path) -> None:
    """What was sent before the signal is answered; what is sent later may find the server draining, or gone."""
    process = Process(bundle_path)
    ready: list[int] = []
    answers: list[tuple[float, httpx.Response | None]] = []  # by when the request began

    def load() -> None:
        with httpx.Client(base_url=process.url, timeout=30) as client:
            while not answers or answers[-1][1] is not None:
                began, answer = time.monotonic(), None
                with suppress(httpx.TransportError):
                    answer = client.post("/predict", json={"inputs": TEXTS * 4})
                answers.append((began, answer))

    def watch() -> None:
        with httpx.Client(base_url=process.url, timeout=30) as client, suppress(httpx.TransportError):
            while True:
                ready.append(client.get("/readyz").status_code)

    threads = [threading.Thread(target=load) for _ in range(32)] + [threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    while len(answers) < 64:
        time.sleep(0.01)
    told_at = time.monotonic()
    assert process.end() == (0, "")
    for thread in threads:
        thread.join(30)
    before = [answer for began, answer in answers if began < told_at]
    after = [answer for began, answer in answers if began >= told_at and answer is not None]
    assert all(answer is not None and answer.status_code in {200, 429} for answer in before)  # 429: not accepted
    assert len(before) > 64
    assert {answer.status_code for answer in after} <= {200, 429, 503}
    for answer in [*before, *after]:
        assert answer is not None
        assert answer.status_code != 200 or len(answer.json()["predictions"]) == len(TEXTS) * 4
    assert 200 in ready


def test_ctrl_c_ends_it_cleanly(bundle_path: Path) -> None:
    process = Process(bundle_path)
    process.popen.send_signal(signal.SIGINT)
    _, errors = process.popen.communicate(timeout=30)
    assert (process.popen.returncode, errors) == (0, "")


@pytest.mark.parametrize("file", ["encoder.onnx", "tokenizer.json", "head/1.values.npy", "labels/names.bin", "manifest.json"])
def test_a_damaged_bundle_is_refused_by_file(bundle_path: Path, tmp_path: Path, file: str) -> None:
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle_path, damaged)
    content = bytearray((damaged / file).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / file).write_bytes(content)
    result = serve(str(damaged), "--port", "0")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("python -m serve: error: ")
    assert file in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    result = serve(str(tmp_path / "absent"), "--port", "0")
    assert result.returncode == 2
    assert "absent" in result.stderr


def test_a_taken_port_is_an_error(bundle_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = serve(str(bundle_path), "--port", str(port))
    assert result.returncode == 2
    assert f"127.0.0.1 port {port}" in result.stderr


@pytest.mark.parametrize("flags", [["--port", "70000"], ["--threads", "0"], ["--max-inputs", "some"], ["--unknown", "1"]])
def test_a_wrong_setting_is_an_error_that_names_the_flag(bundle_path: Path, flags: list[str]) -> None:
    result = serve(str(bundle_path), *flags)
    assert result.returncode == 2
    assert flags[0] in result.stderr


def test_help_lists_every_setting_with_its_default() -> None:
    text = serve("--help").stdout
    for word in ("BUNDLE", "--port", "--max-queue-tokens", "--max-batch-tokens", "--drain-timeout", "(default: 8000)", "curl"):
        assert word in text


def test_limits_from_the_command_line_hold(bundle_path: Path) -> None:
    process = Process(bundle_path, "--max-inputs", "2", "--max-top-k", "5", "--max-body-bytes", "200")
    with httpx.Client(base_url=process.url, timeout=30) as client:
        assert client.get("/info").json()["limits"]["max_top_k"] == 5
        assert client.post("/predict", json={"inputs": ["a", "b"], "top_k": 5}).status_code == 200
        assert client.post("/predict", json={"inputs": ["a", "b", "c"], "top_k": 5}).status_code == 422
        assert client.post("/predict", json={"inputs": "a", "top_k": 6}).status_code == 422
        assert client.post("/predict", json={"inputs": "a" * 200}).status_code == 413
    assert process.end() == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priorities of their own")
def test_what_computes_gives_way_to_the_event_loop(bundle_path: Path) -> None:
    process = Process(bundle_path)
    loop = process.popen.pid
    nice = {int(tid): os.getpriority(os.PRIO_PROCESS, int(tid)) for tid in os.listdir(f"/proc/{loop}/task")}
    base = nice.pop(loop)
    assert base == os.getpriority(os.PRIO_PROCESS, 0)
    assert list(nice.values()).count(min(19, base + 5)) >= 2  # the one that opened the engine, and the engine's
    assert process.end() == (0, "")
