"""How the compiled kernels live in a process: instruction sets, threads, the GIL, forks, a missing build, large blocks."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest

import models
from models import kernels
from models.head import Block
from models.kernels import Moments, Optimizer, Positives, cpu
from tests.kernels.cases import Shape, each_level, head_of, random_block, random_input
from tests.kernels.test_train_step import run

SHAPE = Shape(20, 64, 2000, 12, 16)  # 125 groups: work for several threads
TREE = Path(models.__file__).parents[1]


def python(code: str, *flags: str, folder: Path = TREE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, started in `folder`."""
    command = [sys.executable, *flags, "-c", code]
    settings = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=120, check=False)


def test_the_best_instruction_set_is_the_default() -> None:
    assert cpu.LEVELS[-1] == "scalar"
    assert len(cpu.LEVELS) > 1, "every supported machine has vectors"
    found = python("from models.kernels import cpu; print(cpu.level())", FANIN_CPU_LEVEL="")
    assert found.stdout.strip() == cpu.LEVELS[0], found.stderr


@pytest.mark.parametrize("name", cpu.LEVELS)
def test_the_environment_forces_an_instruction_set(name: str) -> None:
    found = python("from models.kernels import cpu; print(cpu.level(), cpu.threads())", FANIN_CPU_LEVEL=name, FANIN_THREADS="5")
    assert found.stdout.split() == [name, "5"], found.stderr


