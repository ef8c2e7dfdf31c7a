"""Engines in processes of their own, one per device, each replaced when it is lost.

A process opens the bundle itself; the files are mapped, so all processes share their pages. It is spawned, never forked, gets
token ids and gives arrays back over a pipe per stage, and ends when the server's process does, however that ends.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np

from export.bundle import Bundle, BundleError, open_bundle
from models.kernels import Subset, cpu
from serve.engine import EncoderRuntime, Engine
from serve.worker import EngineLost, out_of_memory

_log = logging.getLogger("fanin.serve")
_spawn = multiprocessing.get_context("spawn")
_START_TIMEOUT_S = 600.0  # a bundle on a slow disk; what never starts should not be waited for without end
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # between a loss and the next start; doubled while losses follow each other
_HEALTHY_S = 60.0  # a process that lived this long was not lost because of how it started

_Stage = Literal["encoder", "head"]


def open_engines(
    path: Path,
    devices: Sequence[str],
    threads: int | None,
    on_restart: Callable[[int], object],
    encoder_runtime: EncoderRuntime = "onnx",
) -> list[Engine]:
    """The verified bundle in `path`, loaded once per device: one in this process, several in a process each.

    threads      of the CPU per engine; None shares those out that this process may use
    on_restart   called with an engine's number when its process has been replaced, from a thread of its own
    BundleError, also when a process ends while it loads, and DeviceError.
    """
    if len(devices) == 1:
        return [Engine.open(path, threads, devices[0], encoder_runtime)]
    bundle = open_bundle(path)
    threads = threads or max(1, cpu.default_threads() // len(devices))
    engines = [
        EngineProcess(bundle, threads, device, encoder_runtime, partial(on_restart, i)) for i, device in enumerate(devices)
    ]
    try:
        with ThreadPoolExecutor(len(engines)) as pool:
            list(pool.map(EngineProcess.start, engines))
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return list(engines)


class EngineProcess(Engine):
    """Stands for an engine in another process. Every call raises EngineLost when that is gone or takes too long."""

    def __init__(
        self, bundle: Bundle, threads: int, device: str, encoder_runtime: EncoderRuntime, on_restart: Callable[[], object]
    ) -> None:
        super().__init__(bundle, threads)
        self.device, self.overlaps = device, device != "cpu"
        self._encoder_runtime, self._on_restart = encoder_runtime, on_restart
        self._warm_up: tuple[int, int] | None = None
        self._added_bytes: dict[str, int] = {}
        self._device_memory: dict[str, int] = {}
        self._child: _Child | None = None
        self._lost_at: float | None = None
        self._closed = False
        self._changed = threading.Condition()

    def start(self) -> None:
        """Starts the process and waits until it has loaded the bundle."""
        try:
            child = self._start()
        except EngineLost:
            raise BundleError(f"{self.bundle.path}: the process that loaded it on {self.device} was lost") from None
        self._set(child)
        threading.Thread(target=self._replace, args=[child], name=f"process of {self.device}", daemon=True).start()

    def encode(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        x: np.ndarray = self._call("encoder", "encode", sequences)
        return x

    def topk(self, x: np.ndarray, k: int, allowed: Sequence[Subset | None] | None = None) -> tuple[np.ndarray, np.ndarray]:
        best, self._device_memory = self._call("head", "topk", x, k, allowed)
        scores, labels = best
        return scores, labels

    def warm_up(self, max_inputs: int, max_tokens: int) -> float:
        self._warm_up = max_inputs, max_tokens  # a process that takes this one's place does the same
        assert self._child is not None
        return float(self._child.call("head", "warm_up", self._warm_up, _START_TIMEOUT_S))

    def wait_until_up(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._child is not None or self._closed)
            return not self._closed

    @property
    def down_s(self) -> float:
        lost_at = self._lost_at
        return 0.0 if lost_at is None else time.monotonic() - lost_at

    def added_bytes(self) -> dict[str, int]:
        return self._added_bytes

    @property
    def pid(self) -> int:
        child = self._child
        return super().pid if child is None else child.pid

    def device_memory(self) -> dict[str, int]:
        return self._device_memory

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            child = self._child
        if child is not None:
            child.end()

    def _call(self, stage: _Stage, name: str, *arguments: Any) -> Any:
        child = self._child
        if child is None:
            raise EngineLost(begun=False)
        try:
            return child.call(stage, name, arguments, self.hang_timeout_s)
        except EngineLost:
            self._lose(child)  # at once: the next batch must wait for the next process, not be lost at this one as well
            raise

    def _start(self) -> _Child:
        child = _Child(self.bundle, self.threads, self.device, self._encoder_runtime)
        try:
            self._added_bytes = child.answer("head", _START_TIMEOUT_S)
            if self._warm_up is not None:
                child.call("head", "warm_up", self._warm_up, _START_TIMEOUT_S)
        except BaseException:
            child.end()
            raise
        return child

    def _set(self, child: _Child | None) -> None:
        with self._changed:
            self._child = child
            self._lost_at = None if child is not None else time.monotonic()
            self._changed.notify_all()

    def _lose(self, child: _Child) -> None:
        with self._changed:
            if self._child is child:
                self._set(None)

    def _replace(self, child: _Child) -> None:
        """Waits for the process to end and starts another, until closed."""
        pause_s = 0.0
        while True:
            began = time.monotonic()
            child.process.join()
            child.end()
            if self._closed:
                return
            self._lose(child)
            _log.error("the engine's process on %s ended with status %s; it is replaced", self.device, child.process.exitcode)
            if time.monotonic() - began > _HEALTHY_S:
                pause_s = 0.0
            while True:
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, pause_s):
                        return
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s or _FIRST_PAUSE_S)
                try:
                    child = self._start()
                except Exception:
                    _log.exception("the engine's process on %s could not be replaced; the next try follows", self.device)
                else:
                    break
            self._set(child)
            self._on_restart()  # whoever sees it counted may rely on the new process
            if self._closed:  # meanwhile
                child.end()


class _Child:
    """One process and the pipes to it."""

    def __init__(self, bundle: Bundle, threads: int, device: str, encoder_runtime: EncoderRuntime) -> None:
        ours, theirs = zip(_spawn.Pipe(), _spawn.Pipe(), strict=True)
        self._pipes: dict[_Stage, Connection] = {"encoder": ours[0], "head": ours[1]}
        arguments = (bundle.path, bundle.hash, threads, device, encoder_runtime, *theirs)
        self.process = _spawn.Process(target=_run, args=arguments, name=f"engine {device}", daemon=True)
        self.process.start()
        atexit.register(self.process.kill)  # multiprocessing would ask it to end and wait, but it does not listen
        for pipe in theirs:
            pipe.close()  # or the end of the process would not be the end of the pipe

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def call(self, stage: _Stage, name: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """What the engine's method gives or raises; EngineLost. For one thread per stage."""
        try:
            self._pipes[stage].send((name, arguments))
        except OSError:
            raise EngineLost(begun=False) from None
        return self.answer(stage, timeout_s)

    def answer(self, stage: _Stage, timeout_s: float) -> Any:
        pipe = self._pipes[stage]
        try:
            if not pipe.poll(None if timeout_s == float("inf") else timeout_s):
                _log.error("the engine's process %d is stuck for %.1f s; it is killed", self.pid, timeout_s)
                self.process.kill()
                raise EngineLost(begun=True)
            ok, answer = pipe.recv()
        except (EOFError, OSError):
            raise EngineLost(begun=True) from None
        if not ok:
            raise answer
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        atexit.unregister(self.process.kill)


