"""Mode *merge*: the live weights always hold base + what the timelines say, at no cost per step.

Every write starts from the pristine base and goes into the live tensor's own storage: nothing
is ever subtracted, so nothing drifts, and no pointer changes, so compiled graphs stay valid.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from klora_runtime.modes.pristine import Pristine
from klora_runtime.precision import full_float32
from klora_runtime.targets import Target, ancestors, recheck, refuse
from klora_runtime.timeline import Agenda, Timeline

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class _Term:
    """One slot of one layer, ready to multiply: delta = scale * up @ down."""

    slot: str
    scale: float
    down: torch.Tensor
    """(rank, in * kernel), float32, on the layer's device."""
    up: torch.Tensor
    """(out, rank), float32, on the layer's device."""


@dataclass
class _Layer:
    target: Target
    terms: list[_Term]
    segment: int = 0

    @property
    def timeline(self) -> Timeline:
        return self.target.entry.timeline


class Merge:
    """Holds a set of targets at base + sum of scale * coefficient * weight * up @ down.

    Creating one checks that every parameter can be written and allocates what the writes need;
    it changes no weight until :meth:`write`.

    Args:
        targets: the layers to change.
        previous: a merge on the same pipeline that this one is to follow; its copies of the base
            values are used again, for the live weights are not the base now.

    Raises:
        IncompatibleModelError: a parameter cannot be merged into; ``issues`` lists every one.
    """

    name = "merge"

    def __init__(self, targets: Sequence[Target], previous: Merge | None = None) -> None:
        refuse(
            _hindrances(targets),
            "these weights cannot be merged into; nothing was changed. Load the model unquantised "
            "in float32, float16 or bfloat16.",
        )
        self._pristine: Pristine = Pristine(
            targets, previous._pristine if previous is not None else None
        )
        self._layers = [_Layer(target, list(_terms(target))) for target in targets]
        self._agenda = Agenda([layer.timeline for layer in self._layers])
        self._progress: float | None = None  # None: what the weights hold is not known
        self._scratch: dict[torch.device, torch.Tensor] = {}
        for layer in self._layers:
            if not _direct(layer.target.parameter.data):
                self._scratch_for(layer.target.parameter.data)

    @property
    def paths(self) -> tuple[str, ...]:
        """The targets' paths."""
        return tuple(layer.target.path for layer in self._layers)

    @property
    def switches(self) -> int:
        """How many single-layer switches one run from progress 0 to 1 makes."""
        return len(self._agenda)

    def write(self, progress: float, weights: Mapping[str, float]) -> None:
        """Write every layer for ``progress``, each slot times its weight (missing: 1)."""
        self.check()
        self._write_layers(range(len(self._layers)), progress, weights)

    def move(self, progress: float, weights: Mapping[str, float]) -> None:
        """Write the layers whose timeline has a breakpoint between the last progress and this."""
        if self._progress is None:  # an earlier write was interrupted
            self.write(progress, weights)
        else:
            changed = self._agenda.between(self._progress, progress)
            self._write_layers(changed, progress, weights)

    def pause(self) -> None:
        """See :meth:`Mode.pause`."""
        self.check()
        self._progress = None
        self._pristine.restore(self.paths)

    def release(self) -> None:
        """See :meth:`Mode.release`."""
        self.pause()
        self._pristine.forget()
        self._layers.clear()
        self._scratch.clear()

    def successor(self, targets: Sequence[Target]) -> Merge:
        """See :meth:`Mode.successor`."""
        return Merge(targets, previous=self)

    def yield_to(self, other: Merge) -> None:
        """See :meth:`Mode.yield_to`."""
        self.check()
        self._progress = None
        self._pristine.restore(set(self.paths) - set(other.paths))

    def nbytes(self) -> dict[str, int]:
        """See :meth:`Mode.nbytes`."""
        places = Counter(
            {f"base weights on {d}": n for d, n in self._pristine.nbytes_by_place().items()}
        )
        for layer in self._layers:
            for term in layer.terms:
                places[f"factors on {term.down.device}"] += term.down.nbytes + term.up.nbytes
        for device, buffer in self._scratch.items():
            places[f"scratch on {device}"] += buffer.nbytes
        return dict(places)

    def rounding(self, weights: Mapping[str, float]) -> float:
        """Error of the deltas as the weights' dtype holds them, relative to the exact deltas.

        Over all layers and segments: ||held - exact||_F / ||exact||_F, where held is
        round(base + delta) - base. 0 is exact; in bfloat16 a small delta can lose half of itself.
        Computes every delta once more; nothing is kept.
        """
        errors, norms = [], []
        with torch.inference_mode(), full_float32():
            for layer in self._layers:
                parameter = layer.target.parameter.data
                base = self._pristine.of(layer.target).to(parameter.device).double()
                for segment in range(len(layer.timeline.starts)):
                    delta = _delta(_scaled(layer, segment, weights), parameter)
                    if delta is None:
                        continue
                    held = (base + delta).to(parameter.dtype).double() - base
                    errors.append(float((held - delta).square().sum()))
                    norms.append(float(delta.square().sum()))
        total = math.fsum(norms)
        return math.sqrt(math.fsum(errors) / total) if total else 0.0

    def check(self) -> None:
        """See :meth:`Mode.check`."""
        recheck((layer.target for layer in self._layers), _hindrance)

    def _write_layers(
        self, indices: Iterable[int], progress: float, weights: Mapping[str, float]
    ) -> None:
        self._progress = None
        with torch.inference_mode(), full_float32():
            for index in indices:
                layer = self._layers[index]
                layer.segment = layer.timeline.segment(progress)
                self._write_layer(layer, weights)
        self._progress = progress

    def _write_layer(self, layer: _Layer, weights: Mapping[str, float]) -> None:
        live = layer.target.parameter.data
        base = self._pristine.of(layer.target)
        terms = _scaled(layer, layer.segment, weights)
        if not terms:
            live.copy_(base)
            return
        for term, _ in terms:
            if term.down.device != live.device:  # the model was moved
                term.down, term.up = term.down.to(live.device), term.up.to(live.device)
        (first, factor), rest = terms[0], terms[1:]
        rows = live.shape[0]
        if _direct(live) and base.device == live.device:
            result = live.view(rows, -1)
            torch.addmm(base.view(rows, -1), first.up, first.down, alpha=factor, out=result)
            for term, factor in rest:
                result.addmm_(term.up, term.down, alpha=factor)
            return
        result = self._scratch_for(live)[: live.numel()].view(rows, -1)
        torch.mm(first.up, first.down, out=result)
        result.mul_(factor)
        for term, factor in rest:
            result.addmm_(term.up, term.down, alpha=factor)
        result.add_(base.to(live.device).reshape(rows, -1))
        live.copy_(result.view(live.shape))

    def _scratch_for(self, live: torch.Tensor) -> torch.Tensor:
        """A float32 buffer on the tensor's device, large enough for it; reused by all layers."""
        buffer = self._scratch.get(live.device)
        if buffer is None or buffer.numel() < live.numel():
            buffer = torch.empty(live.numel(), dtype=torch.float32, device=live.device)
            self._scratch[live.device] = buffer
        return buffer


