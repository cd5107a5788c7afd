"""DoRA (arXiv 2402.09353): a weight's direction is adapted, its magnitude is learnt apart.

W' = m (W + D) / ||W + D||, D the scaled delta of any other form (eq. 5). Two axes are published:
the paper's and PEFT's norm is that of each row (one magnitude per output), LyCORIS' and
OneTrainer's by default that of each column (one per input); the magnitude's shape tells which.
The delta, W' - W, needs the base weight W.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum

import torch

from klora_compile.reading.forms.parts import Part, Shape

#: One per row or per column of the weight.
MAGNITUDE = Part("dora_scale")
#: As PEFT and ai-toolkit (``toolkit/models/DoRA.py``) write it, one per row.
ROW_MAGNITUDE = Part(
    "magnitude vector", (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".magnitude")
)


class Axis(Enum):
    """What one magnitude belongs to."""

    OUTPUT = "output"
    INPUT = "input"


def axes(magnitude: Shape, weight: Shape) -> frozenset[Axis]:
    """The axes that a magnitude's shape can mean for a weight's.

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
    """The axis of all layers of a file, which has one trainer; None where two are left, or none."""
    left = frozenset(Axis)
    for each in found:
        left &= each
    return next(iter(left)) if len(left) == 1 else None


def dora_delta(
    base: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor, axis: Axis
) -> torch.Tensor:
    """m (W + D) / ||W + D|| - W.

    Args:
        base: W, (out, in, *kernel).
        delta: D with its scaling, of the same shape.
        magnitude: m, as many values as the axis is long.
        axis: what a norm is taken of: everything that belongs to one output, or to one input.

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
