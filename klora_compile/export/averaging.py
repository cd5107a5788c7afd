"""Averages of a schedule over a window of progress, and their distance from the schedule.

Inside a window a layer's delta is D(t) = sum over slots of c_s(t) D_s, piecewise constant in t. Its
average has the coefficients (1 / length) * integral of c_s(t) dt, exact from the lengths of the
segments. The error is relative to the schedule, in the Frobenius norm over the window:

    error^2 = integral of ||D(t) - gain * average||^2 dt / integral of ||D(t)||^2 dt

Norms are computed from the slots' inner products <D_r, D_s>, which need rank x rank products only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from klora_runtime.artifact.fusion import Entry
from klora_runtime.artifact.schedule import STEPLESS
from klora_runtime.artifact.timeline import Timeline


@dataclass(frozen=True)
class Window:
    """A range of progress, [start, stop)."""

    start: float
    stop: float
    """Above ``start``, at most 1."""

    @property
    def length(self) -> float:
        return self.stop - self.start


#: The whole sampling.
WHOLE = Window(0.0, 1.0)


def phases(count: int) -> tuple[Window, ...]:
    """Return ``count`` windows of equal length."""
    edges = [index / count for index in range(count + 1)]
    return tuple(Window(start, stop) for start, stop in pairwise(edges))


@dataclass(frozen=True)
class Loss:
    """The loss of an approximation as relative Frobenius norms; 0 means none."""

    total: float
    """Loss over all layers together."""
    worst: float
    layer: str | None
    """The layer of :attr:`worst`; None if nothing is lost."""


def mean_coefficients(timeline: Timeline, window: Window) -> dict[str, float]:
    """Return slot name -> average of its coefficient over a window."""
    parts = list(_parts(timeline, window))
    if len(parts) == 1:
        return parts[0][1]
    return {
        slot: math.fsum(length * row[slot] for length, row in parts) / window.length
        for slot in timeline.coefficients
    }


def layer_gain(entry: Entry, gain: float) -> float:
    """Return the gain of one layer, 1 for layers that run before the first step."""
    return 1.0 if entry.component in STEPLESS else gain


class ScheduleError:
    """The distance of layers' schedules from their averages.

    Args:
        entries: the layers; only those of the denoiser count.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._layers = [
            (entry, _products(entry))
            for entry in entries
            if entry.acts and entry.component not in STEPLESS
        ]

    def over(self, *windows: Window, gain: float = 1.0) -> Loss:
        """Return the loss if ``gain`` times the average acts in the whole of each window."""
        squares = []
        for entry, products in self._layers:
            each = [_squares(entry, products, window, gain) for window in windows]
            lost, all_of_it = (math.fsum(column) for column in zip(*each, strict=True))
            squares.append((entry.layer, lost, all_of_it))
        return loss_of(squares)


def loss_of(squares: Sequence[tuple[str, float, float]]) -> Loss:
    """Return the loss of layers, each (name, squared norm of the loss, squared norm before)."""
    total = _ratio(math.fsum(lost for _, lost, _ in squares), math.fsum(s[2] for s in squares))
    ratios = ((_ratio(lost, norm), name) for name, lost, norm in squares)
    worst, layer = max(ratios, key=lambda found: found[0], default=(0.0, None))
    return Loss(total, worst, layer if worst > 0.0 else None)


def _ratio(lost: float, all_of_it: float) -> float:
    return math.sqrt(lost / all_of_it) if all_of_it > 0.0 else 0.0


def _parts(timeline: Timeline, window: Window) -> Iterable[tuple[float, dict[str, float]]]:
    """Yield length and coefficients of each segment in a window."""
    stops = (*timeline.starts[1:], 1.0)
    for (start, row), stop in zip(timeline.rows(), stops, strict=True):
        length = min(stop, window.stop) - max(start, window.start)
        if length > 0.0:
            yield length, row


def _squares(
    entry: Entry, products: Mapping[tuple[str, str], float], window: Window, gain: float
) -> tuple[float, float]:
    """Return squared norms over a window: of schedule minus average, and of the schedule."""
    mean = mean_coefficients(entry.timeline, window)
    lost, all_of_it = [], []
    for length, row in _parts(entry.timeline, window):
        rest = {slot: row[slot] - gain * mean[slot] for slot in entry.acting}
        lost.append(length * _square(rest, products))
        all_of_it.append(length * _square(row, products))
    return math.fsum(lost), math.fsum(all_of_it)


def _square(coefficients: Mapping[str, float], products: Mapping[tuple[str, str], float]) -> float:
    """Return ||sum of coefficients times deltas||^2."""
    terms = (coefficients[r] * coefficients[s] * value for (r, s), value in products.items())
    return max(0.0, math.fsum(terms))


def _products(entry: Entry) -> dict[tuple[str, str], float]:
    """Return the inner products of all pairs of an entry's deltas, with their scales applied."""
    return {
        (r, s): one.scale * other.scale * one.delta.inner(other.delta)
        for r, one in entry.acting.items()
        for s, other in entry.acting.items()
    }
