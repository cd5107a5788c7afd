"""How much memory something takes at most, on a GPU or on the CPU."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

from klora_runtime.devices.device_types import type_of

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Most memory in use since this was made, beyond what was in use then.

    On a GPU what torch has allocated, where it counts that; on a CPU the resident memory of the
    process, which Linux alone tells.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        self._before = _reset_resident() if type_of(device).is_host else _reset_allocated(device)

    def nbytes(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._before is None:
            return None
        known = type_of(self._device)
        if known.is_host:
            return max(0, _resident("VmHWM") - self._before)
        return int(known.module.max_memory_allocated(self._device)) - self._before


def _reset_allocated(device: torch.device) -> int | None:
    """Forget the peak of what torch has allocated on a GPU; what it has allocated now."""
    counter = type_of(device).module
    if not hasattr(counter, "reset_peak_memory_stats"):
        return None
    counter.empty_cache()
    counter.reset_peak_memory_stats(device)
    return int(counter.memory_allocated(device))


def _reset_resident() -> int | None:
    """Forget the peak of the resident memory; what is resident now."""
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what was freed
        _RESET.write_text("5")
    except (OSError, AttributeError):  # another libc, or a system that does not let us
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
