"""The search for a slot's step: the largest step that keeps its delta within the tolerance.

The error of a step is predicted to first order, then measured in float64 against the source.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from klora_compile.storing.components import components_of
from klora_compile.storing.loss import relative_error
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.q.bitstream import Rows
from klora_runtime.artifact.q.codec import matrices
from klora_runtime.artifact.q.form import LEAST_STEP, MOST_STEP, Quantised
from klora_runtime.artifact.q.values import steps_of, values_of

#: The search ends when the error is between this share of the tolerance and the tolerance.
_NEAR = 0.997
_ATTEMPTS = 8

#: Significant digits of a step and of an error in the file.
_DIGITS = 4

#: Entropy in bits of a Gaussian number whose root mean square is one step.
_GAUSSIAN_BITS = 0.5 * math.log2(2 * math.pi * math.e)


class StepSearch:
    """The search for the step of one slot of one layer; it runs until it has no more targets.

    Args:
        stored: the source's delta.
        shape: shape of the parameter.
        tolerance: greatest relative Frobenius error.
    """

    def __init__(self, stored: Stored, shape: tuple[int, ...], tolerance: float) -> None:
        self._source = stored
        self._shape = shape
        self._tolerance = tolerance
        self._components = components_of(stored.delta)
        self._best: Stored | None = None
        energy = float(self._components.energies.sum())
        self._attempts = _ATTEMPTS if energy else 0
        self._step = _rounded(self._components.step_that_loses(tolerance**2 * energy))

    @property
    def targets(self) -> list[torch.Tensor]:
        """The matrices to quantise next: (rows, numbers), float32, in steps; empty at the end."""
        if not self._attempts:
            return []
        return [rows / steps for rows, steps in self._rows_and_steps()]

    def settle(self, indices: list[torch.Tensor]) -> None:
        """Measure the error of the targets' whole numbers, and choose the next step."""
        self._attempts -= 1
        found = self._found(indices)
        error = math.inf if found is None else relative_error(self._source.delta, found.delta)
        if found is not None and error <= self._tolerance:
            if self._best is None or _quantised(self._best).step < self._step:
                stated = replace(_quantised(found), error=_rounded(error))
                self._best = replace(found, quantised=stated)
            if error >= _NEAR * self._tolerance:
                self._attempts = 0
        change = math.sqrt(self._tolerance / error) if error else math.inf
        self._step = _rounded(self._step * 0.999 * min(2.0, max(0.5, change)))

    @property
    def result(self) -> Stored:
        """The compressed delta, or the unchanged one if that is smaller."""
        small = self._best
        if small is None or _expected_bits(small) >= 8 * self._source.delta.nbytes:
            return self._source
        return small

    def _rows_and_steps(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return, for each stored matrix, its rows and their steps, (rows, 1)."""
        components = self._components
        steps = steps_of(self._step, components.levels(self._step).tolist())
        if components.dense:
            return [(rows, steps.expand(len(rows), 1)) for rows in components.parts]
        kept = components.kept(self._step)
        return [(part[kept], steps) for part in components.parts]

    def _found(self, indices: list[torch.Tensor]) -> Stored | None:
        """Return the delta of whole numbers, without its error.

        Return None if nothing is left, or the format has no such step, level or number.
        """
        if not LEAST_STEP <= self._step <= MOST_STEP:
            return None
        levels = self._components.levels(self._step)
        parts = []
        for numbers, (_, steps) in zip(indices, self._rows_and_steps(), strict=True):
            rows = Rows(numbers.shape[1], levels.expand(len(numbers)))
            if not len(numbers) or not rows.hold(numbers):
                return None
            parts.append(values_of(numbers, steps))
        quantised = Quantised(self._step, tuple(levels.tolist()), 0.0)
        scale, (out, *inner) = self._source.scale, self._shape
        if self._components.dense:
            return Stored(scale, Dense(parts[0].reshape(self._shape)), quantised)
        down, up = parts
        tail = [1] * len(inner[1:])
        up = up.T.reshape(out, -1, *tail).contiguous()
        return Stored(scale, LowRank(down.reshape(-1, *inner), up), quantised)


def _expected_bits(stored: Stored) -> float:
    """Return the size of the numbers, in bits, in a code for Gaussian numbers."""
    found = 0.0
    levels = torch.tensor(_quantised(stored).levels)
    for matrix in matrices(stored.delta):
        bits = Rows(matrix.shape[1], levels).classes / 4 + _GAUSSIAN_BITS
        found += float(bits.clamp_min(1).mean()) * matrix.numel()
    return found


def _quantised(stored: Stored) -> Quantised:
    assert stored.quantised is not None
    return stored.quantised


def _rounded(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")
