"""The fit of coefficients: fused, the denoiser shall answer as it does with each LoRA alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import mse_loss

from klora_compile.calibrating.branches import Branch, branching
from klora_compile.calibrating.recording import Call, prediction
from klora_compile.rules.kit.calibrated import Descent
from klora_compile.slots import role_of
from klora_runtime.devices.precision import full_float32

#: Betas and epsilon of Adam; coefficients are few and their gradients noisy.
_BETAS, _EPSILON = (0.9, 0.98), 1e-8


@dataclass(frozen=True)
class Match:
    """A recorded call, and the distance that its loss is relative to."""

    call: Call
    size: float
    """Mean squared distance of the bare denoiser's answer from the LoRA's."""


def matches(
    models: Mapping[str, nn.Module], calls: Mapping[str, Sequence[Call]], descent: Descent
) -> list[dict[str, list[Match]]]:
    """Return, per phase, slot -> calls to match. The denoisers must be bare.

    The distance is averaged over the calls of a slot in a phase. Calls in which a LoRA changes
    nothing, or that come after its role's end, are left out.

    Args:
        models: name -> denoiser.
        calls: slot -> calls with its LoRA alone.
        descent: phases, and until when each role is matched.
    """
    phases: list[dict[str, list[Match]]] = [{} for _ in range(descent.phases)]
    for slot, own in calls.items():
        until = descent.until.get(role_of(slot), 1.0)
        parts: list[list[tuple[Call, float]]] = [[] for _ in phases]
        for call in own:
            if call.progress < until:
                place = min(int(call.progress * descent.phases), descent.phases - 1)
                with torch.no_grad():
                    distance = mse_loss(_answer(models, call), call.target.float()).item()
                parts[place].append((call, distance))
        for phase, found in zip(phases, parts, strict=True):
            mean = sum(distance for _, distance in found) / max(1, len(found))
            if mean > 0.0:
                phase[slot] = [Match(call, mean) for call, _ in found]
    return phases


@dataclass
class FitState:
    """Coefficients of all phases, and the state of Adam; ``tensors`` is all of it."""

    tensors: dict[str, torch.Tensor]
    """``c``, ``mean`` and ``square``, each (phases, coefficients), float32 on the CPU."""

    @classmethod
    def begin(cls, phases: int, coefficients: int) -> FitState:
        """Return the plain sum."""
        zeros = torch.zeros(phases, coefficients)
        return cls({"c": torch.ones_like(zeros), "mean": zeros, "square": zeros.clone()})

    def step(self, phase: int, gradient: torch.Tensor, rate: float, number: int) -> None:
        """Update one phase by Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1).

        Args:
            gradient: (coefficients,).
            rate: learning rate.
            number: of the update of this phase, from 1.
        """
        mean, square = self.tensors["mean"][phase], self.tensors["square"][phase]
        one, two = _BETAS
        mean.mul_(one).add_((1 - one) * gradient)
        square.mul_(two).add_((1 - two) * gradient.square())
        size = (square / (1 - two**number)).sqrt() + _EPSILON
        self.tensors["c"][phase] -= rate * (mean / (1 - one**number)) / size


def updates(
    fit: FitState,
    begin: int,
    phases: Sequence[Mapping[str, Sequence[Match]]],
    models: Mapping[str, nn.Module],
    branches: Sequence[Branch],
    descent: Descent,
    seed: int,
) -> Iterator[int]:
    """Go on with a fit, phase by phase in turn, and yield the number of updates so far.

    The plain sum must act on the denoisers. Each update takes one call of each LoRA; which one
    comes from the seed and the number of the update alone, so a fit can be interrupted anywhere.
    """
    total = descent.updates * descent.phases
    for number in range(begin, total):
        phase, turn = number % descent.phases, number // descent.phases
        chance = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        chosen = [
            own[int(torch.randint(len(own), (), generator=chance))]
            for own in phases[phase].values()
        ]
        if chosen:
            gradient = _gradient(fit.tensors["c"][phase], chosen, models, branches, descent.hold)
            rate = descent.rate * (1 - turn / descent.updates)
            fit.step(phase, gradient, rate, turn + 1)
        yield number + 1


def _gradient(
    c: torch.Tensor,
    chosen: Sequence[Match],
    models: Mapping[str, nn.Module],
    branches: Sequence[Branch],
    hold: float,
) -> torch.Tensor:
    leaf = c.clone().requires_grad_()
    gradient = hold * 2 * (c - 1) / c.numel()
    with torch.enable_grad(), full_float32(), branching(branches, leaf):
        for match in chosen:
            answer = _answer(models, match.call)
            loss = mse_loss(answer, match.call.target.float()) / match.size
            (found,) = torch.autograd.grad(loss, leaf)
            gradient = gradient + found
    return gradient


def _answer(models: Mapping[str, nn.Module], call: Call) -> torch.Tensor:
    return prediction(models[call.component](*call.args, **call.kwargs)).float()


@contextmanager
def frozen(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let no weight of the models ask for a gradient inside the block."""
    asking = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
