"""How much memory something takes at most, on a GPU or on the CPU."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Most memory in use since this was made, beyond what was in use then.

    On a GPU what torch has allocated; on a CPU the resident memory of the process, which Linux
    alone tells.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _reset_resident()

    def nbytes(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _resident("VmHWM") - self._before)


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
