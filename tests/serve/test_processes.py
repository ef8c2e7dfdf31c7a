"""Engines in processes of their own: the same answers, and what happens when a process or its parent is killed or stuck."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from export.bundle import BundleError, open_bundle
from models.kernels import Subset
from serve.engine import CpuEngine, Engine
from serve.processes import EngineProcess, open_engines
from serve.worker import EngineLost
from tests.serve.harness import TEXTS, Process


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def workers_of(pid: int) -> list[int]:
    """The engines' processes of a server."""
    children: list[str] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):  # it ended just now
            children += (thread / "children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in _command_line(child)]


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pss(*pids: int) -> int:
    """Bytes of memory that these processes hold, what they share counted once."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return 1024 * sum(int(rollup.partition("\nPss:")[2].split()[0]) for rollup in rollups)


def value(metrics: str, name: str) -> float:
    (line,) = (line for line in metrics.splitlines() if line.startswith(f"{name} "))
    return float(line.rpartition(" ")[2])


def call_until_it_fails(engine: Engine) -> None:
    """A process that gets a signal may answer once more before it is delivered."""
    while True:
        engine.encode([[1, 2, 3]])


@pytest.fixture(scope="module")
def restarts() -> list[int]:
    return []


@pytest.fixture(scope="module")
def remote(bundle_path: Path, restarts: list[int]) -> Iterator[EngineProcess]:
    engine = EngineProcess(open_bundle(bundle_path), 1, "cpu", "onnx", lambda: restarts.append(1))
    engine.start()
    assert engine.warm_up(max_inputs=2, max_tokens=64) > 0
    yield engine
    (pid,) = workers_of(os.getpid())
    engine.close()
    assert not runs(pid)
    assert not engine.wait_until_up()


def test_it_answers_as_an_engine_in_this_process_does(engine: Engine, remote: EngineProcess) -> None:
    texts = [tokens.ids for tokens in engine.new_tokenizer()(TEXTS)]
    there, here = remote.encode(texts), engine.encode(texts)
    np.testing.assert_array_equal(there, here)
    some = Subset.of(engine.bundle.head.places(), None, np.arange(0, 500, 2))
    for allowed in (None, [None, some, some, None, None]):
        for got, expected in zip(remote.topk(there[1:], 5, allowed), engine.topk(here[1:], 5, allowed), strict=True):
            np.testing.assert_array_equal(got, expected)
    assert remote.added_bytes() == engine.added_bytes() != {}
    assert (remote.version, remote.padded(9), remote.max_length) == (engine.version, engine.padded(9), engine.max_length)


def test_what_fails_there_is_raised_here_with_its_traceback(remote: EngineProcess) -> None:
    with pytest.raises(RuntimeError, match=r"in the engine's process:\n(.|\n)*in topk"):
        remote.topk(np.full((1, 96), np.nan, dtype=np.float32), 1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stuck"])
def test_a_lost_process_is_replaced(remote: EngineProcess, restarts: list[int], how: signal.Signals) -> None:
    assert remote.wait_until_up()
    restarts.clear()
    (pid,) = workers_of(os.getpid())
    os.kill(pid, how)
    remote.hang_timeout_s = 0.5
    with pytest.raises(EngineLost):
        call_until_it_fails(remote)
    remote.hang_timeout_s = 60
    eventually(lambda: remote.down_s > 0 or restarts)
    assert remote.wait_until_up()
    assert remote.down_s == 0
    assert len(restarts) == 1
    assert workers_of(os.getpid()) != [pid]
    assert remote.encode([[1, 2, 3]]).shape == (1, 96)


def test_signals_for_the_whole_group_are_left_to_the_server(remote: EngineProcess) -> None:
    (pid,) = workers_of(os.getpid())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(pid, number)
    assert remote.encode([[1, 2, 3]]).shape == (1, 96)
    assert workers_of(os.getpid()) == [pid]


def test_a_bundle_that_is_damaged_or_replaced_is_refused_and_no_process_stays(bundle_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "bundle"
    shutil.copytree(bundle_path, other)
    opened = open_bundle(other)
    before = workers_of(os.getpid())
    earlier = replace(opened, manifest=replace(opened.manifest, name="of yesterday"))
    with pytest.raises(BundleError, match="another bundle"):
        EngineProcess(earlier, 1, "cpu", "onnx", lambda: None).start()
    (other / "encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        open_engines(other, ["cpu", "cpu"], 1, lambda _: None)
    assert workers_of(os.getpid()) == before


@pytest.mark.slow
def test_killing_workers_under_load_loses_no_request_and_killing_the_server_ends_them(bundle_path: Path) -> None:
    process = Process(bundle_path, "--device", "cpu,cpu", "--max-batch-inputs", "4", "--hang-timeout", "30")
    statuses: list[int] = []
    over = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=process.url, timeout=60) as client:
            while not over.is_set():
                statuses.append(client.post("/predict", json={"inputs": TEXTS, "timeout_ms": 30_000}).status_code)

    def restarted() -> int:
        text = httpx.get(f"{process.url}/metrics").text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("fanin_worker_restarts_total{"))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for kills in (1, 2):
        answered = len(statuses)
        eventually(lambda answered=answered: len(statuses) > answered + 20)
        first, second = workers_of(process.popen.pid)
        os.kill(first, signal.SIGKILL)
        assert httpx.get(f"{process.url}/readyz").status_code == 200  # the other one still works
        eventually(lambda kills=kills: restarted() == kills)
        assert len(workers_of(process.popen.pid)) == 2
        assert second in workers_of(process.popen.pid)
    over.set()
    for thread in threads:
        thread.join(60)
    assert set(statuses) == {200}

    workers = workers_of(process.popen.pid)
    process.popen.kill()
    process.popen.communicate(timeout=30)
    eventually(lambda: not any(map(runs, workers)))


@pytest.mark.slow
def test_a_server_with_several_workers_reloads_and_ends_cleanly(bundle_path: Path) -> None:
    process = Process(bundle_path, "--device", "cpu,cpu")
    workers = workers_of(process.popen.pid)
    assert len(workers) == 2
    metrics = httpx.get(f"{process.url}/metrics").text
    assert value(metrics, 'fanin_host_memory_bytes{kind="pss"}') == pytest.approx(pss(process.popen.pid, *workers), rel=0.1)
    screen = CpuEngine(open_bundle(bundle_path), 1).added_bytes()["screen"]
    assert value(metrics, 'fanin_model_bytes{component="screen",device="cpu"}') == 2 * screen
    process.popen.send_signal(signal.SIGHUP)
    eventually(lambda: 'fanin_reloads_total{result="ok"} 1.0' in httpx.get(f"{process.url}/metrics").text)
    eventually(lambda: not any(map(runs, workers)))  # the new ones answer before the old ones end
    workers = workers_of(process.popen.pid)
    assert len(workers) == 2
    assert httpx.post(f"{process.url}/predict", json={"inputs": TEXTS}, timeout=60).status_code == 200
    assert process.end() == (0, "")
    assert not any(map(runs, workers))
