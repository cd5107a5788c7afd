"""Copies of base values in memory, taken before the first change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from klora_runtime.devices.device_types import type_of
from klora_runtime.devices.host_memory import free_host_memory
from klora_runtime.devices.names import HOST
from klora_runtime.layers.targets import Target

#: Share of a device's free memory that copies may take; more copies go to host memory.
DEVICE_SHARE = 0.5

#: Share of the host's free memory that copies may take; if they need more, ``auto`` branches.
HOST_SHARE = 0.8


class Copies:
    """Copies of the base values of targets' parameters, by the target's path.

    A copy is kept on the parameter's device while half of the free memory remains, else in host
    memory.

    Args:
        targets: targets whose values to keep. Their parameters hold base values now, unless
            ``previous`` has copies of them.
        previous: earlier copies; those of these targets are reused.
    """

    def __init__(self, targets: Sequence[Target], previous: Copies | None = None) -> None:
        known = {} if previous is None else previous._copies
        homes: Mapping[str, torch.device] = {} if previous is None else previous._homes
        self._targets = {target.path: target for target in targets}
        places = _places([target for target in targets if target.path not in known])
        self._copies: dict[str, torch.Tensor] = {}
        for target in targets:
            copy = known.get(target.path)
            if copy is None:
                copy = target.origin.to(places[target.path], copy=True)
            self._copies[target.path] = copy
        # The device of each parameter when its copy was placed.
        self._homes: dict[str, torch.device] = {
            t.path: homes.get(t.path, t.origin.device) for t in targets
        }

    def __contains__(self, path: str) -> bool:
        return path in self._copies

    def of(self, target: Target) -> torch.Tensor:
        """Return the base value of a target, in its parameter's present dtype.

        The parameter may have been moved or converted since (``pipe.to(torch.float16)``). The copy
        is converted the same way, so that it equals the bare model's value. If a parameter was
        moved, all copies of moved parameters are placed again, because they share the memory.
        """
        if target.origin.device != self._homes[target.path]:
            self._place_anew()
        dtype = target.origin.dtype
        if self._copies[target.path].dtype != dtype:
            self._copies[target.path] = self._copies[target.path].to(dtype)
        return self._copies[target.path]

    def _place_anew(self) -> None:
        targets = self._targets.values()
        moved = [t for t in targets if t.origin.device != self._homes[t.path]]
        for path, place in _places(moved).items():
            self._copies[path] = self._copies[path].to(place)
        self._homes |= {target.path: target.origin.device for target in moved}

    def was_converted(self, target: Target) -> bool:
        """Return whether a target's parameter has another dtype than its copy."""
        return self._copies[target.path].dtype != target.origin.dtype

    def forget(self) -> None:
        """Drop all copies."""
        self._copies.clear()
        self._homes.clear()
        self._targets.clear()

    def nbytes_by_place(self) -> dict[str, int]:
        """Return device name, such as ``cpu`` or ``cuda:0`` -> bytes of copies."""
        places: defaultdict[str, int] = defaultdict(int)
        for copy in self._copies.values():
            places[str(copy.device)] += copy.nbytes
        return dict(places)


def host_shortage(targets: Sequence[Target]) -> str | None:
    """Return why the host's memory does not suffice for copies of the targets; None if it does."""
    places = _places(targets)
    needed = sum(target.origin.nbytes for target in targets if places[target.path] == HOST)
    free = free_host_memory()
    if needed <= HOST_SHARE * free:
        return None
    return f"copies of the weights need {needed / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free"


def _places(targets: Iterable[Target]) -> dict[str, torch.device]:
    """Return path of a target -> the device for its copy."""
    staying = [target for target in targets if not target.host.offloads(target.model)]
    needed: defaultdict[torch.device, int] = defaultdict(int)
    for target in staying:
        needed[target.origin.device] += target.origin.nbytes
    roomy = {
        device
        for device, size in needed.items()
        if size <= DEVICE_SHARE * type_of(device).free_memory(device)
    }
    return {target.path: HOST for target in targets} | {
        target.path: target.origin.device for target in staying if target.origin.device in roomy
    }
