"""The rounding of deltas by a dtype: the distance of the held delta from the exact one.

All modes are measured in the same way: in every segment of a layer's timeline, the exact delta in
float64 is compared with the delta that the layer holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch

from klora_runtime.artifact.delta import Delta
from klora_runtime.devices.precision import home_of_float64
from klora_runtime.layers.targets import Target

#: (gates of the slots that act in a segment, exact delta) -> held delta.
_Held = Callable[[Mapping[str, float], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rounding:
    """The rounding of one layer over all segments of its timeline."""

    layer: str
    error: float
    """||held delta - exact delta||_F squared."""
    size: float
    """||exact delta||_F squared."""

    @property
    def share(self) -> float:
        """||held - exact|| / ||exact||; see :func:`rounding_share`."""
        return rounding_share([self])


def rounding_share(roundings: Iterable[Rounding]) -> float:
    """Return ||held - exact|| / ||exact|| over all layers together; 0 if nothing acts."""
    every = list(roundings)
    size = math.fsum(each.size for each in every)
    return math.sqrt(math.fsum(each.error for each in every) / size) if size else 0.0


def weight_rounding(
    target: Target, base: torch.Tensor, weights: Mapping[str, float], rows: int | None = None
) -> Rounding:
    """Measure mode merge: the live weight holds round(base + delta).

    Args:
        base: the pristine weight.
        weights: slot -> factor on the coefficients; a missing slot has 1.
        rows: approximate number of evenly spread rows for an estimate; None for all rows.
    """
    home = home_of_float64(target.origin.device)
    step = 1 if rows is None else -(-len(base) // rows)
    with torch.inference_mode():
        start = base[::step].to(home).double()
        start = start.reshape(len(start), -1)
        deltas = {
            slot: stored.delta.rows([range(0, len(base), step)]).in_float64(home)
            for slot, stored in target.entry.acting.items()
        }

        def held(_: Mapping[str, float], exact: torch.Tensor) -> torch.Tensor:
            return (start + exact).to(base.dtype).double() - start

        return _over_segments(target, deltas, weights, held)


def factor_rounding(target: Target, dtype: torch.dtype, weights: Mapping[str, float]) -> Rounding:
    """Measure mode branch: balanced factors (or a dense delta) and gates are rounded to a dtype.

    Args:
        dtype: dtype in which the module multiplies.
        weights: see :func:`weight_rounding`.
    """
    with torch.inference_mode():
        even = {
            slot: stored.delta.to(dtype=torch.float32).balanced()
            for slot, stored in target.entry.acting.items()
        }
        deltas = {slot: delta.in_float64() for slot, delta in even.items()}
        rounded = {slot: delta.to(dtype=dtype).in_float64() for slot, delta in even.items()}

        def held(gates: Mapping[str, float], _: torch.Tensor) -> torch.Tensor:
            return _combined({slot: _rounded(gate, dtype) for slot, gate in gates.items()}, rounded)

        return _over_segments(target, deltas, weights, held)


def _over_segments(
    target: Target, deltas: Mapping[str, Delta], weights: Mapping[str, float], held: _Held
) -> Rounding:
    """Compare the deltas in every segment in which something acts.

    Args:
        deltas: slot -> exact delta, flattened, float64.
    """
    scales = {slot: target.entry.factors[slot].scale * weights.get(slot, 1.0) for slot in deltas}
    errors, sizes = [], []
    for _, row in target.entry.timeline.rows():
        gates = {slot: scale * row.get(slot, 0.0) for slot, scale in scales.items()}
        acting = {slot: gate for slot, gate in gates.items() if gate}
        if acting:
            exact = _combined(acting, deltas)
            errors.append(float((held(acting, exact) - exact).square().sum()))
            sizes.append(float(exact.square().sum()))
    return Rounding(target.layer, math.fsum(errors), math.fsum(sizes))


def _combined(gates: Mapping[str, float], deltas: Mapping[str, Delta]) -> torch.Tensor:
    """Return the sum of gate * delta, a matrix in float64."""
    return reduce(torch.add, (gate * deltas[slot].matrix() for slot, gate in gates.items()))


def _rounded(number: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=dtype))
