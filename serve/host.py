"""Memory of this process and of its cgroup, as Linux reports them."""

from __future__ import annotations

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
