"""The types of device: one record for each known type, and one for any other.

The records import torch lazily, so that a command line can list their names without torch.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from klora_runtime.devices.host_memory import free_host_memory

if TYPE_CHECKING:
    import torch


class DeviceType:
    """A type of device that klora knows by name only; its defaults are safe for every device.

    Args:
        name: torch's name of the type, such as ``hpu``.
    """

    is_host = False
    """Whether this is the host itself."""
    single = False
    """Whether a machine never has more than one."""
    grouped = False
    """Whether mode merge writes layers of one shape in one batch. This pays where launching a
    product takes longer than computing it. It costs padding, so it is off unless known to pay."""
    streams = False
    """Whether pinned host memory and a second stream can send tensors while the device computes.
    Torch's module for the type then has ``Stream``, ``stream``, ``current_stream``, ``Event``."""
    graphs = False
    """Whether ``torch.compile(mode="reduce-overhead")`` records graphs and replays them."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def title(self) -> str:
        """The name of the type for use in a sentence."""
        return self.name.upper()

    @property
    def module(self) -> Any:
        """Torch's module for this type, such as ``torch.cuda``; None if torch has none."""
        import torch

        try:
            return torch.get_device_module(self.name)
        except RuntimeError:
            return None

    def count(self) -> int | None:
        """Return the number of devices that torch sees; None if torch does not say."""
        count = getattr(self.module, "device_count", None)
        return None if count is None else int(count())

    def has_float64(self, device: torch.device) -> bool:
        """Return whether a device computes in float64; a device of this type is tried."""
        return adds_in_float64(device)

    def free_memory(self, device: torch.device) -> float:
        """Return the free bytes of a device now.

        Return 0 if the device does not say, so that nothing optional is kept on it.
        """
        tell = getattr(self.module, "mem_get_info", None)
        try:
            return 0.0 if tell is None else float(tell(device)[0])
        except RuntimeError:  # some drivers do not say
            return 0.0

    def float32_switches(self) -> Sequence[Any]:
        """Return the objects whose ``fp32_precision`` sets the precision of float32 products."""
        return ()

    def synchronise(self, device: torch.device) -> None:
        """Wait until a device has finished its work."""
        synchronise = getattr(self.module, "synchronize", None)
        if synchronise is not None:
            synchronise(device)

    def describe(self, device: torch.device) -> str:
        """Return a description of one device for a table of measurements."""
        name = getattr(self.module, "get_device_name", None)
        return f"{self.title} {device.index or 0}" if name is None else str(name(device))


class Cpu(DeviceType):
    """The host itself."""

    is_host = single = True

    def count(self) -> int:
        return 1

    def has_float64(self, device: torch.device) -> bool:
        return True

    def free_memory(self, device: torch.device) -> float:
        return free_host_memory()

    def float32_switches(self) -> Sequence[Any]:
        import torch

        return [getattr(torch.backends.mkldnn, "matmul", None)]

    def synchronise(self, device: torch.device) -> None:
        """Do nothing: a CPU runs synchronously."""

    def describe(self, device: torch.device) -> str:
        import torch

        best = torch.backends.cpu.get_cpu_capability()
        return f"CPU, {platform.machine()}, {best}, {torch.get_num_threads()} threads"


class Cuda(DeviceType):
    """NVIDIA's GPUs, and AMD's, which torch also calls ``cuda``."""

    grouped = streams = graphs = True

    def has_float64(self, device: torch.device) -> bool:
        return True

    def float32_switches(self) -> Sequence[Any]:
        import torch

        return [torch.backends.cuda.matmul]


class Xpu(DeviceType):
    """Intel's GPUs; some have no float64."""

    streams = True

    def has_float64(self, device: torch.device) -> bool:
        return bool(self.module.get_device_capability(device).get("has_fp64", False))


class Mps(DeviceType):
    """Apple's GPUs: they have no float64 and share the host's memory."""

    single = True

    def has_float64(self, device: torch.device) -> bool:
        return False

    def free_memory(self, device: torch.device) -> float:
        metal = self.module
        own = metal.recommended_max_memory() - metal.driver_allocated_memory()
        return min(float(own), free_host_memory())

    def synchronise(self, device: torch.device) -> None:
        self.module.synchronize()


#: Name -> known type; ``auto`` prefers them in this order, and the host last.
TYPES: Mapping[str, DeviceType] = {
    known.name: known for known in (Cpu("cpu"), Cuda("cuda"), Xpu("xpu"), Mps("mps"))
}

#: The name that selects the best device.
AUTO = "auto"

#: The spellings of device names in help and errors; other types are spelled the same way.
SPELLINGS = (
    AUTO,
    *(known.name if known.single else f"{known.name}[:N]" for known in TYPES.values()),
)


#: What a device name may look like: torch knows the types, among them those of its plug-ins.
NAME = r"[a-z][a-z0-9_]*(:\d{1,3})?"


@cache
def adds_in_float64(device: torch.device) -> bool:
    """Return whether a device finds the last digit of a sum in float64. Torch is asked once.

    Some devices have the dtype and compute in float32, without an error.
    """
    import torch

    last = torch.finfo(torch.float64).eps
    try:
        one = torch.ones(1, dtype=torch.float64).to(device)
        return float((one + last - one).cpu()) == last
    except (RuntimeError, TypeError, ImportError, AssertionError):
        return False


def type_of(device: torch.device) -> DeviceType:
    """Return the record of a device's type."""
    return TYPES.get(device.type) or DeviceType(device.type)
