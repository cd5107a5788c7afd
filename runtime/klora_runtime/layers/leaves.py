"""Branched leaf modules: the part of mode branch that acts on layers.

Each leaf computes ``y = base(x) + up @ (gate * (down @ x))`` with the slots that act now
concatenated. It needs only the output of the base, so it also works if weights are quantised,
offloaded or too coarse to hold a delta. A switch copies the factors that act next and writes the
gates of all layers, which are views of one small tensor. Dense deltas are summed at a switch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from klora_runtime.artifact.timeline import Agenda
from klora_runtime.errors import InUseError
from klora_runtime.layers.additions import Addition
from klora_runtime.layers.branch_factors import (
    buffer_shapes,
    low_rank,
    pairs_of,
    portions,
)
from klora_runtime.layers.dense_sum import DenseSum, dense_slots
from klora_runtime.layers.execution import compute_dtype, execution_device
from klora_runtime.layers.gates import Gates
from klora_runtime.layers.hindrances import branch_hindrance, recheck
from klora_runtime.layers.leaf import attach, calls_of, detach, is_branched
from klora_runtime.layers.overflow import leaf_overflow, refuse_overflow, sizes_of
from klora_runtime.layers.rounding import Rounding, factor_rounding
from klora_runtime.layers.targets import Target
from klora_runtime.layers.turns import Pair, Turns, rank_in_turns

#: Ranks are padded to a multiple of this, so that similar ranks share buffers and compiled graphs.
_RANK_STEP = 8

_Place = tuple[torch.device, torch.dtype]


@dataclass
class _Leaf:
    """A branched module and its buffers, which are zero beyond the ranks in use."""

    target: Target
    down: torch.Tensor
    """(padded rank, in), or (padded rank, in, height, width)."""
    up: torch.Tensor
    """(padded rank, out)."""
    gate: torch.Tensor
    """(padded rank,), a view into the gates of its device and dtype."""
    dense: DenseSum | None
    """The sum of its dense deltas; None if it has none."""

    @property
    def addition(self) -> Addition:
        dense = None if self.dense is None else self.dense.buffer
        if not len(self.gate):
            return Addition(None, None, None, dense)
        return Addition(self.down, self.up, self.gate, dense)

    @property
    def place(self) -> _Place:
        return self.down.device, self.down.dtype


class Leaves:
    """A set of branched layers that add sum of scale * coefficient * weight * delta @ x.

    Args:
        targets: layers without a :func:`~klora_runtime.layers.hindrances.branch_hindrance`.
        previous: the leaves on the same model that these replace. Where layers and ranks match,
            their buffers are reused, so that compiled code stays valid.
    """

    def __init__(self, targets: Sequence[Target], previous: Leaves | None = None) -> None:
        self._targets = list(targets)
        self._sizes = sizes_of(targets)
        self._agenda = Agenda([target.entry.timeline for target in targets])
        self._progress: float | None = None  # None: the gates' contents are unknown
        self._filled = False
        self._attached = False
        self._gates: dict[_Place, Gates] = {}
        self._leaves: list[_Leaf] = []
        self._turns: list[Turns] = []  # for layers whose slots take turns
        if previous is not None and previous._holds(self._targets):
            self._gates = previous._gates
            self._leaves = [
                _Leaf(target, leaf.down, leaf.up, leaf.gate, leaf.dense)
                for target, leaf in zip(targets, previous._leaves, strict=True)
            ]
        else:
            self._allocate()

    @property
    def paths(self) -> tuple[str, ...]:
        """The targets' paths."""
        return tuple(target.path for target in self._targets)

    @property
    def switches(self) -> int:
        """Number of single-layer switches in one run from progress 0 to 1."""
        return len(self._agenda)

    def write(self, progress: float, weights: Mapping[str, float]) -> None:
        """See :meth:`Mode.write`."""
        self.check()
        refuse_overflow(self.overflows(weights))
        self._progress = None
        with torch.no_grad():
            self._fill()
            for place, leaves in self._by_place().items():
                timelines = [leaf.target.entry.timeline for leaf in leaves]
                slots = [_slots(leaf.target, weights) for leaf in leaves]
                self._gates[place].load(timelines, slots)
            for leaf in self._leaves:
                if leaf.dense is not None:
                    leaf.dense.load(weights)
            for turns in self._turns:
                turns.forget()
            self._show(progress)
        for leaf in self._leaves:
            attach(leaf.target.module, leaf.addition)
        self._attached = True

    def move(self, progress: float, weights: Mapping[str, float]) -> None:
        """See :meth:`Mode.move`."""
        if self._progress is None:  # an earlier write was interrupted
            self.write(progress, weights)
        elif self._agenda.between(self._progress, progress):
            with torch.no_grad():
                self._show(progress)
        else:
            self._progress = progress

    def pause(self) -> None:
        """See :meth:`Mode.pause`. Layers stay branched with gates of 0: nothing is recompiled."""
        self.check()
        self._close()

    def release(self) -> None:
        """See :meth:`Mode.release`."""
        recheck(self._targets, self._hindrance)
        self._progress = None  # an interrupted release leaves some leaves detached
        self._attached = False
        for target in self._targets:
            detach(target.module)
        self._leaves.clear()  # the leaves first, so that nothing can be attached again
        self._turns.clear()
        self._gates.clear()
        self._targets.clear()
        self._sizes.clear()

    def yield_to(self, other: Leaves) -> None:
        """See :meth:`Mode.yield_to`."""
        self.check()
        self._filled = self._attached = False
        self._turns.clear()
        kept = set(other.paths)
        for target in self._targets:
            if target.path not in kept:
                detach(target.module)

    def check(self) -> None:
        """See :meth:`Mode.check`. Follow a model that was moved or converted."""
        recheck(self._targets, self._hindrance)
        if self.follow():
            self._close()  # attached leaves use these gates until the next write
            self._allocate()
        if self._attached:
            for target in self._targets:
                calls_of(target.module).forget()

    def follow(self) -> bool:
        """See :meth:`Mode.follow`."""
        return any(_place(leaf.target) != leaf.place for leaf in self._leaves)

    def overflows(self, weights: Mapping[str, float]) -> Iterator[str]:
        """See :meth:`Mode.overflows`."""
        for leaf, sizes in zip(self._leaves, self._sizes, strict=True):
            issue = leaf_overflow(leaf.target, leaf.down.dtype, sizes, weights)
            if issue is not None:
                yield issue

    def confirm(self, model: nn.Module) -> None:
        """See :meth:`Mode.confirm`. Layers that are neither called nor read are ignored.

        Such layers do nothing in the base either: of 210 pipelines of diffusers 0.42.1 whose
        branches equal the literal rule, 7 have some. They are Flux.2 Klein's guidance embedding
        (3 pipelines), HiDream's last caption projection, the local embedding of Stable Audio 3
        (2), and AnyFlow's patches of earlier chunks, which are called only later.
        """
        own = [leaf.target for leaf in self._leaves if leaf.target.model is model]
        known = [(target, calls_of(target.module)) for target in own] if self._attached else []
        skipped = [target.layer for target, calls in known if calls.read and not calls.called]
        if skipped:
            raise InUseError(
                f"{len(skipped)} layers carry a branch and were not called, but their weight was "
                "read by something else, so the fusion does not act there. Apply the fusion with "
                "mode='merge', or leave these layers out.",
                tuple(skipped),
            )

    def nbytes(self) -> dict[str, int]:
        """See :meth:`Mode.nbytes`."""
        places: Counter[str] = Counter()
        for leaf in self._leaves:
            places[f"factors on {leaf.down.device}"] += leaf.down.nbytes + leaf.up.nbytes
            if leaf.dense is not None:
                places[f"deltas on {leaf.down.device}"] += leaf.dense.nbytes
        for turns in self._turns:
            places[f"factors on {turns.device}"] += turns.nbytes
        for (device, _), gates in self._gates.items():
            places[f"gates on {device}"] += gates.nbytes
        return dict(places)

    def rounding(self, weights: Mapping[str, float]) -> Iterator[Rounding]:
        """See :meth:`Mode.rounding`."""
        for leaf in self._leaves:
            yield factor_rounding(leaf.target, leaf.down.dtype, weights)

    def _allocate(self) -> None:
        """Allocate buffers and gates on the modules' devices; attach nothing yet."""
        ranks = _padded_ranks(self._targets)
        places: defaultdict[_Place, list[int]] = defaultdict(list)
        for index, target in enumerate(self._targets):
            places[_place(target)].append(index)
        self._gates = {}
        leaves: dict[int, _Leaf] = {}
        with torch.inference_mode(False):
            for (device, dtype), indices in places.items():
                gates = Gates([ranks[index] for index in indices], device, dtype)
                self._gates[device, dtype] = gates
                for place, index in enumerate(indices):
                    target, rank = self._targets[index], ranks[index]
                    down, up = buffer_shapes(target, rank)
                    leaves[index] = _Leaf(
                        target,
                        torch.zeros(down, device=device, dtype=dtype),
                        torch.zeros(up, device=device, dtype=dtype),
                        gates.of(place),
                        DenseSum(target, device, dtype) if dense_slots(target) else None,
                    )
        self._leaves = [leaves[index] for index in range(len(self._targets))]
        self._filled = False

    def _holds(self, targets: Sequence[Target]) -> bool:
        """Return whether the buffers of these leaves also fit other targets."""
        return self.paths == tuple(target.path for target in targets) and all(
            _rank(target) <= len(leaf.gate)
            and _place(target) == leaf.place
            and buffer_shapes(target, len(leaf.gate)) == (leaf.down.shape, leaf.up.shape)
            and (leaf.dense is None) == (not dense_slots(target))
            for target, leaf in zip(targets, self._leaves, strict=True)
        )

    def _by_place(self) -> dict[_Place, list[_Leaf]]:
        places: defaultdict[_Place, list[_Leaf]] = defaultdict(list)
        for leaf in self._leaves:
            places[leaf.place].append(leaf)
        return dict(places)

    def _fill(self) -> None:
        """Copy the factors of all slots to their devices, a portion at a time."""
        if self._filled:
            return
        self._close()
        self._turns.clear()
        for (device, dtype), leaves in self._by_place().items():
            for leaf in leaves:
                if leaf.dense is not None:
                    leaf.dense.fill(leaf.target)
            rest = iter(leaves)
            for targets in portions([leaf.target for leaf in leaves]):
                for pairs in pairs_of(targets, device, dtype):
                    self._place_factors(next(rest), pairs)
        self._filled = True

    def _place_factors(self, leaf: _Leaf, pairs: Mapping[str, Pair]) -> None:
        """Put factors into the buffers if they stay there; else let them wait for their turn."""
        leaf.down.zero_()
        leaf.up.zero_()
        turns = Turns(leaf.target.entry.timeline, pairs, (leaf.down, leaf.up))
        if turns.change:
            self._turns.append(turns)
            return
        for buffer, values in turns.due(0.0):
            buffer.copy_(values)

    def _hindrance(self, target: Target) -> str | None:
        if self._attached and not is_branched(target.module):
            name = type(target.module).__name__
            return f"its class was changed to {name}; put that on before the fusion"
        return branch_hindrance(target)

    def _show(self, progress: float) -> None:
        self._progress = None
        copies = [copy for turns in self._turns for copy in turns.due(progress)]
        if copies:
            places, values = zip(*copies, strict=True)
            torch._foreach_copy_(places, values)
        for gates in self._gates.values():
            gates.show(progress)
        for leaf in self._leaves:
            if leaf.dense is not None:
                leaf.dense.show(progress)
        self._progress = progress

    def _close(self) -> None:
        self._progress = None
        with torch.no_grad():
            for gates in self._gates.values():
                gates.close()
            for leaf in self._leaves:
                if leaf.dense is not None:
                    leaf.dense.close()


