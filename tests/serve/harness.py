"""Servers under test: one in a process of its own, one in this process with an engine that a test has in its hands."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from export.bundle import open_bundle, write_bundle
from export.encoder import export_encoder, export_tokenizer
from models.encoder import Encoder, EncoderConfig
from models.head import Block, Head
from serve.engine import CpuEngine
from serve.service import Service
from serve.tokens import SHORT_CHARS, TextTokenizer, Tokens

ROOT = Path(__file__).parents[2]
LABELS = 500
MAX_LENGTH = 32
TEXTS = [
    "sort an array along an axis",
    "return the inverse of a square matrix",
    "open a file and read its lines",
    "compute the singular value decomposition of a matrix",
    "send a request over a socket and wait for the answer",
    "parse a date in ISO format",
]


def problem_of(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The body of an error answer, checked for what every one of them must have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["type"] == f"urn:fanin:problem:{kind}"
    assert problem["title"]
    assert problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


def make_bundle(path: Path, name: str, labels: int, width: int) -> Path:
    """A bundle with two blocks (dense and shared); label i has the id "t-i" and is called "topic i"."""
    config = EncoderConfig("mean", MAX_LENGTH, intermediate=width)
    encoder = Encoder.small(TEXTS * 5, config, vocabulary=200, width=32, layers=1, heads=2, seed=1)
    rng = np.random.default_rng(2)
    every = rng.permutation(labels).astype(np.int32)
    blocks = (
        Block.random(every[:20], width=width, connectivity="dense", fan_in=width, group_size=16, rng=rng),
        Block.random(every[20:], width=width, connectivity="shared", fan_in=24, group_size=32, dtype="bf16", rng=rng),
    )
    write_bundle(
        path,
        name=name,
        head=Head(width, labels, blocks),
        labels=((f"t-{i}", f"topic {i}") for i in range(labels)),
        tokenizer=export_tokenizer(encoder),
        max_length=MAX_LENGTH,
        write_encoder=lambda file: export_encoder(encoder, file),
        metrics={"test": {"P@1": 0.5}},
    )
    return path


class Process:
    """A `python -m serve` that is ready. `fault` is code that runs in it before the engine encodes a batch."""

    def __init__(self, bundle: Path, *flags: str, fault: str = "") -> None:
        program = ["-c", _FAULTY.format(fault)] if fault else ["-m", "serve"]
        command = [sys.executable, *program, str(bundle), "--port", "0", "--threads", "1", *flags]
        self.popen = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.popen.stdout is not None
        self.greeting = self.popen.stdout.readline()  # when ready, or empty when it has ended
        assert self.greeting, self.popen.communicate()[1]
        self.url = self.greeting.split()[-1].rstrip("/")

    def end(self) -> tuple[int, str]:
        """Exit status and standard error, after SIGTERM unless it has ended already."""
        self.popen.terminate()
        _, errors = self.popen.communicate(timeout=30)
        return self.popen.returncode, errors


_FAULTY = """
import ctypes, sys, time
from pathlib import Path
from serve.__main__ import main
from serve.engine import CpuEngine

encode = CpuEngine.encode

def faulty(self, sequences):
    {}
    return encode(self, sequences)

CpuEngine.encode = faulty
sys.exit(main())
"""


class PatientTokenizer(TextTokenizer):
    """A tokenizer that takes a long text only when a gate is open."""

    gate: threading.Event

    def __call__(self, texts: Iterable[str]) -> list[Tokens]:
        texts = list(texts)
        if max(map(len, texts), default=0) > SHORT_CHARS:
            assert self.gate.wait(30)
        return super().__call__(texts)


class TouchyEngine(CpuEngine):
    """An engine that waits at a gate, as its tokenizers do at theirs, and that some token counts make fail."""

    def __init__(self, path: Path) -> None:
        self.gate, self.entered, self.long_texts = threading.Event(), threading.Event(), threading.Event()
        self.gate.set()
        self.long_texts.set()
        super().__init__(open_bundle(path, verify=False), threads=1)
        self.poison: dict[int, BaseException] = {}
        self.batches: list[int] = []

    def new_tokenizer(self) -> PatientTokenizer:
        tokenizer = PatientTokenizer(self.bundle.tokenizer_file, self.max_length)
        tokenizer.gate = self.long_texts
        return tokenizer

    def encode(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        self.batches.append(len(sequences))
        self.entered.set()
        assert self.gate.wait(30)
        for sequence in sequences:
            if len(sequence) in self.poison:
                raise self.poison[len(sequence)]
        return super().encode(sequences)


class Local:
    """A server in this process, on a real socket, with an engine that a test has in its hands."""

    def __init__(self, service: Service, engine: TouchyEngine, url: str, loop: asyncio.AbstractEventLoop) -> None:
        self.service, self.engine, self.url, self.loop = service, engine, url, loop

    def call(self, function: Callable[[], object]) -> None:
        """Runs a function in the server's event loop."""
        self.loop.call_soon_threadsafe(function)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"fanin_{name}", labels) or 0.0


Serving = Callable[..., AbstractContextManager[Local]]
