"""Overflow: weights, factors or gates that are too large for the dtype that must hold them.

Bounds from the largest number of each tensor, which is read once, clear most layers. The exact
values are computed only if a bound is too large.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from klora_runtime.artifact.delta import Delta, LowRank, is_finite
from klora_runtime.devices.precision import home_of_float64
from klora_runtime.layers.targets import Target, refuse

#: The dtype in which factors and coefficients are multiplied.
_WORK = torch.float32

_Kind = tuple[torch.device, torch.dtype]


@dataclass(frozen=True)
class Largest:
    """The largest magnitudes of one delta, without its scale."""

    parts: tuple[float, ...]
    """The largest magnitude of each of its tensors."""
    delta: float
    """An upper bound of the magnitudes in the delta."""


#: Delta -> its largest magnitudes.
_KNOWN: WeakKeyDictionary[Delta, Largest] = WeakKeyDictionary()

#: Slot -> largest magnitudes of its delta.
Sizes = Mapping[str, Largest]


def refuse_overflow(issues: Iterator[str]) -> None:
    """Raise one error if something would be infinite.

    Args:
        issues: one sentence per layer.

    Raises:
        IncompatibleModelError: there are issues.
    """
    refuse(
        issues,
        "the fusion is too strong for the dtype of these layers: they would hold infinity; nothing "
        "was changed. Lower the weights of its slots, or load the model in bfloat16 or float32.",
    )


def sizes_of(targets: Sequence[Target]) -> list[Sizes]:
    """Return the sizes of each target; this waits for a device once per dtype.

    The sizes of a delta are kept as long as it is, for a fusion that acts again.
    """
    deltas = [stored.delta for target in targets for stored in target.entry.acting.values()]
    new = [delta for delta in deltas if delta not in _KNOWN]
    kinds: defaultdict[_Kind, list[torch.Tensor]] = defaultdict(list)
    for delta in new:
        for tensor in delta.tensors:
            kinds[_kind(tensor)].append(tensor)
    found = {kind: iter(_magnitudes(tensors)) for kind, tensors in kinds.items()}
    for delta in new:
        _KNOWN[delta] = _largest(delta, [next(found[_kind(t)]) for t in delta.tensors])
    return [
        {slot: _KNOWN[stored.delta] for slot, stored in target.entry.acting.items()}
        for target in targets
    ]


def weight_overflow(
    target: Target,
    base: Callable[[Target], torch.Tensor],
    sizes: Sizes,
    weights: Mapping[str, float],
) -> str | None:
    """Return, for mode merge, what would be infinite in one layer; None if nothing would.

    Args:
        base: returns the pristine weight; infinity in the base itself is ignored.
        sizes: the target's sizes from :func:`sizes_of`.
        weights: slot -> factor on the coefficients; a missing slot has 1.
    """
    dtype = target.origin.dtype
    for start, gates in _segments(target, weights):
        reach = sum(abs(gate) * sizes[slot].delta for slot, gate in gates.items())
        if reach < _always_fits(dtype):
            continue
        beyond = _beyond_work(gates, sizes)
        if beyond is None:
            largest = _largest_sum(target, gates, dtype, base(target))
            its = f"its {target.entry.parameter}"
            beyond = None if largest is None else f"{its} {_too_large(largest, dtype)}"
        if beyond is not None:
            return f"{target.layer}: at progress {start:.3g} {beyond}"
    return None


def leaf_overflow(
    target: Target, dtype: torch.dtype, sizes: Sizes, weights: Mapping[str, float]
) -> str | None:
    """Return, for mode branch, what would be infinite: factors, gates or summed deltas.

    Args:
        dtype: dtype in which the module multiplies.
        sizes: see :func:`weight_overflow`.
        weights: see :func:`weight_overflow`.
    """
    most = torch.finfo(dtype).max
    for slot, stored in target.entry.acting.items():
        if isinstance(stored.delta, LowRank) and not _factors_fit(stored.delta, sizes[slot], dtype):
            return f"{target.layer}: the factors of {slot} do not fit {_name(dtype)}"
    for start, gates in _segments(target, weights):
        beyond = _beyond_work(gates, sizes)
        dense = {s: g for s, g in gates.items() if len(sizes[s].parts) == 1}
        factor = max((abs(gates[slot]) for slot in gates.keys() - dense.keys()), default=0.0)
        if beyond is None and factor > most:
            beyond = f"the factor on its delta {_too_large(factor, dtype)}"
        reach = sum(abs(gate) * sizes[slot].delta for slot, gate in dense.items())
        if beyond is None and reach > most:
            largest = _largest_sum(target, dense, dtype)
            beyond = None if largest is None else f"its delta {_too_large(largest, dtype)}"
        if beyond is not None:
            return f"{target.layer}: at progress {start:.3g} {beyond}"
    return None


def _kind(tensor: torch.Tensor) -> _Kind:
    return tensor.device, tensor.dtype


def _magnitudes(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Return the largest magnitude of each tensor; all have one device and dtype."""
    with torch.inference_mode():
        ends = [end for each in tensors for end in torch.aminmax(each)]
        found: list[float] = torch.stack(ends).float().view(-1, 2).abs().amax(dim=1).tolist()
    return found


