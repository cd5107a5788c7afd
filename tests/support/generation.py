"""Generations with tiny real pipelines, and the true progress of each denoiser evaluation.

What diffusers does in each kind of generation is written down here from its documentation and
from counting: nothing asks the product which step it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from reference import KLora
from support.compiling import compiled
from support.copying import Copies
from tiny_pipeline import SD_BETAS, Family, tiny_pipeline

from klora_runtime.artifact.fusion import Fusion

Kind = Literal["sd1", "sd2", "sdxl", "img2img", "inpaint", "sdxl-split"]
SchedulerName = Literal["DDIM", "PNDM", "Euler", "DPM++ 2M", "Heun"]

#: Relative difference of two exact ways to sample, over all steps together.
TOLERANCE = 1e-5
#: The LoRAs change the latents at least this much, or a comparison says nothing.
LEAST_EFFECT = 1e-2

STRENGTH = 0.6
SPLIT = 0.5
_PIXELS = 16
_PROMPT = "a fox"

FAMILY_OF: dict[Kind, Family] = {
    "sd1": "sd1",
    "sd2": "sd2",
    "sdxl": "sdxl",
    "img2img": "sd1",
    "inpaint": "sd2",
    "sdxl-split": "sdxl",
}


@dataclass(frozen=True)
class Case:
    """One way to generate."""

    steps: int
    scheduler: SchedulerName = "DDIM"
    guidance: Literal["batched", "off"] = "off"
    kind: Kind = "sd1"
    pattern: Literal["s", "s*"] = "s"
    semantics: Literal["paper", "authors"] = "paper"

    @property
    def family(self) -> Family:
        return FAMILY_OF[self.kind]

    def __str__(self) -> str:
        return "-".join(map(str, vars(self).values()))


#: Enough where the images do not matter.
TWO_STEPS = Case(2)


@dataclass(frozen=True)
class LoraPair:
    """Files of a content and a style LoRA for one family."""

    content: Path
    style: Path

    def fusion(self, case: Case, **settings: Any) -> Fusion:
        """A fusion of its own for every caller; equal ones are compiled once."""
        named = {"pattern": case.pattern, "semantics": case.semantics, **settings}
        made: Fusion = _compiled(self, tuple(sorted(named.items()))).make()
        return made

    def swapped(self) -> LoraPair:
        return LoraPair(self.style, self.content)

    def reference(self, case: Case, **settings: Any) -> KLora:
        return KLora(self.content, self.style, case.pattern, case.semantics, **settings)


@functools.lru_cache(maxsize=32)
def _compiled(pair: LoraPair, settings: tuple[tuple[str, Any], ...]) -> Copies:
    return Copies(compiled(pair.content, pair.style, **dict(settings)))


def scheduler(name: SchedulerName, steps: int) -> Any:
    """A scheduler as Stable Diffusion has it.

    The only step of a one-step run would be at timestep 1, where a denoiser has next to no
    effect, so that run starts from the other end.
    """
    common = {**SD_BETAS, "timestep_spacing": "leading" if steps > 1 else "trailing"}
    match name:
        case "DDIM":
            return DDIMScheduler(
                **common, clip_sample=False, set_alpha_to_one=False, steps_offset=1
            )
        case "PNDM":
            return PNDMScheduler(**common, skip_prk_steps=True, steps_offset=1)
        case "Euler":
            return EulerDiscreteScheduler(**common, steps_offset=1)
        case "DPM++ 2M":
            return DPMSolverMultistepScheduler(**common, steps_offset=1)
        case "Heun":
            return HeunDiscreteScheduler(**common, steps_offset=1)


def build(case: Case) -> Any:
    """The pipeline of a case; two calls give two pipelines with equal weights."""
    return _built(case).make()


@functools.lru_cache(maxsize=32)
def _built(case: Case) -> Copies:
    pipe = tiny_pipeline(case.family, latent_channels=9 if case.kind == "inpaint" else 4)
    parts = {**pipe.components, "scheduler": scheduler(case.scheduler, case.steps)}
    if case.kind == "img2img":
        pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    elif case.kind == "inpaint":
        pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    else:
        pipe.scheduler = parts["scheduler"]
    pipe.set_progress_bar_config(disable=True)
    return Copies(pipe)


def generate(pipe: Any, case: Case, **extra: Any) -> torch.Tensor:
    """Latents of one generation; equal weights and schedules give equal latents."""
    generator = torch.Generator().manual_seed(7)
    common: dict[str, Any] = {
        "prompt": _PROMPT,
        "num_inference_steps": case.steps,
        "guidance_scale": 5.0 if case.guidance == "batched" else 1.0,
        "output_type": "latent",
        "generator": generator,
        **extra,
    }
    size = {"height": _PIXELS, "width": _PIXELS}
    image = torch.rand(1, 3, _PIXELS, _PIXELS, generator=torch.Generator().manual_seed(8))
    strength = STRENGTH if case.steps > 1 else 1.0  # 0.6 of one step is no step
    match case.kind:
        case "img2img":
            result = pipe(image=image, strength=strength, **common)
        case "inpaint":
            mask = (torch.arange(_PIXELS) < _PIXELS // 2).float().expand(1, 1, _PIXELS, _PIXELS)
            result = pipe(image=image, mask_image=mask, strength=strength, **size, **common)
        case "sdxl-split":
            second = StableDiffusionXLImg2ImgPipeline(**pipe.components, add_watermarker=False)
            second.set_progress_bar_config(disable=True)
            half = pipe(denoising_end=SPLIT, **size, **common).images
            result = second(image=half, denoising_start=SPLIT, **common)
        case _:
            result = pipe(**size, **common)
    latents = result.images
    assert isinstance(latents, torch.Tensor)
    assert latents.isfinite().all()
    return latents


def evaluations(name: SchedulerName, steps: int) -> int:
    """Denoiser evaluations of a whole schedule: PNDM has one more than steps, Heun two a step."""
    if name == "PNDM":
        return steps + 1 if steps > 1 else 1
    return 2 * steps - 1 if name == "Heun" else steps


def progress(case: Case) -> list[float]:
    """The progress of each denoiser evaluation of ``generate``, in order."""
    order = 2 if case.scheduler == "Heun" else 1
    last = evaluations(case.scheduler, case.steps)
    steps = (last + order - 1) // order
    return [(index // order + 0.5) / steps for index in _indices(case, order, last)]


def _indices(case: Case, order: int, last: int) -> list[int]:
    """Where in the full list of timesteps each evaluation is."""
    if case.kind in ("img2img", "inpaint") and case.steps > 1:
        skipped = case.steps - int(case.steps * STRENGTH)
        return list(range(skipped * order, last))
    if case.kind == "sdxl-split":
        schedule = scheduler(case.scheduler, case.steps)
        schedule.set_timesteps(case.steps)
        cutoff = 1000 - SPLIT * 1000
        before = sum(float(timestep) >= cutoff for timestep in schedule.timesteps)
        after = last - before
        if order == 2 and after % 2 == 0:
            after += 1  # the second pipeline starts at the first half of a step
        return [*range(before), *range(last - after, last)]
    return list(range(last))
