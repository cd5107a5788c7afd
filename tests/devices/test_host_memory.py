"""Free memory of the host, as each system tells it; stand-ins play the systems."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from klora_runtime.devices import host_memory
from klora_runtime.devices.host_memory import free_host_memory

MEMINFO = """MemTotal:       65536000 kB
MemFree:         1000 kB
MemAvailable:    8000000 kB
HugePages_Total:       0
"""

VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            700000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                            500.
"Translation faults":                1234567890.
Pages copy-on-write:                   12345678.
File-backed pages:                       400000.
Swapins:                                      0.
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system without psutil that has no files yet."""
    monkeypatch.setattr(host_memory, "_ROOT", tmp_path)
    monkeypatch.setitem(sys.modules, "psutil", None)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


def on(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)


def test_linux(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "linux")
    write(root, {"proc/meminfo": MEMINFO})
    assert free_host_memory() == 8e6 * 1024


@pytest.mark.parametrize("text", ["", "MemAvailable: many kB\n", "no colon\n"])
def test_a_system_that_tells_nothing_is_taken_as_large(
    root: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "linux")
    write(root, {"proc/meminfo": text})
    assert free_host_memory() == math.inf


def test_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "darwin")
    asked: list[Any] = []

    def run(command: list[str], **how: Any) -> Any:
        asked.append((command, how["check"]))
        return SimpleNamespace(stdout=VM_STAT)

    monkeypatch.setattr(subprocess, "run", run)
    assert free_host_memory() == 16384 * (10000 + 20000 + 3000)
    assert asked == [(["/usr/bin/vm_stat"], True)]


@pytest.mark.parametrize(
    "failure", [FileNotFoundError(), subprocess.CalledProcessError(1, "vm_stat"), None]
)
def test_macos_without_vm_stat(failure: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "darwin")

    def run(*_: Any, **__: Any) -> Any:
        if failure is not None:
            raise failure
        return SimpleNamespace(stdout="Pages free: 1.\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert free_host_memory() == math.inf


@pytest.mark.parametrize("works", [True, False])
def test_windows(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "win32")

    def status_of(pointer: Any) -> int:
        status = pointer._obj
        assert status.length == 64  # Windows refuses another
        status.available_physical = 5 * 2**30
        return int(works)

    kernel = SimpleNamespace(GlobalMemoryStatusEx=status_of)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert free_host_memory() == (5 * 2**30 if works else math.inf)


@pytest.mark.parametrize("pages", [1000, -1])
def test_other_systems(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "freebsd14")
    told = {"SC_AVPHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", told.__getitem__)
    assert free_host_memory() == (4096 * 1000 if pages > 0 else math.inf)


def test_psutil_is_asked_where_it_is_installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, {"proc/meminfo": MEMINFO})
    psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=7 * 2**20))
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert free_host_memory() == 7 * 2**20


def test_psutil_that_fails_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "linux")
    write(root, {"proc/meminfo": MEMINFO})
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace())
    assert free_host_memory() == 8e6 * 1024


# --- containers -------------------------------------------------------------------------------

MB = 2**20


def cgroup(folder: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    """Files of one cgroup of version 2."""
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\ninactive_file {cached}\nactive_file 5\n",
    }


def test_no_more_than_the_cgroup_allows(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "linux")
    own = cgroup("sys/fs/cgroup/a/b", str(900 * MB), 500 * MB, cached=100 * MB)
    write(root, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", **own})
    assert free_host_memory() == 500 * MB  # what is cached can be had


def test_limits_of_the_cgroups_around_count(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "linux")
    files = cgroup("sys/fs/cgroup/a/b", "max", 500 * MB) | cgroup(
        "sys/fs/cgroup/a", str(700 * MB), 600 * MB
    )
    write(root, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", **files})
    assert free_host_memory() == 100 * MB


def test_a_container_sees_its_own_cgroup_as_the_top(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the path that the host has for it there is nothing."""
    on(monkeypatch, "linux")
    files = cgroup("sys/fs/cgroup", str(300 * MB), 400 * MB)
    write(root, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/docker/1f\n", **files})
    assert free_host_memory() == 0  # above its limit for a moment


def test_version_1(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "linux")
    folder = "sys/fs/cgroup/memory/job"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n1:name=systemd:/job\n",
        f"{folder}/memory.limit_in_bytes": f"{800 * MB}\n",
        f"{folder}/memory.usage_in_bytes": f"{300 * MB}\n",
        f"{folder}/memory.stat": f"cache 9\ntotal_inactive_file {50 * MB}\n",
    }
    write(root, files)
    assert free_host_memory() == 550 * MB


@pytest.mark.parametrize("text", ["nothing of this kind\n", "0::/a\n"])
def test_without_a_limit_the_system_decides(
    root: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "linux")
    write(root, {"proc/meminfo": MEMINFO, "proc/self/cgroup": text})
    assert free_host_memory() == 8e6 * 1024


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 2**20 < free_host_memory() < 2**50