def _largest(delta: Delta, parts: Sequence[float]) -> Largest:
    if isinstance(delta, LowRank):
        down, up = parts
        return Largest((down, up), delta.rank * down * up)
    return Largest(tuple(parts), parts[0])


def _segments(
    target: Target, weights: Mapping[str, float]
) -> Iterator[tuple[float, dict[str, float]]]:
    """Yield each segment's start, and scale * coefficient * weight of the slots that act there."""
    stored = target.entry.acting
    scales = {slot: each.scale * weights.get(slot, 1.0) for slot, each in stored.items()}
    for start, row in target.entry.timeline.rows():
        gates = {slot: scale * row.get(slot, 0.0) for slot, scale in scales.items()}
        yield start, {slot: gate for slot, gate in gates.items() if gate}


def _always_fits(dtype: torch.dtype) -> float:
    """Return a delta size below which a sum with any finite base stays finite: half an ulp."""
    limits = torch.finfo(dtype)
    return limits.max * limits.eps / 4


def _beyond_work(gates: Mapping[str, float], sizes: Sizes) -> str | None:
    """Return what overflows float32 before it is rounded to the layer's dtype."""
    most = torch.finfo(_WORK).max
    for slot, gate in gates.items():
        for what, size in (("factor on", abs(gate)), ("size of", sizes[slot].delta)):
            if not size <= most:
                return f"the {what} the delta of {slot} {_too_large(size, _WORK)}"
    return None


def _largest_sum(
    target: Target,
    gates: Mapping[str, float],
    dtype: torch.dtype,
    base: torch.Tensor | None = None,
) -> float | None:
    """Return the largest magnitude of base + deltas that a dtype cannot hold, or None."""
    home = home_of_float64(target.origin.device)
    with torch.inference_mode():
        start = torch.zeros(1, 1, dtype=dtype) if base is None else base.reshape(len(base), -1)
        total = start = start.to(home)
        for slot, gate in gates.items():
            total = total + gate * target.entry.factors[slot].delta.in_float64(home).matrix()
        wrong = start.isfinite() & ~total.to(dtype).isfinite()
        return float(total[wrong].abs().max()) if wrong.any() else None


def _factors_fit(delta: LowRank, largest: Largest, dtype: torch.dtype) -> bool:
    """Return whether a dtype can hold the balanced factors (:func:`balanced`)."""
    most = torch.finfo(dtype).max
    down, up = largest.parts
    if down <= most and up <= most and 2 * down * up <= most**2:
        return True
    even = delta.to(dtype=_WORK).balanced().to(dtype=dtype)
    return is_finite(even.down) and is_finite(even.up)


def _too_large(size: float, dtype: torch.dtype) -> str:
    return f"would reach {size:.4g}, and {_name(dtype)} holds {torch.finfo(dtype).max:.4g}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