def _place(target: Target) -> _Place:
    return execution_device(target), compute_dtype(target)


def _rank(target: Target) -> int:
    """Return the greatest number of ranks that act at the same time."""
    ranks = {slot: delta.rank for slot, delta in low_rank(target).items()}
    return rank_in_turns(target.entry.timeline, ranks)


def _padded_ranks(targets: Sequence[Target]) -> list[int]:
    """Return the padded rank of each target, equal in all blocks that share compiled code."""
    keys = [_graph_key(target) for target in targets]
    ranks: Counter[str] = Counter()
    for key, target in zip(keys, targets, strict=True):
        ranks[key] = max(ranks[key], -(-_rank(target) // _RANK_STEP) * _RANK_STEP)
    return [ranks[key] for key in keys]


def _graph_key(target: Target) -> str:
    """Return a key that is equal for the same layer of blocks that share compiled code."""
    repeated = target.host.repeated_blocks(target.model)
    for depth, module in enumerate(target.lineage):
        if type(module).__name__ in repeated:
            return ".".join([target.entry.component, type(module).__name__, *target.names[depth:]])
    return target.path


def _slots(target: Target, weights: Mapping[str, float]) -> list[tuple[str, int, float]]:
    """Return name, rank, and scale * weight of each slot, in the order of the buffers."""
    return [
        (slot, delta.rank, target.entry.factors[slot].scale * weights.get(slot, 1.0))
        for slot, delta in low_rank(target).items()
    ]
