"""The device ``other``: torch's type for plug-ins, built in C++, for one process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_SOURCE = Path(__file__).with_suffix(".cpp")
_TORCH = Path(torch.__file__).parent


def compiler() -> str | None:
    """The C++ compiler of this machine; None if there is none, or no header of torch."""
    has_headers = (_TORCH / "include" / "ATen" / "native" / "CPUFallback.h").is_file()
    return shutil.which(os.environ.get("CXX", "g++")) if has_headers else None


def build(command: str, library: Path) -> None:
    """Compile the device."""
    include, needed = _TORCH / "include", ("c10", "torch_cpu")
    options = "-std=c++20 -O0 -fPIC -shared -w".split()
    options += [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    options += [f"-L{_TORCH / 'lib'}", *(f"-l{name}" for name in needed)]
    options.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    subprocess.run([command, str(_SOURCE), "-o", str(library), *options], check=True, timeout=240)


class Other(ModuleType):
    """Torch's module for the device, ``torch.other``, with no more than torch itself asks for."""

    def __init__(self, library: Any) -> None:
        super().__init__("torch.other")
        self._library = library

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Draw nothing: random numbers are the CPU's."""

    def computed(self) -> int:
        """How many operations the device has computed."""
        return int(self._library.klora_test_computed())


def install(library: Path) -> Other:
    """Let this process have the device, for good."""
    loaded = ctypes.CDLL(str(library))
    loaded.klora_test_computed.restype = ctypes.c_long
    loaded.klora_test_other_device()
    torch.utils.rename_privateuse1_backend("other")
    torch.utils.generate_methods_for_privateuse1_backend()
    other = Other(loaded)
    torch._register_device_module("other", other)
    return other
