"""Mode *merge*: the live weights hold base + the deltas that act now, at no cost per step.

Every write starts from the pristine base and goes into the live tensor's own storage. Nothing is
subtracted, so nothing drifts; no pointer changes, so compiled graphs stay valid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from klora_runtime.artifact.timeline import Agenda, Timeline
from klora_runtime.devices.device_types import type_of
from klora_runtime.devices.names import HOST
from klora_runtime.devices.precision import full_float32
from klora_runtime.errors import InUseError
from klora_runtime.layers.groups import Group, Write, groups_of
from klora_runtime.layers.hindrances import merge_hindrance, merge_hindrances, recheck
from klora_runtime.layers.overflow import refuse_overflow, sizes_of, weight_overflow
from klora_runtime.layers.pristine.values import Pristine
from klora_runtime.layers.rounding import Rounding, weight_rounding
from klora_runtime.layers.targets import Target, refuse
from klora_runtime.layers.terms import Term, terms_of


@dataclass
class _Layer:
    target: Target
    terms: list[Term]
    device: torch.device
    """Device of the terms."""

    @property
    def timeline(self) -> Timeline:
        return self.target.entry.timeline

    @property
    def was_moved(self) -> bool:
        return self.device != self.target.origin.device


class Merge:
    """Mode merge on a set of targets: holds base + sum of scale * coefficient * weight * delta.

    The constructor checks that every parameter can be written and allocates memory for the writes.
    No weight changes before :meth:`write`.

    Args:
        targets: the layers to change.
        previous: the merge on the same model that this one replaces. Its copies of the base values
            are reused, because the live weights hold deltas now.
        whole: whether this is a mode of its own, not a part of mode branch.

    Raises:
        IncompatibleModelError: a parameter cannot be merged into; ``issues`` lists all of them.
    """

    name = "merge"

    def __init__(
        self, targets: Sequence[Target], previous: Merge | None = None, *, whole: bool = True
    ) -> None:
        known = set() if previous is None else set(previous.paths)  # each change checks these
        refuse(
            merge_hindrances([target for target in targets if target.path not in known]),
            "these weights cannot be merged into; nothing was changed. Use mode='branch', or load "
            "the model unquantised in float32, float16 or bfloat16.",
        )
        self._pristine: Pristine = Pristine(
            targets, previous._pristine if previous is not None else None
        )
        self._layers = [
            _Layer(target, terms, target.origin.device)
            for target, terms in zip(targets, terms_of(targets), strict=True)
        ]
        self._sizes = sizes_of(targets)
        self._scratch: dict[torch.device, torch.Tensor] = {}
        self._groups: list[tuple[Group, list[int]]] = []
        self._group()
        self._agenda = Agenda([layer.timeline for layer in self._layers])
        self._progress: float | None = None  # None: the weights' contents are unknown
        self._guards: list[RemovableHandle] = []  # see _refusing_state; empty while paused
        self._whole = whole
        for layer in self._layers:
            origin = layer.target.origin
            if not _direct(origin):
                self._scratch_for(origin.numel(), origin.device)

    @property
    def paths(self) -> tuple[str, ...]:
        """The targets' paths."""
        return tuple(layer.target.path for layer in self._layers)

    @property
    def switches(self) -> int:
        """Number of single-layer switches in one run from progress 0 to 1."""
        return len(self._agenda)

    @property
    def writes(self) -> bool:
        """See :attr:`Mode.writes`."""
        return True

    def write(self, progress: float, weights: Mapping[str, float]) -> None:
        """Write every layer for ``progress``; a slot without a weight has weight 1."""
        self.check()
        refuse_overflow(self.overflows(weights))
        self._pristine.resume()
        self._guard()
        self._write_layers(range(len(self._layers)), progress, weights)

    def move(self, progress: float, weights: Mapping[str, float]) -> None:
        """Write the layers that have a breakpoint between the last progress and this one."""
        if self._progress is None:  # an earlier write was interrupted
            self.write(progress, weights)
        else:
            changed = self._agenda.between(self._progress, progress)
            if changed:
                self._write_layers(changed, progress, weights)
            self._progress = progress

    def confirm(self, model: nn.Module) -> None:
        """See :meth:`Mode.confirm`. The weight itself holds the delta, so no read can miss it."""

    def pause(self) -> None:
        """See :meth:`Mode.pause`."""
        self.check()
        self._progress = None
        self._pristine.restore(self.paths)
        self._unguard()
        self._pristine.rest()

    def release(self) -> None:
        """See :meth:`Mode.release`."""
        self.pause()
        self._layers.clear()  # the layers first, so that nothing can be written again
        self._sizes.clear()
        self._groups.clear()
        self._scratch.clear()
        self._pristine.forget()

    def successor(self, targets: Sequence[Target]) -> Merge:
        """See :meth:`Mode.successor`."""
        return Merge(targets, previous=self)

    def yield_to(self, other: Merge) -> None:
        """See :meth:`Mode.yield_to`."""
        self.check()
        self._progress = None
        self._pristine.restore(set(self.paths) - set(other.paths))
        self._unguard()

    def nbytes(self) -> dict[str, int]:
        """See :meth:`Mode.nbytes`."""
        places = Counter(
            {f"base weights on {d}": n for d, n in self._pristine.nbytes_by_place().items()}
        )
        grouped = {index for _, members in self._groups for index in members}
        for index, layer in enumerate(self._layers):
            if index not in grouped:
                places[f"factors on {layer.device}"] += sum(
                    term.delta.nbytes for term in layer.terms
                )
        for group, members in self._groups:  # a group pads ranks that differ
            places[f"factors on {self._layers[members[0]].device}"] += group.nbytes
        for device, buffer in self._scratch.items():
            places[f"scratch on {device}"] += buffer.nbytes
        if self._pristine.scratch_nbytes:
            places[f"scratch on {HOST}"] += self._pristine.scratch_nbytes
        return dict(places)

    def copied(self) -> Mapping[str, str]:
        """See :meth:`Mode.copied`."""
        return self._pristine.copied()

    def rounding(self, weights: Mapping[str, float]) -> Iterator[Rounding]:
        """See :meth:`Mode.rounding`."""
        for layer in self._layers:
            yield weight_rounding(layer.target, self._pristine.of(layer.target), weights)

    def follow(self) -> bool:
        """See :meth:`Mode.follow`. A base that was converted twice was rounded twice."""
        targets = [layer.target for layer in self._layers]
        converted = [target for target in targets if self._pristine.was_converted(target)]
        for target in converted:
            self._pristine.of(target)
            self._progress = None
        return bool(converted)

    def overflows(self, weights: Mapping[str, float]) -> Iterator[str]:
        """See :meth:`Mode.overflows`."""
        for layer, sizes in zip(self._layers, self._sizes, strict=True):
            issue = weight_overflow(layer.target, self._pristine.of, sizes, weights)
            if issue is not None:
                yield issue

    def check(self) -> None:
        """See :meth:`Mode.check`. Write everything again if the model was converted."""
        targets = [layer.target for layer in self._layers]
        recheck(targets, merge_hindrance)
        self._pristine.check()
        if any(map(self._pristine.was_converted, targets)):
            self._progress = None

    def _guard(self) -> None:
        """Make ``state_dict`` refuse weights that hold a delta."""
        if not self._guards:
            modules: list[Any] = [layer.target.module for layer in self._layers]
            refuse_state = _refusing_state(", or apply the fusion with mode='branch'" * self._whole)
            self._guards = [each.register_state_dict_pre_hook(refuse_state) for each in modules]

    def _unguard(self) -> None:
        for guard in self._guards:
            guard.remove()
        self._guards = []

    def _write_layers(
        self, indices: Iterable[int], progress: float, weights: Mapping[str, float]
    ) -> None:
        self._progress = None
        with torch.inference_mode(), full_float32():
            self._follow(indices)
            factors = {i: _scaled(self._layers[i], progress, weights) for i in indices}
            for group, members in self._groups:
                own = [i for i in members if factors.get(i) and self._is_groupable(i)]
                if own:
                    writes = [self._write_of(i, factors.pop(i)) for i in own]
                    group.write(writes, self._scratch_for)
            for index, own_factors in factors.items():
                self._write_alone(self._write_of(index, own_factors))
            for index in indices:
                self._layers[index].target.publish()
        self._progress = progress

    def _write_of(self, index: int, factors: Sequence[tuple[Term, float]]) -> Write:
        target = self._layers[index].target
        return Write(
            target.origin, self._pristine.of(target), factors, self._pristine.keeps(target)
        )

    def _is_groupable(self, index: int) -> bool:
        """Return whether the write of a layer of a group can be batched now."""
        target = self._layers[index].target
        return self._pristine.is_kept_on(target, target.origin.device)

    def _follow(self, indices: Iterable[int]) -> None:
        """Move the factors to the weights' devices if the model was moved."""
        moved = [layer for layer in map(self._layers.__getitem__, indices) if layer.was_moved]
        for layer in moved:
            layer.device = layer.target.origin.device
            for term in layer.terms:
                term.to(layer.device)
        if moved:
            self._group()

    def _group(self) -> None:
        """Group layers where that pays."""
        layers = {
            index: (layer.target.origin, layer.terms)
            for index, layer in enumerate(self._layers)
            if type_of(layer.device).grouped
            and self._pristine.is_kept_on(layer.target, layer.device)
        }
        with torch.inference_mode():
            self._groups = list(groups_of(layers))
        for group, members in self._groups:
            self._scratch_for(group.scratch_numel, self._layers[members[0]].device)

    def _write_alone(self, write: Write) -> None:
        live, base, terms = write.live, write.base, write.factors
        if not terms:
            live.copy_(base, non_blocking=write.is_kept)
            return
        (first, factor), rest = terms[0], terms[1:]
        rows = live.shape[0]
        if _direct(live) and base.device == live.device:
            result = live.view(rows, -1)
            first.write(result, factor, base.view(rows, -1))
        else:
            result = self._scratch_for(live.numel(), live.device).view(rows, -1)
            first.write(result, factor, None)
        for term, factor in rest:
            term.add(result, factor)
        if result.data_ptr() != live.data_ptr():
            if base.device != live.device:  # copy the base into the live weight first
                base = live.copy_(base, non_blocking=write.is_kept)
            live.copy_(result.view(live.shape).add_(base))

    def _scratch_for(self, numel: int, device: torch.device) -> torch.Tensor:
        """Return ``numel`` float32 elements on a device, in memory that all layers share."""
        buffer = self._scratch.get(device)
        if buffer is None or buffer.numel() < numel:
            buffer = torch.empty(numel, dtype=torch.float32, device=device)
            self._scratch[device] = buffer
        return buffer[:numel]


def _refusing_state(instead: str) -> Callable[..., None]:
    """Make a hook that refuses ``state_dict`` of a merged module or of a module around it."""

    def refuse_state(*_: Any) -> None:
        raise InUseError(
            "state_dict would hold the fused weights of one moment, for instance in a model made "
            "from this one. Call .remove() on the fusion's handle or set .enabled = False "
            f"first{instead}."
        )

    return refuse_state


def _scaled(
    layer: _Layer, progress: float, weights: Mapping[str, float]
) -> list[tuple[Term, float]]:
    """Return the terms that act at ``progress``, each with scale * coefficient * weight."""
    row = layer.timeline.at(progress)
    scaled = [
        (term, term.scale * row.get(term.slot, 0.0) * weights.get(term.slot, 1.0))
        for term in layer.terms
    ]
    return [(term, factor) for term, factor in scaled if factor != 0.0]


def _direct(live: torch.Tensor) -> bool:
    """Return whether a product can be written directly into the tensor's storage as (rows, -1)."""
    return live.dtype == torch.float32 and live.is_contiguous()
