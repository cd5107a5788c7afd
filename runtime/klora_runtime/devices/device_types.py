"""What klora asks of a type of device: one record for each type, and one for any other.

The records import torch when they are asked, so that a command line can list their names without.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from klora_runtime.devices.host_memory import free_host_memory

if TYPE_CHECKING:
    import torch


class DeviceType:
    """A type of device of which only the name is known; its answers are right for any.

    Args:
        name: as torch has it, such as ``hpu``.
    """

    is_host = False
    """Whether it is the host itself."""
    single = False
    """Whether there is never more than one."""
    grouped = False
    """Whether mode merge writes layers of one shape together there: where starting a product takes
    longer than a product. It costs padding, so it is on only where it is known to pay."""
    streams = False
    """Whether pinned host memory and a second stream carry tensors there while it computes; its
    module of torch then has ``Stream``, ``stream``, ``current_stream`` and ``Event``."""
    graphs = False
    """Whether ``torch.compile(mode="reduce-overhead")`` records its work and replays it."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def title(self) -> str:
        """The type in a sentence."""
        return self.name.upper()

    @property
    def module(self) -> Any:
        """Torch's module of this type, such as ``torch.cuda``; None where torch has none."""
        import torch

        try:
            return torch.get_device_module(self.name)
        except RuntimeError:
            return None

    def count(self) -> int | None:
        """How many torch sees; None where it does not tell."""
        count = getattr(self.module, "device_count", None)
        return None if count is None else int(count())

    def has_float64(self, device: torch.device) -> bool:
        """Whether a device computes in float64. What is not known to is spared it."""
        return False

    def free_memory(self, device: torch.device) -> float:
        """Bytes that a device can give now; 0 where it does not tell, so that nothing stays there
        that may be elsewhere."""
        tell = getattr(self.module, "mem_get_info", None)
        try:
            return 0.0 if tell is None else float(tell(device)[0])
        except RuntimeError:  # some drivers do not tell
            return 0.0

    def float32_switches(self) -> Sequence[Any]:
        """Objects whose ``fp32_precision`` says in what float32 matrices are multiplied there."""
        return ()

    def synchronise(self, device: torch.device) -> None:
        """Wait until a device has done its work."""
        synchronise = getattr(self.module, "synchronize", None)
        if synchronise is not None:
            synchronise(device)

    def describe(self, device: torch.device) -> str:
        """One device in words, for a table of measurements."""
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
        """A CPU is never behind."""

    def describe(self, device: torch.device) -> str:
        import torch

        best = torch.backends.cpu.get_cpu_capability()
        return f"CPU, {platform.machine()}, {best}, {torch.get_num_threads()} threads"


class Cuda(DeviceType):
    """NVIDIA's GPUs, and AMD's, which torch names so too."""

    grouped = streams = graphs = True

    def has_float64(self, device: torch.device) -> bool:
        return True

    def float32_switches(self) -> Sequence[Any]:
        import torch

        return [torch.backends.cuda.matmul]


class Xpu(DeviceType):
    """Intel's GPUs, of which some have no float64."""

    streams = True

    def has_float64(self, device: torch.device) -> bool:
        return bool(self.module.get_device_capability(device).get("has_fp64", False))


class Mps(DeviceType):
    """Apple's GPUs: no float64, and the host's memory."""

    single = True

    def free_memory(self, device: torch.device) -> float:
        metal = self.module
        own = metal.recommended_max_memory() - metal.driver_allocated_memory()
        return min(float(own), free_host_memory())

    def synchronise(self, device: torch.device) -> None:
        self.module.synchronize()


#: Name -> the types that are known, in the order in which ``auto`` prefers all but the host.
TYPES: Mapping[str, DeviceType] = {
    known.name: known for known in (Cpu("cpu"), Cuda("cuda"), Xpu("xpu"), Mps("mps"))
}

#: The name of the device that suits best.
AUTO = "auto"

#: How a user may name a device; a type that is not known may be named like one that is.
SPELLINGS = (
    AUTO,
    *(known.name if known.single else f"{known.name}[:N]" for known in TYPES.values()),
)


def type_of(device: torch.device) -> DeviceType:
    """What is known of a device's type."""
    return TYPES.get(device.type) or DeviceType(device.type)
