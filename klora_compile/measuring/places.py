"""Where LoRAs are measured: a device by its name, or the host without importing torch."""

from __future__ import annotations

from klora_runtime.devices.build import has_no_gpus
from klora_runtime.devices.device_types import AUTO, TYPES
from klora_runtime.lazy_torch import torch


def place_of(device: str) -> str | torch.device:
    """Return the device of this name; the host by its name, so that torch is not needed yet.

    Raises:
        ConfigError: there is no such device.
    """
    host = next(name for name, known in TYPES.items() if known.is_host)
    if device == host or (device == AUTO and has_no_gpus()):
        return host
    from klora_runtime.devices.names import as_device  # it imports torch

    return as_device(device)
