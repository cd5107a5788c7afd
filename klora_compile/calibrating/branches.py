"""Branches with coefficients that autograd sees: what a fusion adds to the plain sum of its LoRAs.

The plain sum is written into the layers. A branch adds (c - 1) times the output of one LoRA's
delta, so at c = 1 it adds nothing, and biases, norms and text encoders stay as in the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from klora_compile.reading.layers import Layer
from klora_runtime.artifact.delta import Dense, LowRank
from klora_runtime.artifact.schedule import STEPLESS
from klora_runtime.layers.additions import Kind, kind_of
from klora_runtime.layers.targets import REAL_DTYPES


@dataclass(frozen=True)
class Branch:
    """The deltas of one layer, in the module's own computation."""

    name: str
    """Name of the layer."""
    module: nn.Module
    kind: Kind
    slots: tuple[str, ...]
    """LoRAs that change the layer."""
    columns: tuple[int, ...]
    """Place of each slot's coefficient among all coefficients."""
    ranks: tuple[int, ...]
    """Rank of each slot's factors; 0 for a dense delta."""
    down: torch.Tensor | None
    """Factors of all slots that have some, one below the other."""
    up: torch.Tensor | None
    dense: Mapping[str, torch.Tensor]

    def added(self, x: torch.Tensor, result: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return the module's result with the deltas at coefficients c - 1.

        Args:
            x: the module's input.
            result: its output.
            c: all coefficients.
        """
        more = c[list(self.columns)] - 1.0
        if self.down is not None and self.up is not None:
            gate = torch.cat(
                [one.expand(rank) for one, rank in zip(more, self.ranks, strict=True) if rank]
            )
            result = self.kind.factors(
                self.module, x, result, self.down, self.up, gate.to(self.down)
            )
        for slot, delta in self.dense.items():
            factor = more[self.slots.index(slot)].to(delta)
            result = self.kind.dense(self.module, x, result, factor * delta)
        return result


def branches_of(
    models: Mapping[str, nn.Module], layers: Mapping[str, Mapping[str, Layer]]
) -> list[Branch]:
    """Return a branch for each weight of a denoiser that has one or more deltas.

    Args:
        models: the denoisers by name.
        layers: slot -> layer name -> layer, with the weights of its LoRA in its scaling.
    """
    found: list[Branch] = []
    count = 0
    for name in sorted({name for own in layers.values() for name in own}):
        own = {slot: each[name] for slot, each in layers.items() if name in each}
        own = {slot: layer for slot, layer in own.items() if layer.scaling * layer.delta.norm()}
        first = next(iter(own.values()), None)
        if first is None or first.parameter != "weight" or first.component in STEPLESS:
            continue
        module = models[first.component].get_submodule(first.module)
        kind = kind_of(type(module))
        if kind is not None:
            columns = tuple(range(count, count + len(own)))
            found.append(_branch(name, module, kind, own, columns))
            count += len(own)
    return found


def _branch(
    name: str, module: nn.Module, kind: Kind, own: Mapping[str, Layer], columns: tuple[int, ...]
) -> Branch:
    weight: Any = module.weight
    place = {"device": weight.device, "dtype": weight.dtype if _computes(weight) else torch.float32}
    downs, ups, ranks, dense = [], [], [], {}
    for slot, layer in own.items():
        delta = layer.delta
        out, inner, *kernel = layer.shape
        kernel = (kernel or [1] * kind.kernel)[: kind.kernel]
        if isinstance(delta, LowRank):
            downs.append(delta.down.float().reshape(delta.rank, inner, *kernel).to(**place))
            ups.append((layer.scaling * delta.up.float().flatten(1)).T.to(**place))
            ranks.append(delta.rank)
        else:
            assert isinstance(delta, Dense)
            values = layer.scaling * delta.values.float()
            dense[slot] = values.reshape(out, inner, *kernel).to(**place)
            ranks.append(0)
    down = torch.cat(downs) if downs else None
    up = torch.cat(ups) if ups else None
    return Branch(name, module, kind, tuple(own), columns, tuple(ranks), down, up, dense)


def _computes(weight: torch.Tensor) -> bool:
    return weight.dtype in REAL_DTYPES


@contextmanager
def branching(branches: Sequence[Branch], c: torch.Tensor) -> Iterator[None]:
    """Let all branches act inside the block.

    Args:
        branches: from :func:`branches_of`.
        c: a coefficient per slot and layer, by :attr:`Branch.columns`.
    """
    with ExitStack() as stack:
        for branch in branches:

            def acting(_: Any, args: Any, result: Any, branch: Branch = branch) -> torch.Tensor:
                return branch.added(args[0], result, c)

            stack.callback(branch.module.register_forward_hook(acting).remove)
        yield
