"""Copies of the base weights, taken before they are first changed, to give back to the bit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from klora_runtime.targets import Target

#: Share of a device's free memory that copies may take; beyond it they go to host memory.
DEVICE_SHARE = 0.5


class Pristine:
    """The untouched values of some targets' parameters, by the target's path.

    A copy stays on the parameter's device while that leaves half of the free memory, else it
    goes to host memory.
    """

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}
        self._targets: dict[str, Target] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._copies

    def keep(self, targets: Iterable[Target]) -> None:
        """Copy what is not kept yet. Call it while these parameters still hold base values."""
        new = [target for target in targets if target.path not in self._copies]
        places = _places(new)
        copies = {}
        for target in new:
            parameter = target.parameter.data
            copies[target.path] = parameter.to(places[parameter.device], copy=True)
        self._copies |= copies
        self._targets |= {target.path: target for target in new}

    def of(self, target: Target) -> torch.Tensor:
        """The base value of a kept target, in its parameter's present dtype.

        The parameter may have been converted since (``pipe.to(torch.float16)``); the copy is
        converted the same way, so that it is what the bare model would hold.
        """
        parameter = target.parameter.data
        copy = self._copies[target.path]
        if copy.dtype != parameter.dtype or (
            copy.device.type != "cpu" and copy.device != parameter.device
        ):
            copy = copy.to(parameter.device, parameter.dtype)
            self._copies[target.path] = copy
        return copy

    def restore(self, paths: Iterable[str]) -> None:
        """Write the base values of these targets back, bit for bit."""
        with torch.inference_mode():
            for path in paths:
                target = self._targets[path]
                target.parameter.data.copy_(self.of(target))

    def forget(self, paths: Iterable[str]) -> None:
        """Drop copies that are no longer needed."""
        for path in list(paths):
            del self._copies[path], self._targets[path]

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that is kept."""
        return tuple(self._copies)

    def nbytes_by_place(self) -> dict[str, int]:
        """Bytes of the copies, by device name such as ``cpu`` or ``cuda:0``."""
        places: defaultdict[str, int] = defaultdict(int)
        for copy in self._copies.values():
            places[str(copy.device)] += copy.nbytes
        return dict(places)


def _places(targets: list[Target]) -> dict[torch.device, torch.device]:
    needed: defaultdict[torch.device, int] = defaultdict(int)
    for target in targets:
        needed[target.parameter.device] += target.parameter.nbytes
    return {
        device: device if size <= DEVICE_SHARE * _free_bytes(device) else torch.device("cpu")
        for device, size in needed.items()
    }


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return float(free)
