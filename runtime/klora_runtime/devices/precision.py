"""Precision: a device that has float64, and full float32 products whatever the process allows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from klora_runtime.devices.device_types import TYPES, type_of
from klora_runtime.devices.names import HOST

_LOCK = threading.Lock()
_inside = 0
_before: list[str] = []


def home_of_float64(device: torch.device) -> torch.device:
    """Return the device itself where it has float64, else the host.

    Bring a tensor there before it is converted, in a call of its own: ``tensor.to(home).double()``.
    """
    return device if type_of(device).has_float64(device) else HOST


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in full float32 inside the block: no TF32, no bfloat16.

    The switches are global to the process. Several threads may be inside at once; the last one
    out restores what the first one found.
    """
    global _inside
    with _LOCK:
        if _inside == 0:
            _before[:] = _precisions()
            _set_precisions(["ieee"] * len(_before))
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if _inside == 0:
                _set_precisions(_before)


def _switches() -> list[Any]:
    return [switch for known in TYPES.values() for switch in known.float32_switches()]


def _precisions() -> list[str]:
    if all(hasattr(switch, "fp32_precision") for switch in _switches()):
        return [switch.fp32_precision for switch in _switches()]
    return [torch.get_float32_matmul_precision()]  # torch before 2.9 has a single switch


def _set_precisions(values: list[str]) -> None:
    if len(values) == 1:
        torch.set_float32_matmul_precision("highest" if values == ["ieee"] else values[0])
        return
    for switch, value in zip(_switches(), values, strict=True):
        switch.fp32_precision = "none"  # inherit from the parent switch
        if switch.fp32_precision != value:
            switch.fp32_precision = value
