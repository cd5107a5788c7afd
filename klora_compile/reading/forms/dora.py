"""DoRA (arXiv 2402.09353): a weight's direction and magnitude are learnt separately.

W' = m (W + D) / ||W + D|| with the scaled delta D of any other form (eq. 5). There are two axes:
the norm of the paper and of PEFT is per row (one magnitude per output), the default of LyCORIS and
OneTrainer is per column (one per input). The magnitude's shape shows the axis. The delta, W' - W,
needs the base weight W.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum

from klora_compile.reading.forms.parts import Part, Shape
from klora_runtime.lazy_torch import torch

#: One magnitude per row or per column of the weight.
MAGNITUDE = Part("dora_scale")
#: The magnitude of PEFT and ai-toolkit (``toolkit/models/DoRA.py``), one per row.
ROW_MAGNITUDE = Part(
    "magnitude vector", (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".magnitude")
)


class Axis(Enum):
    """The axis that a magnitude belongs to."""

    OUTPUT = "output"
    INPUT = "input"


def axes(magnitude: Shape, weight: Shape) -> frozenset[Axis]:
    """Return the possible axes of a magnitude, by its shape and the weight's.

    Args:
        magnitude: (out, 1, ...), (1, in, 1, ...), PEFT's (1, out, 1, 1) of convolutions, or (n,).
        weight: (out, in, *kernel).
    """
    out, inner = weight[:2]
    length = math.prod(magnitude)
    if not magnitude:
        return frozenset()
    if len(magnitude) == 1:
        return frozenset(
            axis for axis, size in ((Axis.OUTPUT, out), (Axis.INPUT, inner)) if length == size
        )
    found = set()
    if length == magnitude[0] == out:
        found.add(Axis.OUTPUT)
    if len(magnitude) > 1 and length == magnitude[1] == inner:
        found.add(Axis.INPUT)
    return frozenset(found)


def common_axis(found: Iterable[frozenset[Axis]]) -> Axis | None:
    """Return the axis that all layers of a file allow; None if none or both remain."""
    left = frozenset(Axis)
    for each in found:
        left &= each
    return next(iter(left)) if len(left) == 1 else None


def dora_delta(
    base: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor, axis: Axis
) -> torch.Tensor:
    """Return m (W + D) / ||W + D|| - W.

    Args:
        base: W, (out, in, *kernel).
        delta: D with its scaling, of the same shape.
        magnitude: m, one value per output or per input.
        axis: the axis of a norm: all numbers of one output, or of one input.

    Returns:
        (out, in, *kernel), float64.
    """
    adapted = base.double() + delta.double().reshape(base.shape)
    kept = 0 if axis is Axis.OUTPUT else 1
    others = [dim for dim in range(adapted.dim()) if dim != kept]
    norm = torch.linalg.vector_norm(adapted, dim=others, keepdim=True)
    gain = magnitude.double().reshape(norm.shape) / (norm + torch.finfo(torch.float32).tiny)
    result: torch.Tensor = gain * adapted - base.double()
    return result
