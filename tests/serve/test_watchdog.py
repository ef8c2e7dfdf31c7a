"""An engine or an event loop that dies or hangs: what clients and probes see, and that the process ends for its supervisor."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serve.watchdog import Watchdog
from tests.serve.harness import TEXTS, Local, Process, Serving, problem_of
from tests.serve.test_behaviour import eventually, occupy, post


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@contextmanager
def watched(local: Local, loop_timeout_s: float = 60) -> Iterator[threading.Event]:
    """The server with a watchdog that sets an event where it would end the process."""
    ended = threading.Event()
    watchdog = Watchdog(local.service, local.loop, end=ended.set, loop_timeout_s=loop_timeout_s)
    watchdog.start()
    try:
        yield ended
    finally:
        watchdog.stop()


def test_a_stuck_engine_answers_503_to_all_and_ends_the_process(
    serving: Serving, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(hang_timeout_s=0.5) as local, watched(local) as ended:
        stuck = occupy(local, pool)
        waiting = [pool.submit(post, local, inputs=text) for text in TEXTS]
        for response in (stuck.result(), *(answer.result() for answer in waiting)):
            problem_of(response, 503, "engine-stopped")
            assert response.headers["retry-after"]
        problem_of(httpx.get(f"{local.url}/livez"), 503, "engine-stopped")
        problem_of(httpx.get(f"{local.url}/readyz"), 503, "engine-stopped")
        problem_of(post(local, inputs="a"), 503, "engine-stopped")
        assert local.metric("ready") == 0
        assert ended.wait(20)
    assert "the engine has made no progress for 0.5 s" in caplog.text
    assert "in encode\n" in caplog.text  # where it is stuck


def test_a_stopped_watchdog_asks_the_event_loop_nothing_more(serving: Serving) -> None:
    """The loop is closed next; asking it then would put a traceback behind the server's last words."""
    with serving() as local:
        with watched(local):
            assert "watchdog" in [thread.name for thread in threading.enumerate()]
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_an_engine_that_dies_ends_the_process(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with serving() as local, watched(local) as ended:
        local.engine.poison = {length: SystemExit() for length in range(33)}
        problem_of(post(local, inputs="a"), 503, "engine-stopped")
        assert ended.wait(20)
    assert "the engine died" in caplog.text


def test_a_slow_engine_is_left_alone(serving: Serving, pool: ThreadPoolExecutor) -> None:
    """Each batch takes less than the time given, all together far more."""
    with serving(hang_timeout_s=1, max_batch_inputs=1) as local, watched(local) as ended:
        encode = local.engine.encode
        local.engine.encode = lambda sequences: (time.sleep(0.3), encode(sequences))[1]  # type: ignore[method-assign]
        assert post(local, inputs=TEXTS).status_code == 200
        assert not ended.is_set()
        assert local.service.alive


def test_a_stuck_event_loop_ends_the_process(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with serving() as local, watched(local, loop_timeout_s=0.5) as ended:
        go_on = threading.Event()
        local.call(lambda: go_on.wait(20))
        assert ended.wait(15)
        go_on.set()
    assert "the event loop has been stuck for 0.5 s" in caplog.text


def test_a_server_that_was_closed_has_not_failed(serving: Serving) -> None:
    with serving() as local, watched(local) as ended:
        eventually(lambda: local.service.alive)
    assert not ended.is_set()


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("time.sleep(1000)", 3, ["the engine has made no progress for ", "in faulty\n"]),
        ("raise SystemExit", 3, ["the engine died"]),
        ("ctypes.string_at(0)", -signal.SIGSEGV, ["Fatal Python error: Segmentation fault"]),
    ],
    ids=["hangs", "dies", "crashes"],
)
def test_a_process_whose_engine_fails_under_load_ends_and_starts_again(
    bundle_path: Path, tmp_path: Path, fault: str, status: int, said: list[str]
) -> None:
    trigger = tmp_path / "now"
    process = Process(bundle_path, fault=f"if Path({str(trigger)!r}).exists(): {fault}")
    answers: list[httpx.Response] = []

    def load() -> None:
        with httpx.Client(base_url=process.url, timeout=30) as client:
            while True:
                try:
                    answers.append(client.post("/predict", json={"inputs": TEXTS}))
                except httpx.TransportError:
                    assert status < 0, "no answer"
                    return
                if answers[-1].status_code != 200:
                    return

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(load) for _ in range(8)]
        eventually(lambda: len(answers) > 16)
        trigger.touch()
        began = time.monotonic()
        with httpx.Client(base_url=process.url, timeout=30) as probe:
            while True:
                try:
                    if probe.get("/livez").status_code == 503:
                        break
                except httpx.TransportError:
                    assert status < 0, "no answer"
                    break
                time.sleep(0.02)
        assert time.monotonic() - began < 20
        for client in clients:
            client.result()
    _, errors = process.popen.communicate(timeout=30)
    assert process.popen.returncode == status
    assert all(text in errors for text in said), errors
    if status > 0:
        failed = [answer for answer in answers if answer.status_code != 200]
        assert len(failed) == 8  # each client's last
        for answer in failed:
            problem_of(answer, 503, "engine-stopped")
            assert answer.headers["retry-after"]
    trigger.unlink()
    again = Process(bundle_path)
    assert again.end() == (0, "")


@pytest.mark.slow
def test_a_process_that_was_stopped_for_a_while_goes_on(bundle_path: Path) -> None:
    process = Process(bundle_path, "--hang-timeout", "1", fault="time.sleep(0.5)")
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=process.url, timeout=30) as client:
        answer = pool.submit(client.post, "/predict", json={"inputs": TEXTS})
        time.sleep(0.2)
        process.popen.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.popen.send_signal(signal.SIGCONT)
        assert answer.result().status_code == 200
    assert process.end() == (0, "")
