"""Memory of this process and of its cgroup, as Linux and the C library report it."""

from __future__ import annotations

import ctypes
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2⁶³


def memory_bytes() -> dict[str, int]:
    """rss (resident), pss (resident, shared pages by share), cgroup_used and cgroup_limit; what cannot be read is left out."""
    found = {}
    for line in _lines(Path("/proc/self/smaps_rollup")):
        key, _, rest = line.partition(":")
        if key in ("Rss", "Pss"):
            found[key.lower()] = int(rest.split()[0]) * 1024
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
