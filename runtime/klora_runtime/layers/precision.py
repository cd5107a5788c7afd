"""Full float32 matrix products, whatever the process has allowed elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.Lock()
_inside = 0
_before: list[str] = []


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32: no TF32 on CUDA, no bfloat16 on CPU.

    The switches belong to the whole process. Several threads may be inside at once; the last one
    out puts back what the first one found.
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
    return [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]


def _precisions() -> list[str]:
    if all(hasattr(switch, "fp32_precision") for switch in _switches()):
        return [switch.fp32_precision for switch in _switches()]
    return [torch.get_float32_matmul_precision()]  # torch before 2.9 has one switch for all


def _set_precisions(values: list[str]) -> None:
    if len(values) == 1:
        torch.set_float32_matmul_precision("highest" if values == ["ieee"] else values[0])
        return
    for switch, value in zip(_switches(), values, strict=True):
        switch.fp32_precision = "none"  # what the switches above it say
        if switch.fp32_precision != value:
            switch.fp32_precision = value
