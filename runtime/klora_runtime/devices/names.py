"""Device names: from the name that a user gives to a device of torch."""

from __future__ import annotations

import torch

from klora_runtime.devices.device_types import AUTO, SPELLINGS, TYPES, type_of
from klora_runtime.errors import ConfigError, shown

#: The device of the host, where files are read.
HOST = torch.device("cpu")


def as_device(name: str | torch.device) -> torch.device:
    """Return the device of this name, with its index as on tensors: ``cuda`` gives ``cuda:0``.

    Args:
        name: ``auto`` for the first GPU that torch sees, or else the CPU; or a type of device that
            torch knows, with or without an index.

    Raises:
        ConfigError: there is no such device.
    """
    if name == AUTO:
        return as_device(_best())
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise _refusal(name, "not a device") from error
    if device.type == "meta":
        raise _refusal(name, "holds no numbers")
    known = type_of(device)
    count = None if known.is_host else known.count()
    if count is not None and not 0 <= (device.index or 0) < count:
        raise _refusal(name, f"torch sees {count} {known.title} devices")
    try:
        torch.empty(0, device=device)
        return indexed(device)
    except (RuntimeError, ImportError, AssertionError) as error:  # torch raises each for some type
        raise _refusal(name, shown(error)) from error


def indexed(device: str | torch.device) -> torch.device:
    """Return a device that exists with its index as on tensors: ``cuda:0`` for ``cuda``."""
    device = torch.device(device)
    if type_of(device).is_host:
        return HOST
    return torch.empty(0, device=device).device if device.index is None else device


def _best() -> str:
    there = (known.name for known in TYPES.values() if not known.is_host and known.count())
    return next(there, HOST.type)


def _refusal(name: object, why: str) -> ConfigError:
    known = ", ".join(SPELLINGS)
    return ConfigError(f"device {shown(name)}: {why}; expected {known} or another of torch's.")
