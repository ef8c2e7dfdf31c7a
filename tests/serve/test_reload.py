"""Another bundle takes over while the server runs: by the admin listener, by SIGHUP, under load; or it cannot be served."""

from __future__ import annotations

import asyncio
import gc
import shutil
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from export.bundle import open_bundle
from serve.engine import DeviceLost, Engine
from serve.service import NotReady, Reload, ReloadUnderWay
from tests.serve.harness import LABELS, TEXTS, Local, Process, Serving, TouchyEngine, make_bundle, problem_of
from tests.serve.test_behaviour import eventually, occupy, post, start_drain


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another name, with fewer labels and a narrower head."""
    return make_bundle(tmp_path_factory.mktemp("reload") / "other", name="other", labels=300, width=64)


def start_reload(local: Local, path: Path) -> Future[Reload]:
    return asyncio.run_coroutine_threadsafe(local.service.reload(path), local.loop)


def test_requests_end_with_the_model_that_they_began_with(
    serving: Serving, bundle_path: Path, other_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_version, new_version = open_bundle(bundle_path).hash, open_bundle(other_path).hash
    with serving() as local:
        monkeypatch.setattr(Engine, "open", lambda path, *_: TouchyEngine(path))
        first = occupy(local, pool)
        reload = start_reload(local, other_path)
        eventually(lambda: local.metric("model_info", model="other", version=new_version) == 1)
        assert post(local, inputs="a").json()["model_version"] == new_version
        assert post(local, inputs="a", top_k=LABELS).json()["model"] == "other"
        assert local.metric("model_info", model="topics", version=old_version) == 0
        assert not first.done()
        assert not reload.done()
        local.engine.gate.set()
        assert first.result().json()["model_version"] == old_version
        done = reload.result(20)
        assert (done.old_version, done.new_version) == (old_version, new_version)
        assert local.metric("reloads_total", result="ok") == 1
        sizes = open_bundle(other_path).manifest.component_nbytes
        assert local.metric("model_bytes", component="head", device="cpu") == sizes["head"]


def test_the_old_model_is_freed_without_the_garbage_collector(
    serving: Serving, other_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory has to be free when the reload ends, not when the collector comes round."""
    with serving() as local:
        monkeypatch.setattr(Engine, "open", lambda path, *_: TouchyEngine(path))
        assert start_reload(local, other_path).result(20)
        engine = weakref.ref(local.service.engine)
        assert post(local, inputs=TEXTS).status_code == 200
        gc.collect()
        gc.disable()
        try:
            assert start_reload(local, other_path).result(20)
            eventually(lambda: engine() is None)
        finally:
            gc.enable()


