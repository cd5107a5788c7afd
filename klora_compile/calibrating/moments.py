"""Second moments: how each LoRA's own pictures reach the factors of all LoRAs in a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from klora_compile.planning.deriving import Derivation
from klora_compile.rules.kit.calibrated import Routing
from klora_compile.rules.rule import Derived
from klora_compile.threads import single_thread
from klora_runtime.artifact.delta import LowRank
from klora_runtime.artifact.schedule import STEPLESS
from klora_runtime.devices.precision import full_float32
from klora_runtime.layers.additions import kind_of


@dataclass(frozen=True)
class Meeting:
    """A layer that two LoRAs or more change by factors."""

    job: Derivation
    module: nn.Module
    down: torch.Tensor
    """(rank, in) or (rank, in, *kernel), of all LoRAs one below the other, where the module is."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each LoRA's factors."""
        return tuple(_factors(layer.delta).rank for layer in self.job.layers.values())

    def signals(self, x: torch.Tensor) -> torch.Tensor:
        """Return down x, (rank, columns) in float64, for an input of the module."""
        module: Any = self.module
        kind = kind_of(type(module))
        rank = len(self.down)
        if kind is None or kind.kernel == 0:
            return (x.to(self.down).reshape(-1, x.shape[-1]) @ self.down.T).T.double()
        nothing = x.new_zeros((), dtype=self.down.dtype)
        unit = torch.eye(rank, dtype=self.down.dtype, device=self.down.device)
        gate = self.down.new_ones(rank)
        seen: torch.Tensor = kind.factors(module, x.to(self.down), nothing, self.down, unit, gate)
        return seen.movedim(1, 0).flatten(1).double()


def meetings(models: Mapping[str, nn.Module], jobs: Sequence[Derivation]) -> list[Meeting]:
    """Return the layers of denoisers in which factors of two LoRAs or more meet."""
    found = []
    for job in jobs:
        first = next(iter(job.layers.values()))
        if first.parameter != "weight" or first.component in STEPLESS:
            continue
        if not all(isinstance(layer.delta, LowRank) for layer in job.layers.values()):
            continue
        module: Any = models[first.component].get_submodule(first.module)
        kind = kind_of(type(module))
        if kind is None or isinstance(module, nn.Embedding) or (kind.kernel and module.groups != 1):
            continue
        downs = [_factors(layer.delta).down.float() for layer in job.layers.values()]
        shape = (-1, downs[0].shape[1], *(downs[0].shape[2:] or (1,) * kind.kernel))
        down = torch.cat([each.reshape(shape) for each in downs])
        found.append(Meeting(job, module, down.to(module.weight.device)))
    return found


def no_moments(found: Sequence[Meeting]) -> dict[str, torch.Tensor]:
    """Return layer name -> zeros, (LoRAs, rank, rank), and the number of columns, (LoRAs,)."""
    state = {}
    for each in found:
        count, rank = len(each.job.layers), len(each.down)
        state[f"{each.job.name} moments"] = torch.zeros(count, rank, rank, dtype=torch.float64)
        state[f"{each.job.name} columns"] = torch.zeros(count, dtype=torch.float64)
    return state


@contextmanager
def adding(
    state: Mapping[str, torch.Tensor], found: Sequence[Meeting], slot: str
) -> Iterator[None]:
    """Add what reaches the layers inside the block to the moments of one LoRA, in place."""
    with ExitStack() as stack:
        for each in found:
            if slot not in each.job.layers:
                continue
            place = list(each.job.layers).index(slot)

            def heard(_: Any, args: Any, each: Meeting = each, place: int = place) -> None:
                z = each.signals(args[0])
                state[f"{each.job.name} moments"][place] += (z @ z.T).cpu()
                state[f"{each.job.name} columns"][place] += z.shape[1]

            stack.callback(each.module.register_forward_pre_hook(heard).remove)
        with full_float32():
            yield


def routed(
    rule: Routing, state: Mapping[str, torch.Tensor], found: Sequence[Meeting]
) -> dict[str, Derived]:
    """Return layer name -> the merged delta, with factors of the rank of all LoRAs together."""
    made = {}
    with single_thread():
        for each in found:
            sums = state[f"{each.job.name} moments"]
            columns = state[f"{each.job.name} columns"].clamp_min(1.0)
            route = rule.route(list(sums / columns[:, None, None]), each.ranks)
            ups = [
                layer.scaling * _factors(layer.delta).flattened().up.double()
                for layer in each.job.layers.values()
            ]
            downs = [_factors(layer.delta).down.float() for layer in each.job.layers.values()]
            up = (torch.cat(ups, 1) @ route).float()
            if downs[0].dim() > 2:
                up = up.reshape(*up.shape, *(1,) * (downs[0].dim() - 2))
            made[each.job.name] = Derived(LowRank(torch.cat(downs).contiguous(), up.contiguous()))
    return made


def _factors(delta: Any) -> LowRank:
    assert isinstance(delta, LowRank)
    return delta
