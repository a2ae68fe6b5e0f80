"""How much memory there is to use."""

import os
from collections.abc import Iterator
from pathlib import Path


def machine_bytes(root: Path = Path("/")) -> int:
    """Tell how much memory this process may use: the machine's, or less where a cgroup (v1 or v2) says so."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_limits(root)])


def _cgroup_limits(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        own = Path(path.lstrip("/"))
        # In a container the path may be the host's, of which only the end is mounted: the root's file is asked too.
        for group in (own, *own.parents):
            limit = _read(root / "sys/fs/cgroup" / top / group / name).strip()
            if limit.isdecimal():
                yield int(limit)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no Linux, another version of cgroups, or no limit there
        return ""