def _run(
    path: Path, version: str, threads: int, device: str, encoder_runtime: EncoderRuntime, encoder: Connection, head: Connection
) -> None:
    """The process: loads the bundle, says so, and answers calls until the server's process is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they may be meant for the whole group: the server decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        bundle = open_bundle(path, verify=False)  # the server's process has verified it
        if bundle.hash != version:
            raise BundleError(f"{path}: holds another bundle than before")
        engine = Engine.load(bundle, threads, device, encoder_runtime)
    except Exception as error:
        head.send((False, _portable(error)))
        return
    head.send((True, engine.added_bytes()))
    threading.Thread(target=_answer, args=[encoder, engine], daemon=True).start()
    _answer(head, engine)


def _answer(pipe: Connection, engine: Engine) -> None:
    try:
        while True:
            name, arguments = pipe.recv()
            try:
                answer = getattr(engine, name)(*arguments)
                if name == "topk":
                    answer = answer, engine.device_memory()
                pipe.send((True, answer))
            except Exception as error:
                pipe.send((False, _portable(error)))
    except (EOFError, OSError):  # the server's end of the pipe is gone
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # also while the other stage's thread computes


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error as the server's process can read it, which may lack the packages that this one came from."""
    if isinstance(error, BundleError) or type(error).__name__ == "DeviceError":
        return error
    text = "".join(traceback.format_exception(error))
    return MemoryError(text) if out_of_memory(error) else RuntimeError(f"in the engine's process:\n{text}")