def test_one_reload_at_a_time(serving: Serving, bundle_path: Path, other_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    with serving() as local:
        monkeypatch.setattr(Engine, "open", lambda path, *_: (go_on.wait(20), TouchyEngine(path))[1])
        first = start_reload(local, other_path)
        with pytest.raises(ReloadUnderWay):
            start_reload(local, bundle_path).result(20)
        assert post(local, inputs="a").json()["model"] == "topics"
        go_on.set()
        first.result(20)
        assert post(local, inputs="a").json()["model"] == "other"
        assert start_reload(local, bundle_path).result(20)
        assert post(local, inputs="a").json()["model"] == "topics"


def test_a_reload_that_a_drain_overtakes_changes_nothing(
    serving: Serving, other_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    with serving() as local:
        monkeypatch.setattr(Engine, "open", lambda path, *_: (go_on.wait(20), TouchyEngine(path))[1])
        first = occupy(local, pool)
        reload = start_reload(local, other_path)
        drained = start_drain(local)
        eventually(lambda: local.metric("draining") == 1)
        with pytest.raises(NotReady, match="draining"):
            start_reload(local, other_path).result(20)
        go_on.set()
        with pytest.raises(NotReady, match="draining"):
            reload.result(20)
        local.engine.gate.set()
        assert first.result().json()["model"] == "topics"
        assert drained.wait(20)


def test_before_the_first_bundle_is_loaded_there_is_nothing_to_replace(serving: Serving, other_path: Path) -> None:
    with serving(load=False) as local, pytest.raises(NotReady, match="loading"):
        start_reload(local, other_path).result(20)


@pytest.mark.parametrize("error", [RuntimeError("too cold"), DeviceLost("cuda:0: too cold")])
def test_an_engine_that_fails_to_warm_up_changes_nothing(
    serving: Serving, other_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    class Cold(TouchyEngine):
        def warm_up(self, max_inputs: int, max_tokens: int) -> float:
            raise error

        def close(self) -> None:
            super().close()
            closed.set()

    closed = threading.Event()
    with serving() as local:
        monkeypatch.setattr(Engine, "open", lambda path, *_: Cold(path))
        with pytest.raises(RuntimeError, match="too cold"):
            start_reload(local, other_path).result(20)
        assert post(local, inputs="a").json()["model"] == "topics"
        assert local.metric("reloads_total", result="failed") == 1
        assert local.service.status == "ready"
        assert closed.is_set()


class Administered(Process):
    """A server with an admin listener."""

    def __init__(self, bundle: Path, *flags: str) -> None:
        super().__init__(bundle, "--admin-port", "0", *flags)
        assert self.popen.stdout is not None
        self.admin = httpx.Client(base_url=self.popen.stdout.readline().split()[-1], timeout=60)
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def end(self) -> tuple[int, str]:
        self.admin.close()
        self.client.close()
        return super().end()


@pytest.fixture(scope="module")
def administered(bundle_path: Path) -> Iterator[Administered]:
    process = Administered(bundle_path)
    yield process
    assert process.end() == (0, "")


def test_the_admin_listener_takes_another_bundle(administered: Administered, bundle_path: Path, other_path: Path) -> None:
    client = administered.client
    for path, name, labels, width in ((other_path, "other", 300, 64), (bundle_path, "topics", LABELS, 96)):
        before = client.get("/info").json()["model_version"]
        done = administered.admin.post("/reload", json={"bundle": str(path)})
        assert done.status_code == 200
        assert done.headers["x-request-id"]
        version = open_bundle(path).hash
        assert done.json() == {"old_version": before, "new_version": version, "seconds": done.json()["seconds"]}
        assert done.json()["seconds"] > 0
        info = client.get("/info").json()
        assert (info["model"], info["model_version"], info["labels"], info["width"]) == (name, version, labels, width)
        assert len(client.post("/predict", json={"inputs": "a", "top_k": 1000}).json()["predictions"][0]["labels"]) == labels
        again = administered.admin.post("/reload").json()  # what is served now
        assert (again["old_version"], again["new_version"]) == (version, version)


@pytest.mark.parametrize("fault", ["absent", "no-bundle", "corrupted", "incomplete", "file"])
def test_a_bundle_that_cannot_be_served_changes_nothing(
    administered: Administered, other_path: Path, tmp_path: Path, fault: str
) -> None:
    bad = tmp_path / fault
    if fault == "no-bundle":
        bad.mkdir()
    elif fault == "file":
        bad.write_text("a file")
    elif fault != "absent":
        shutil.copytree(other_path, bad)
        target = bad / "encoder.onnx"
        if fault == "corrupted":
            content = bytearray(target.read_bytes())
            content[len(content) // 2] ^= 1
            target.write_bytes(content)
        else:
            target.unlink()
    client = administered.client
    before = client.get("/info").json()
    problem = problem_of(administered.admin.post("/reload", json={"bundle": str(bad)}), 422, "bundle-refused")
    assert fault in problem["detail"]
    if fault in ("corrupted", "incomplete"):
        assert "encoder.onnx" in problem["detail"]
    assert client.get("/info").json() == before
    assert client.get("/readyz").status_code == 200
    assert client.post("/predict", json={"inputs": "a"}).json()["model_version"] == before["model_version"]


def test_the_admin_listener_takes_no_page_s_request_and_no_nonsense(administered: Administered) -> None:
    admin = administered.admin
    for route in ("/reload", "/drain"):
        problem_of(admin.post(route, headers={"Origin": "http://localhost"}), 403, "from-a-page")
        problem_of(admin.get(route), 405, "method-not-allowed")
    problem_of(admin.post("/reload", json={"path": "x"}), 422, "invalid-request")
    problem_of(admin.post("/predict", json={"inputs": "a"}), 404, "not-found")
    problem_of(administered.client.post("/reload"), 404, "not-found")
    assert administered.client.get("/readyz").status_code == 200


def test_sighup_reloads_and_follows_a_link(bundle_path: Path, other_path: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundle_path)
    process = Process(link)
    with httpx.Client(base_url=process.url, timeout=30) as client:
        assert client.get("/info").json()["model"] == "topics"
        link.unlink()
        process.popen.send_signal(signal.SIGHUP)
        eventually(lambda: 'reloads_total{result="failed"} 1' in client.get("/metrics").text)
        link.symlink_to(other_path)
        assert client.get("/info").json()["model"] == "topics"
        process.popen.send_signal(signal.SIGHUP)
        eventually(lambda: client.get("/info").json()["model"] == "other")
    status, errors = process.end()
    assert status == 0
    assert "nothing has changed" in errors
    assert errors.count("\n") == 1


def test_the_admin_listener_drains(bundle_path: Path) -> None:
    process = Administered(bundle_path)
    answer = process.admin.post("/drain")
    assert (answer.status_code, answer.json()) == (202, {"status": "draining"})
    assert process.popen.wait(30) == 0
    assert process.end() == (0, "")


def test_a_taken_admin_port_is_an_error(bundle_path: Path, administered: Administered) -> None:
    port = str(administered.admin.base_url.port)
    with pytest.raises(AssertionError, match=f"cannot listen on 127.0.0.1 port {port}"):
        Process(bundle_path, "--admin-port", port)


@pytest.mark.slow
def test_twenty_reloads_under_load_fail_no_request_and_give_the_memory_back(bundle_path: Path, other_path: Path) -> None:
    process = Administered(bundle_path)
    stop = threading.Event()

    def load() -> int:
        count = 0
        with httpx.Client(base_url=process.url, timeout=60) as client:
            while not stop.is_set():
                answer = client.post("/predict", json={"inputs": TEXTS, "top_k": 100})
                assert answer.status_code == 200, answer.text
                count += 1
        return count

    def resident() -> int:
        text = process.client.get("/metrics").text
        (line,) = (line for line in text.splitlines() if line.startswith('fanin_host_memory_bytes{kind="rss"}'))
        return int(float(line.split()[1]))

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(load) for _ in range(8)]
        try:
            for path in (other_path, bundle_path) * 2:  # the first ones bring memory that stays: threads' stacks, arenas
                assert process.admin.post("/reload", json={"bundle": str(path)}).status_code == 200
            before = resident()
            for path in (other_path, bundle_path) * 10:
                assert process.admin.post("/reload", json={"bundle": str(path)}).status_code == 200
            after = resident()
        finally:
            stop.set()
        assert all(client.result() > 20 for client in clients)
    assert process.end() == (0, "")
    assert after < before * 1.05
