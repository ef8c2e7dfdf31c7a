"""What Linux and the C library report of a process and do for it: memory, also of its cgroup, and its threads' turns."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGE_BLOCK = 1 << 20
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2⁶³
_STEP_BACK = 5  # of 20 steps of niceness


def give_way() -> None:
    """Lowers the priority of this thread, and of threads and processes that it starts, beside the process's others (Linux)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, 0, min(19, os.getpriority(os.PRIO_PROCESS, 0) + _STEP_BACK))  # 0: this thread


def memory_bytes(processes: Iterable[int | str] = ("self",)) -> dict[str, int]:
    """rss (resident) and pss (resident, shared pages by share) of `processes` together, cgroup_used and cgroup_limit of this
    process's cgroup; what cannot be read is left out."""
    found: dict[str, int] = {}
    for process in processes:
        for line in _lines(Path(f"/proc/{process}/smaps_rollup")):
            key, _, rest = line.partition(":")
            if key in ("Rss", "Pss"):
                found[key.lower()] = found.get(key.lower(), 0) + int(rest.split()[0]) * 1024
    for folder, used, limit in _memory_cgroups():
        for kind, file in (("cgroup_used", used), ("cgroup_limit", limit)):
            for line in _lines(folder / file):
                if line.isdigit() and int(line) < _UNLIMITED:
                    found.setdefault(kind, int(line))
    return found


def heap_bytes() -> dict[str, int]:
    """Of the C library's heap: allocated is in use, reserved is what it holds of the system. Empty without glibc 2.33 or later.

    What is mapped from files is not part of it.
    """
    if not hasattr(_libc, "mallinfo2"):
        return {}
    heap = _libc.mallinfo2()
    return {"allocated": heap.uordblks + heap.hblkhd, "reserved": heap.arena + heap.hblkhd}


def cpu_wait_s() -> float:
    """Seconds that threads of this process were ready to run but had no CPU, be it for others or for the cgroup's quota.

    Threads that have ended do not count.
    """
    waited_ns = 0
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/schedstat", "rb", buffering=0) as file:  # it may have ended
            waited_ns += int(file.read().split()[1])
    return waited_ns / 1e9


def disk_waits() -> int:
    """How often a thread of this process has waited for a page from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def fix_heap_thresholds() -> None:
    """Makes the C library (glibc) give large blocks back as soon as they are freed.

    Left alone, it raises its thresholds with each large block that it frees, up to keeping 64 MiB in every thread's arena.
    """
    if hasattr(_libc, "mallopt"):
        for threshold in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            _libc.mallopt(threshold, _LARGE_BLOCK)


def trim_heap() -> None:
    """Gives free memory of the C library's heap back to the system, where it can (glibc)."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2, see mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    ]


_libc = ctypes.CDLL(None)  # a call lets go of the GIL
if hasattr(_libc, "mallinfo2"):
    _libc.mallinfo2.restype = _Mallinfo2


def _memory_cgroups() -> list[tuple[Path, str, str]]:
    """Folder, file of use and file of limit of this process's memory cgroup, which a container may see as the root."""
    folders = []
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            folders += [(_CGROUP / path[1:], "memory.current", "memory.max"), (_CGROUP, "memory.current", "memory.max")]
        elif "memory" in controllers.split(","):
            root = _CGROUP / "memory"
            files = "memory.usage_in_bytes", "memory.limit_in_bytes"
            folders += [(root / path[1:], *files), (root, *files)]
    return folders


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
