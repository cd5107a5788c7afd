"""What a tensor is to its layer, and what each form makes of a layer's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Protocol

import torch

from klora_runtime.artifact.delta import Delta


class Part(Enum):
    """A tensor of a layer, in the words of the form that it belongs to."""

    ALPHA = "alpha"
    DOWN = "down"
    UP = "up"
    MID = "mid"
    UP_BIAS = "bias of up"
    HADA_W1_A = "hada_w1_a"
    HADA_W1_B = "hada_w1_b"
    HADA_W2_A = "hada_w2_a"
    HADA_W2_B = "hada_w2_b"
    HADA_T1 = "hada_t1"
    HADA_T2 = "hada_t2"
    LOKR_W1 = "lokr_w1"
    LOKR_W1_A = "lokr_w1_a"
    LOKR_W1_B = "lokr_w1_b"
    LOKR_W2 = "lokr_w2"
    LOKR_W2_A = "lokr_w2_a"
    LOKR_W2_B = "lokr_w2_b"
    LOKR_T2 = "lokr_t2"
    DIFF = "diff"
    DIFF_BIAS = "diff_b"
    NORM_WEIGHT = "w_norm"
    NORM_BIAS = "b_norm"
    VALUE = "value"
    """The parameter's new value itself, not a difference."""
    MAGNITUDE = "dora_scale"
    """DoRA's, one per row or per column of the weight."""
    ROW_MAGNITUDE = "magnitude vector"
    """DoRA's as PEFT writes it, one per row."""


Shape = tuple[int, ...]
Shapes = Mapping[Part, Shape]
Tensors = Mapping[Part, torch.Tensor]


class Form(Protocol):
    """How a weight's delta is written. Shapes come before tensors: they are in a file's header."""

    @property
    def name(self) -> str:
        """As in a report."""
        ...

    @property
    def parts(self) -> Sequence[Part]:
        """The parts that only this form has."""
        ...

    def problems(self, shapes: Shapes, kernel: Shape) -> list[str]:
        """What is wrong with a layer of these parts; empty where it can be read."""
        ...

    def rank(self, shapes: Shapes) -> int | None:
        """The rank that the trainer declared, which alpha is divided by; None where there is none,
        and with it no alpha."""
        ...

    def shape(self, shapes: Shapes, kernel: Shape) -> Shape:
        """Shape of the weight."""
        ...

    def is_dense(self, shapes: Shapes, kernel: Shape) -> bool:
        """Whether the delta becomes more numbers than the file has for it, if nothing is lost."""
        ...

    def delta(self, tensors: Tensors, kernel: Shape, error: float) -> tuple[Delta, float]:
        """The weight's delta without alpha / rank, and the share of its norm that is lost.

        Args:
            kernel: the convolution's, where the tensors do not say it; empty for a linear layer.
            error: how much may be lost where only an approximation is smaller.
        """
        ...


def missing(needed: Sequence[Part], shapes: Shapes) -> list[str]:
    """One sentence where parts are missing."""
    absent = [part.value for part in needed if part not in shapes]
    return [f"has no {' and no '.join(absent)}"] if absent else []


def shapes_text(parts: Sequence[Part], shapes: Shapes) -> str:
    """Parts with their shapes, for an error."""
    return ", ".join(f"{part.value} {list(shapes[part])}" for part in parts if part in shapes)
