"""Transfers of tensors to a device and back while the host continues.

If the device has streams, the host gathers tensors in pinned memory, a second stream copies them,
and results come back behind an event. On other devices every transfer is synchronous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from klora_runtime.devices.device_types import type_of


class Courier:
    """The transfers of one device.

    Args:
        device: the device; on a CPU nothing moves.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        known = type_of(device)
        self._module: Any = known.module if known.streams else None
        self._stream: Any = None if self._module is None else self._module.Stream(device)

    def bring(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Stack tensors of one shape on the device, in their dtype."""
        first, pinned = tensors[0], self._stream is not None
        gathered = torch.empty((len(tensors), *first.shape), dtype=first.dtype, pin_memory=pinned)
        stacked = torch.stack(list(tensors), out=gathered)
        if self._stream is None:
            return stacked.to(self.device)
        with self._module.stream(self._stream):
            there = stacked.to(self.device, non_blocking=True)
        current = self._module.current_stream(self.device)
        current.wait_stream(self._stream)
        there.record_stream(current)
        return there

    def take(self, found: torch.Tensor) -> Parcel:
        """Start the transfer of numbers back to the host."""
        if self._stream is None:
            return Parcel(found.cpu(), None)
        here = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
        here.copy_(found, non_blocking=True)
        arrived = self._module.Event()
        arrived.record(self._module.current_stream(self.device))
        return Parcel(here, arrived)


@dataclass(frozen=True)
class Parcel:
    """Numbers in transfer to the host."""

    numbers: torch.Tensor
    arrived: Any

    def opened(self) -> torch.Tensor:
        """Wait for the numbers and return them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers
