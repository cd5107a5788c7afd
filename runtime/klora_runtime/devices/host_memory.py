"""Free host memory: what the operating system reports, within the limit of the container."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path

_ROOT = Path("/")

#: The pages of macOS's ``vm_stat`` that can be had without writing to disk.
_FREE_PAGES = ("free", "inactive", "speculative")


def free_host_memory() -> float:
    """Return the bytes that the host can give without swapping; infinity if unknown.

    Ask psutil if it is installed, else the operating system: Linux, macOS, Windows, or any system
    that has ``SC_AVPHYS_PAGES``. On Linux the limits of the process's cgroups, which containers
    and cluster schedulers set, cap the result.
    """
    told = (_ask(source) for source in (_psutil, _system))
    of_system = next((room for room in told if room is not None), math.inf)
    in_container = _ask(lambda: min(_cgroup_rooms(_ROOT), default=math.inf))
    return of_system if in_container is None else min(of_system, in_container)


def _ask(source: Callable[[], float | None]) -> float | None:
    """Return the answer of a source; None if the source is missing or answers nonsense."""
    try:
        return source()
    except (ImportError, OSError, AttributeError, KeyError, ValueError, subprocess.SubprocessError):
        return None


def _psutil() -> float:
    return float(import_module("psutil").virtual_memory().available)


def _system() -> float:
    read = _SYSTEMS.get(sys.platform, _posix)
    return read()


def _linux() -> float:
    lines = (_ROOT / "proc/meminfo").read_text(encoding="ascii").splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    return 1024.0 * kilobytes["MemAvailable"]


def _macos() -> float:
    told = subprocess.run(
        ["/usr/bin/vm_stat"], capture_output=True, text=True, check=True, timeout=10
    ).stdout
    size = re.search(r"page size of (\d+) bytes", told)
    pages = dict(re.findall(r"^Pages (\w+):\s+(\d+)\.$", told, re.MULTILINE))
    if size is None:
        raise ValueError("vm_stat shows no page size")
    return float(size[1]) * sum(int(pages[kind]) for kind in _FREE_PAGES)


class _MemoryStatus(ctypes.Structure):
    """``MEMORYSTATUSEX`` of Windows."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total_physical", ctypes.c_uint64),
        ("available_physical", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    )


def _windows() -> float:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    windows = getattr(ctypes, "windll")  # noqa: B009  # there on Windows alone
    if not windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return float(status.available_physical)


def _posix() -> float:
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    if pages < 0 or size < 0:
        raise ValueError("the system does not say")
    return float(pages * size)


_SYSTEMS: Mapping[str, Callable[[], float]] = {
    "linux": _linux,
    "darwin": _macos,
    "win32": _windows,
}


def _cgroup_rooms(root: Path) -> Iterator[float]:
    """Yield the bytes left in each cgroup of this process, from the innermost to the outermost.

    Skip folders that do not exist: a container may see the host's path of its cgroup while only
    its own part is mounted.
    """
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if not controllers:
            top, read = root / "sys/fs/cgroup", _room_of_v2
        elif "memory" in names:
            top, read = root / "sys/fs/cgroup/memory", _room_of_v1
        else:
            continue
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            room = _ask(partial(read, top / folder))
            if room is not None:
                yield max(0.0, room)


def _room_of_v2(folder: Path) -> float:
    limit = (folder / "memory.max").read_text(encoding="ascii").strip()
    if limit == "max":
        return math.inf
    return int(limit) - _used(folder, "memory.current", "inactive_file")


def _room_of_v1(folder: Path) -> float:
    limit = int((folder / "memory.limit_in_bytes").read_text(encoding="ascii"))
    return limit - _used(folder, "memory.usage_in_bytes", "total_inactive_file")


def _used(folder: Path, usage: str, cached: str) -> int:
    """Return the bytes in use without the page cache, which can be dropped."""
    statistics = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    counts = dict(line.split(" ", 1) for line in statistics)
    return int((folder / usage).read_text(encoding="ascii")) - int(counts.get(cached, 0))
