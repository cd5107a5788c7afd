"""The search for a slot's step: the largest step that keeps its delta within the tolerance.

The error of a step is predicted to first order, then measured against the source.
"""

from __future__ import annotations

import math

import torch

from klora_compile.storing.components import components_of
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.q.bitstream import Rows
from klora_runtime.artifact.q.codec import matrices
from klora_runtime.artifact.q.form import LEAST_STEP, MOST, MOST_STEP, TOP_CLASS, Quantised
from klora_runtime.artifact.q.values import steps_of

#: The search ends when the error is between this share of the tolerance and the tolerance.
_NEAR = 0.995
_ATTEMPTS = 8

#: The part of the tolerance that a measured error may reach; the measurement is a little uncertain.
_SURE = 1 - 1e-5

#: The part of the tolerance that a step is chosen for.
_AIM = 0.998

#: A smaller change of the step keeps the levels.
_SMALL = 0.1

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
        self._energy = float(self._components.energies.sum())
        self._attempts = _ATTEMPTS if self._energy else 0
        aim = (_AIM * tolerance) ** 2 * self._energy
        self._spread(self._components.step_that_loses(aim), aim)

    @property
    def targets(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The matrices to quantise next; empty at the end.

        Each is (rows, numbers), float32, in half steps, and (rows,) bool: which rows are of large
        numbers.
        """
        if not self._attempts:
            return []
        return [
            ((rows / (steps.double() / 2)).float(), large)
            for rows, steps, large in self._rows_steps_large()
        ]

    def settle(self, points: list[torch.Tensor]) -> None:
        """Measure the error of the targets' points, in half steps, and choose the next step."""
        self._attempts -= 1
        found = self._values(points)
        error = math.inf if found is None else self._components.error(found)
        if found is not None and error <= _SURE * self._tolerance:
            if self._best is None or _quantised(self._best).step < self._step:
                self._best = self._stored(found, error)
            if error >= _NEAR * self._tolerance:
                self._attempts = 0
        self._change(error)

    @property
    def result(self) -> Stored:
        """The compressed delta, or the unchanged one if that is smaller."""
        small = self._best
        if small is None or _expected_bits(small) >= 8 * self._source.delta.nbytes:
            return self._source
        return small

    def _spread(self, base: float, aim: float) -> None:
        """Choose the levels at which all components lose the same, and the step for ``aim``.

        Args:
            base: the step at which they lose it, if levels were not whole numbers.
            aim: energy to lose.
        """
        self._base, self._levels = base, self._components.levels(base)
        step = base
        if len(self._levels):
            step = self._components.step_at_levels(self._levels, aim) or base
        self._step = _rounded(step)

    def _change(self, error: float) -> None:
        """Choose the next step from the error of the last one; keep the levels if it is near."""
        if error:
            dropped = self._components.dropped(len(self._levels)) / self._energy
            aim = (_AIM * self._tolerance) ** 2
            change = max(0.0, aim - dropped) / max(error**2 - dropped, 1e-3 * error**2)
            change = math.sqrt(min(16.0, max(1 / 16, change)))
        else:
            change = 4.0
        if abs(change - 1.0) < _SMALL:
            self._step = _rounded(self._step * change)
        else:
            change = math.sqrt(change)
            self._spread(self._base * change, 0.0)
            self._step = _rounded(self._step)

    def _rows_steps_large(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return, for each stored matrix, its rows, their steps, and which are of large numbers."""
        components = self._components
        levels, kept = self._levels, len(self._levels)
        steps = steps_of(self._step, levels)
        found = []
        for part in components.parts:
            rows = part if components.dense else part[:kept]
            large = (Rows(part.shape[1], levels).classes > TOP_CLASS).expand(len(rows))
            found.append((rows, steps.expand(len(rows), 1), large))
        return found

    def _values(self, points: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """Return the values of points as float32.

        Return None if nothing is left, or the format has no such step, level or number.
        """
        if not LEAST_STEP <= self._step <= MOST_STEP:
            return None
        levels = self._levels
        found = []
        for part, (_, steps, _) in zip(points, self._rows_steps_large(), strict=True):
            rows = Rows(part.shape[1], levels)
            if not len(part) or not rows.known or float(part.abs().max()) >= 2 * MOST:
                return None
            found.append(part * (steps / 2))
        return found

    def _stored(self, values: list[torch.Tensor], error: float) -> Stored:
        """Return the delta of these matrices with its error."""
        levels = tuple(self._levels.tolist())
        quantised = Quantised(self._step, levels, _rounded(error))
        scale, (out, *inner) = self._source.scale, self._shape
        if self._components.dense:
            return Stored(scale, Dense(values[0].reshape(self._shape)), quantised)
        down, up = values
        up = up.T.view(out, -1, *(1 for _ in inner[1:]))
        return Stored(scale, LowRank(down.view(-1, *inner), up), quantised)


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