def _terms(target: Target) -> Iterator[_Term]:
    device = target.parameter.device
    for slot, factors in target.entry.factors.items():
        down = factors.down.to(device, torch.float32).flatten(1).contiguous()
        up = factors.up.to(device, torch.float32).flatten(1).contiguous()
        yield _Term(slot, factors.scale, down, up)


def _scaled(layer: _Layer, segment: int, weights: Mapping[str, float]) -> list[tuple[_Term, float]]:
    """The terms that act in ``segment``, each with scale * coefficient * weight."""
    row = layer.timeline.row(segment)
    scaled = [
        (term, term.scale * row.get(term.slot, 0.0) * weights.get(term.slot, 1.0))
        for term in layer.terms
    ]
    return [(term, factor) for term, factor in scaled if factor != 0.0]


def _delta(terms: list[tuple[_Term, float]], like: torch.Tensor) -> torch.Tensor | None:
    total: torch.Tensor | None = None
    for term, factor in terms:
        delta = (term.up.double() @ term.down.double()).mul_(factor).to(like.device)
        total = delta if total is None else total.add_(delta)
    return None if total is None else total.view(like.shape)


def _direct(live: torch.Tensor) -> bool:
    """Whether a product can be written straight into the tensor's storage as (rows, -1)."""
    return live.dtype == torch.float32 and live.is_contiguous()


def _hindrances(targets: Sequence[Target]) -> Iterator[str]:
    """What keeps targets from being merged into, one sentence each."""
    models = {id(target.model): target.model for target in targets}.values()
    owners = Counter(
        _storage(parameter)
        for model in models
        for _, parameter in model.named_parameters(remove_duplicate=False)
    )
    for target in targets:
        problem = _hindrance(target)
        if problem is None and owners[_storage(target.parameter)] > 1:
            problem = "it shares its weight's memory with another layer"
        if problem is not None:
            yield f"{target.layer}: {problem}"


def _hindrance(target: Target) -> str | None:
    """What keeps one target from being written, or None; cheap enough for every run."""
    parameter = target.parameter
    if type(parameter.data) is not torch.Tensor:
        return f"its weight is a {type(parameter.data).__name__}, not a plain tensor"
    if parameter.dtype not in _DTYPES:
        return f"its weight is {parameter.dtype}"
    if parameter.device.type == "meta":
        return "its weight has no memory (meta device): sequential offloading is on"
    if parameter.layout is not torch.strided or not _dense(parameter):
        return "its weight is not a dense strided tensor"
    if any(map(_group_offloaded, ancestors(target))):
        return "group offloading keeps its own copy of the weight; switch it off first"
    return None


def _storage(parameter: torch.nn.Parameter) -> int:
    if type(parameter.data) is not torch.Tensor or parameter.device.type == "meta":
        return id(parameter)
    return parameter.untyped_storage().data_ptr()


def _dense(tensor: torch.Tensor) -> bool:
    """No two elements share memory, and there are no holes."""
    expected = 1
    for stride, size in sorted(
        (stride, size)
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if size > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _group_offloaded(module: torch.nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and "group_offloading" in getattr(registry, "hooks", {})
