"""Peak memory on a GPU or on the CPU."""

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
    """The peak memory since this object was made, beyond the memory in use then.

    On a GPU this is torch's allocated memory, if torch counts it; on a CPU it is the resident
    memory of the process, which only Linux reports.

    Args:
        device: the device to watch.
        emptied: whether memory that torch keeps for later is given back first.
    """

    def __init__(self, device: torch.device, *, emptied: bool = True) -> None:
        self._device = device
        gc.collect()
        if type_of(device).is_host:
            self._before = _reset_resident()
        else:
            self._before = _reset_allocated(device, emptied)

    def nbytes(self) -> int | None:
        """Return the bytes; None if the system does not report them."""
        if self._before is None:
            return None
        known = type_of(self._device)
        if known.is_host:
            return max(0, _resident("VmHWM") - self._before)
        return int(known.module.max_memory_allocated(self._device)) - self._before


def _reset_allocated(device: torch.device, emptied: bool) -> int | None:
    """Reset the peak of torch's allocated memory on a GPU; return the present value."""
    counter = type_of(device).module
    if not hasattr(counter, "reset_peak_memory_stats"):
        return None
    if emptied:
        counter.empty_cache()
    counter.reset_peak_memory_stats(device)
    return int(counter.memory_allocated(device))


def _reset_resident() -> int | None:
    """Reset the peak of the resident memory; return the present value."""
    if sys.platform != "linux":
        return None
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # returns freed memory to the system
        _RESET.write_text("5")
    except (OSError, AttributeError):  # another libc, or a system that forbids it
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024
