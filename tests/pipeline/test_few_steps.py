"""Few steps, with every kind of scheduler and by both clocks: latents equal the reference's.

``make test`` has each scheduler with each number of steps, by one of the clocks; the whole cross
product is slow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from reference import Clock, KLora, Level, progress_of_run, sampling
from support.copying import Copies
from support.families import ATTENTION, FamilyCase, lora_files, prompts, sd3, square
from support.generation import TOLERANCE, Case, build, generate
from support.pairs import slow
from tiny_pipeline import SD_BETAS, relative_difference

from klora_compile import compile_fusion
from klora_runtime import apply_fusion

STEPS = (1, 2, 4, 8)
CLOCKS: tuple[Clock, ...] = ("step", "noise")
MODES = ("merge", "branch")


@dataclass(frozen=True)
class Sampler:
    """A scheduler as people use it for few steps."""

    make: Callable[[], Any]
    level: Level = "training"


def _sd(kind: Any, **settings: Any) -> Sampler:
    return Sampler(functools.partial(kind, **SD_BETAS, **settings))


def _flow(kind: Any, **settings: Any) -> Sampler:
    return Sampler(functools.partial(kind, **settings), "flow")


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

SAMPLERS = {
    **{f"flow {s:g}": _flow(FlowMatchEulerDiscreteScheduler, shift=s) for s in (1.0, 3.0, 5.0)},
    "flow dynamic": _flow(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
    "flow Heun": _flow(FlowMatchHeunDiscreteScheduler, shift=3.0),
    "flow UniPC": _flow(UniPCMultistepScheduler, **_FLOW),
    "flow DPM++": _flow(DPMSolverMultistepScheduler, **_FLOW),
    "Euler trailing": _sd(EulerDiscreteScheduler, timestep_spacing="trailing"),
    "LCM": _sd(LCMScheduler),
    "TCD": _sd(TCDScheduler),
    "DDIM": _sd(DDIMScheduler, timestep_spacing="trailing", clip_sample=False),
    "PNDM": _sd(PNDMScheduler, skip_prk_steps=True, timestep_spacing="trailing"),
    "Heun Karras": _sd(HeunDiscreteScheduler, use_karras_sigmas=True, timestep_spacing="trailing"),
    "EDM": Sampler(EDMEulerScheduler, "sigma"),
}


@dataclass(frozen=True)
class Base:
    """A tiny pipeline with two LoRAs, and what is fused of them."""

    copies: Copies
    generate: Callable[[Any, int], torch.Tensor]
    klora: KLora
    fused: Copies

    def with_scheduler(self, name: str) -> Any:
        """A pipeline of the caller's own."""
        pipe = self.copies.make()
        pipe.scheduler = SAMPLERS[name].make()
        return pipe


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Base]:
    """Of flow matching, and of Stable Diffusion."""
    flow = FamilyCase("SD3", sd3, {**prompts(pooled=True), **square(64)}, ATTENTION)
    folder = tmp_path_factory.mktemp("bases")
    some = replace(flow, modules=("to_q", "to_v"))  # a UNet has many
    made = {}
    for is_flow in (True, False):
        pipe = flow.pipeline() if is_flow else build(Case(2))
        files = lora_files(pipe, flow if is_flow else some, _folder(folder / str(is_flow)))
        run = flow.generate if is_flow else _generate
        fusion = compile_fusion(*files, device="cpu")
        assert sum(entry.timeline.switches for entry in fusion.entries) > 5
        made[is_flow] = Base(Copies(pipe), run, KLora(*files), Copies(fusion))
    return made


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _generate(pipe: Any, steps: int) -> torch.Tensor:
    return generate(pipe, Case(steps))


def _cases() -> list[Any]:
    """Each sampler with each number of steps by a clock of its own in turn; the rest is slow."""
    cases = []
    for (i, name), (j, steps), (k, clock) in product(
        enumerate(SAMPLERS), enumerate(STEPS), enumerate(CLOCKS)
    ):
        taken = (i + j) % len(CLOCKS) == k
        cases.append(pytest.param(name, steps, clock) if taken else slow(name, steps, clock))
    return cases


@pytest.mark.parametrize(("name", "steps", "clock"), _cases())
def test_latents_equal_the_reference(
    name: str, steps: int, clock: Clock, bases: dict[bool, Base]
) -> None:
    sampler = SAMPLERS[name]
    base = bases[sampler.level == "flow"]
    fusion = replace(base.fused.make(), clock=clock)
    pipe = base.with_scheduler(name)
    bare = base.generate(pipe, steps)
    moments = progress_of_run(pipe.scheduler, clock, sampler.level)
    with sampling(pipe, base.klora, moments):
        expected = base.generate(pipe, steps)
    assert relative_difference(expected, bare) > 10 * TOLERANCE
    # EDM begins at a noise of 80, which enlarges rounding: 1.8e-5 where processors have AVX-512.
    limit = 4 * TOLERANCE if name == "EDM" else TOLERANCE
    for mode in MODES:
        with apply_fusion(pipe, fusion, mode=mode) as handle:
            found = base.generate(pipe, steps)
            assert handle.report().progress == pytest.approx(moments[-1], abs=1e-9), mode
        assert relative_difference(found, expected) <= limit, mode


@pytest.mark.parametrize(("name", "alike"), [("flow 5", False), ("flow 1", True)])
def test_the_clocks_differ_by_the_shift(name: str, alike: bool, bases: dict[bool, Base]) -> None:
    """FLUX's own sigmas, from 1 to 1 / N in equal steps, are the same to both."""
    base, steps = bases[True], 4
    pipe, found = base.with_scheduler(name), []
    sigmas = [1 - step / steps for step in range(steps)]
    for clock in CLOCKS:
        with apply_fusion(pipe, replace(base.fused.make(), clock=clock)):
            arguments = {"sigmas": sigmas, **prompts(pooled=True), **square(64)}
            generator = torch.Generator().manual_seed(7)
            found.append(pipe(output_type="latent", generator=generator, **arguments).images)
    assert torch.equal(*found) == alike
