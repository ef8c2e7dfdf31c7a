"""What the process says about itself: memory, and what holds its threads up."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serve import host
from tests.serve.harness import ROOT


def test_memory_is_what_linux_says() -> None:
    size = 64 << 20
    before = host.memory_bytes()
    with mmap.mmap(-1, size) as block:  # np.ones could take memory that is resident already
        block.write(b"1" * size)
        after = host.memory_bytes()
    assert after["rss"] - before["rss"] > 0.9 * size
    assert 0 < after["pss"] <= after["rss"]


def test_the_heap_knows_what_it_gave_and_what_it_holds() -> None:
    before = host.heap_bytes()
    block = np.ones(64 << 20, dtype=np.uint8)
    after = host.heap_bytes()
    assert after["allocated"] - before["allocated"] >= block.nbytes
    assert after["reserved"] >= after["allocated"]
    del block
    host.trim_heap()
    assert host.heap_bytes()["allocated"] < after["allocated"]


def test_large_blocks_go_back_to_the_system_when_they_are_freed() -> None:
    code = """
import numpy as np
from serve import host
host.fix_heap_thresholds()
blocks = [np.ones(4 << 20, dtype=np.uint8) for _ in range(16)]
del blocks[0]  # now malloc would keep blocks of this size
blocks += [np.ones(4 << 20, dtype=np.uint8) for _ in range(16)]
full = host.heap_bytes()["reserved"]
del blocks[:-1]
print(full - host.heap_bytes()["reserved"] > 29 * (4 << 20))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("True\n", "")


def test_threads_that_share_a_cpu_wait_for_it() -> None:
    code = """
import os, subprocess, sys, time
from serve import host
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    end = time.monotonic() + 20
    while host.cpu_wait_s() < 0.2 and time.monotonic() < end:
        pass
    print(host.cpu_wait_s() >= 0.2)
finally:
    rival.kill()
    rival.wait()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("True\n", "")


@pytest.mark.parametrize(
    ("line", "folder", "used", "limit"),
    [
        ("0::/app", "app", "memory.current", "memory.max"),
        ("0::/app", "", "memory.current", "memory.max"),  # a container sees its own cgroup as the root
        ("4:cpu,memory:/app", "memory/app", "memory.usage_in_bytes", "memory.limit_in_bytes"),
    ],
    ids=["v2", "v2-root", "v1"],
)
@pytest.mark.parametrize(("set_limit", "found"), [("3000", 3000), ("max", None), (str((1 << 63) - 4096), None)])
def test_memory_of_the_cgroup_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    folder: str,
    used: str,
    limit: str,
    set_limit: str,
    found: int | None,
) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / used).write_text("2000\n")
    (tmp_path / folder / limit).write_text(f"{set_limit}\n")
    lines = host._lines
    monkeypatch.setattr(host, "_CGROUP", tmp_path)
    monkeypatch.setattr(host, "_lines", lambda file: [line] if file == Path("/proc/self/cgroup") else lines(file))
    memory = host.memory_bytes()
    assert (memory["cgroup_used"], memory.get("cgroup_limit")) == (2000, found)