def test_an_instruction_set_that_cannot_run_is_refused_at_import() -> None:
    found = python("import models.kernels.cpu", FANIN_CPU_LEVEL="avx1024")
    assert found.returncode != 0
    assert f"ValueError: instruction set 'avx1024' cannot run here; this machine has {', '.join(cpu.LEVELS)}" in found.stderr


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        (None, "", "are missing in {kernels}: "),
        ("_cpu.py", "", "are of another version than the code: "),  # as those of before there was a number
        ("_cpu.py", f"interface = {cpu.INTERFACE + 1}", "are of another version than the code: "),
        ("_cpu" + EXTENSION_SUFFIXES[0], "not ELF", "cannot be loaded ({kernels}"),
    ],
)
def test_without_kernels_that_fit_the_first_use_fails_and_says_how_to_build_them(
    tmp_path: Path, file: str | None, content: str, fault: str
) -> None:
    shutil.copytree(TREE / "models", tmp_path / "models", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    kernels = tmp_path / "models" / "kernels"
    if file:
        (kernels / file).write_text(content)
    operation = (
        "import numpy as np; from models import kernels; from models.head import Block\n"
        "zeros = np.zeros((1, 1, 16), np.float32)\n"
        "kernels.scores(zeros[0, :, :1], Block('dense', 1, 'fp32', zeros, zeros[0], zeros[0].astype(np.int32)))"
    )
    for code in ("import models.kernels.cpu", operation):  # nothing runs on the slow reference by accident
        # -S: without the hook of an editable installation
        found = python(code, "-S", folder=tmp_path, PYTHONPATH=str(Path(np.__file__).parents[1]))
        message = found.stderr.splitlines()[-1]
        assert message.startswith("ImportError: the compiled kernels " + fault.format(kernels=kernels))
        assert "run `make set-up`, or `pip install -e .`, in the project's folder" in message


def test_the_number_of_the_interface_goes_up_with_every_change() -> None:
    """When this fails: raise `interface` in bindings.cpp and INTERFACE in cpu.py, then write down here what there is now."""
    functions = [cpu._cpu.Block.__init__, *(each for each in vars(cpu._cpu).values() if hasattr(each, "__nb_signature__"))]
    arguments = {each.__name__: len(re.findall(r"\w+: ", each.__nb_signature__[0][0])) for each in functions}
    assert (cpu.INTERFACE, arguments) == (
        8,
        {"__init__": 8, "screen": 4, "sketch": 5, "sketched": 1, "topk": 7, "scores": 3, "train_step": 21}
        | {"grad_input": 3, "grad_values": 4}
        | {"levels": 0, "level": 0, "use_level": 1, "default_threads": 0, "threads": 0, "set_threads": 1},
    )


def test_default_threads_follow_the_affinity_mask() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= cpu.default_threads() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cpu.default_threads() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_no_torch_is_imported() -> None:
    code = "import models.kernels, sys; print('torch' in sys.modules)"
    assert python(code).stdout.strip() == "False"


def test_other_python_threads_run_during_a_call() -> None:
    """A call lets go of the GIL: while one thread is in topk, this one wakes up again and again."""
    shape = Shape(100, 128, 4000, 32, 32)
    head, x = head_of(random_block(shape, "private", "fp32")), random_input(shape)
    cpu.set_threads(1)

    def span() -> tuple[float, float]:
        begin = time.perf_counter()
        kernels.topk(x, head, 10)
        return begin, time.perf_counter()

    while np.diff(span()) < 0.2:
        x = np.concatenate([x, x])
    awake = []
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(span)
        while not call.done():
            time.sleep(0.001)
            awake.append(time.perf_counter())
    begin, end = call.result()
    assert sum(begin < moment < end for moment in awake) >= 10


@each_level
def test_two_python_threads_may_call_at_once(level: str) -> None:
    block, x = random_block(SHAPE, "shared", "bf16"), random_input(SHAPE)
    head = head_of(block)
    cpu.set_threads(2)

    def work(_: int) -> list[np.ndarray]:
        step = run(kernels.train_step, block, x, "bce", Optimizer("adam"))
        return [*kernels.topk(x, head, 20), kernels.scores(x, block), step["values"], step["∂loss/∂x"]]

    expected = work(0)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(work, range(40)):
            for ours, theirs in zip(result, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_a_screen_is_made_in_parts_between_which_others_have_their_turn() -> None:
    """So that requests are answered while a reload prepares the next model."""
    large = random_block(Shape(1, 16, 1_000_000, 16, 32), "private", "bf16")  # eight parts
    small, x = head_of(random_block(SHAPE, "shared", "bf16")), random_input(SHAPE)
    cpu.set_threads(2)

    def span(call: Callable[[], object]) -> tuple[float, float]:
        begin = time.perf_counter()
        call()
        return begin, time.perf_counter()

    answers = []
    with ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(span, lambda: cpu.screen(large))
        while not preparing.done():
            answers.append(span(lambda: kernels.topk(x, small, 10)))
    begin, end = preparing.result()
    during = [begin < asked and answered < end for asked, answered in answers]
    assert sum(during) >= 3  # at most one, had it to wait for all of it


def test_a_forked_child_may_call_too() -> None:
    """The child has none of the parent's worker threads; it must make its own, not wait for them."""
    head, x = head_of(random_block(SHAPE, "shared", "bf16")), random_input(SHAPE)
    cpu.set_threads(2)
    expected = kernels.topk(x, head, 20)
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=lambda: sender.send(kernels.topk(x, head, 20)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads, which is the subject
        child.start()
    sender.close()
    try:
        assert receiver.poll(60), "the child waits for ever"
        for ours, theirs in zip(receiver.recv(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
    for ours, theirs in zip(kernels.topk(x, head, 20), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def repeating_array(shape: tuple[int, ...], high: int, rng: np.random.Generator) -> np.ndarray:
    """A writable uint16 array of random numbers below `high` that may be far larger than memory.

    Its pages show one piece of a file again and again, but for the last piece, which is its own.
    """
    piece, count = 64 << 20, int(np.prod(shape))
    pieces = -(-2 * count // piece)
    file = os.memfd_create("repeated")
    os.ftruncate(file, pieces * piece)
    memory = mmap.mmap(file, pieces * piece)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    fixed = mmap.MAP_SHARED | 0x10  # MAP_FIXED, which Python does not name
    for i in range(1, pieces - 1):
        at = libc.mmap(start + i * piece, piece, mmap.PROT_READ | mmap.PROT_WRITE, fixed, file, 0)
        assert at == start + i * piece, os.strerror(ctypes.get_errno())
    os.close(file)
    array = np.frombuffer(memory, dtype=np.uint16, count=count)
    for part in (array[: piece // 2], array[(pieces - 1) * piece // 2 :]):
        part[...] = rng.integers(0, high, part.size, dtype=np.uint16)
    return array.reshape(shape)


def huge_block(connectivity: str) -> Block:
    """A block of 2³¹ weights and some more, 131 KiB a group."""
    N, K, G = (1 << 31) // (4096 * 16) + 5, 4096, 16
    rng = np.random.default_rng(0)
    values = repeating_array((N, K, G), 0x3C00, rng)  # bf16 from 0 to 0.0078
    indices = repeating_array((N, K, G), K, rng) if connectivity == "private" else None
    labels = np.arange(N * G, dtype=np.int32).reshape(N, G)
    return Block(connectivity, K, "bf16", values, np.zeros((N, G), np.float32), labels, indices)


def last_group(block: Block) -> Block:
    """A copy of the last group as a block of its own."""
    buffers = {name: array[-1:].copy() for name, array in block.buffers.items()}
    return Block(block.connectivity, block.width, block.dtype, **buffers)


@pytest.mark.slow
@pytest.mark.parametrize("connectivity", ["dense", "private"])
def test_scores_beyond_two_to_the_31_weights(connectivity: str) -> None:
    block = huge_block(connectivity)
    assert block.values.size > 1 << 31
    x = random_input(Shape(1, block.width, 0, 0, 0))
    block.bias[-1] = 1000
    last = last_group(block)
    expected = kernels.scores(x, last)[:, 0]
    np.testing.assert_array_equal(kernels.scores(x, block)[:, -1], expected)
    scores, labels = kernels.topk(x, head_of(block), 16)
    order = np.argsort(-expected[0], kind="stable")
    np.testing.assert_array_equal(scores, expected[:, order])
    np.testing.assert_array_equal(labels[0], last.label_ids[0, order])


@pytest.mark.slow
def test_training_beyond_two_to_the_31_weights() -> None:
    """bf16 and SGD, as moments of this size need real memory. The last group is trained as if it were alone."""
    block = huge_block("dense")
    x, last = random_input(Shape(1, block.width, 0, 0, 0)), last_group(block)
    key, first = 99, block.groups - 1
    grad = np.zeros((1, *block.bias.shape), dtype=np.float32)
    grad[0, -1] = np.arange(16)
    np.testing.assert_array_equal(kernels.grad_input(grad, block), kernels.grad_input(grad[:, -1:], last))
    settings = {"loss": "bce", "optimizer": Optimizer("sgd", lr=0.5), "step": 1}
    row = np.zeros(1, np.int32)
    kernels.train_step(x, Positives(np.array([3]), row), last, Moments((), ()), key=key + first, **settings)
    before = block.values[-1].copy()
    kernels.train_step(x, Positives(np.array([first * 16 + 3]), row), block, Moments((), ()), key=key, **settings)
    np.testing.assert_array_equal(block.values[-1], last.values[0])
    np.testing.assert_array_equal(block.bias[-1], last.bias[0])
    assert (block.values[-1] != before).mean() > 0.5
