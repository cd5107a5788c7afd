"""Families of base models: each as its real pipeline class, tiny, and one generation with it.

A new family is a builder and a row. Text encoders are left out where a pipeline takes embeddings.
Here are image transformers; `sd_families` has Stable Diffusion, `video_families` videos.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from bare_pipelines import bare_pipeline, noise
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from safetensors.torch import load_file, save_file
from support.copying import Copies
from tiny_pipeline import tiny_lora
from torch import nn

#: The end of every name.
EVERY_LAYER = ("",)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

#: All linear layers in the blocks of FLUX.1: 14 in a double block, 6 in a single one.
FLUX_BLOCKS = (
    *(f".attn.{name}" for name in (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj")),
    *(f".{name}.linear" for name in ("norm1", "norm1_context", "norm")),
    *(f".{name}.net.{i}" for name in ("ff", "ff_context") for i in ("0.proj", "2")),
    ".to_add_out",
    ".proj_mlp",
    ".proj_out",
)

STEPS = 4
PIXELS = 16

#: Length and width of prompts' embeddings, and width of pooled ones.
TOKENS, WIDTH, POOLED = 6, 16, 8

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


@dataclass(frozen=True)
class FamilyCase:
    """One family and one way to generate with it."""

    name: str
    build: Callable[[], Any]
    arguments: Mapping[str, Any]
    """What its pipeline is called with, besides what all are."""
    modules: Sequence[str] = EVERY_LAYER
    """Ends of the names of the layers that the LoRAs adapt."""
    ran: Mapping[str, Sequence[int]] = field(default_factory=lambda: {"transformer": range(STEPS)})
    """Denoiser -> the steps in which it is evaluated; they follow each other."""
    evaluations: int = 1
    """How often in each of them."""
    pattern: Literal["s", "s*"] = "s"
    call: Callable[..., Sequence[torch.Tensor]] | None = None
    """How its pipeline is asked for latents, where it is not as most are."""

    def __str__(self) -> str:
        return self.name

    def progress(self, denoiser: str) -> list[float]:
        """The progress of each of its evaluations, in order."""
        steps = [step for step in self.ran[denoiser] for _ in range(self.evaluations)]
        return [(step + 0.5) / STEPS for step in steps]

    def pipeline(self) -> Any:
        """A pipeline of the caller's own, always with the same weights."""
        return _copies(self.build).make()

    def generate(self, pipe: Any, steps: int = STEPS) -> torch.Tensor:
        """All latents of one generation; equal weights and schedules give equal latents."""
        call = self.call or latents_of
        generator = torch.Generator().manual_seed(7)
        parts = call(pipe, num_inference_steps=steps, generator=generator, **self.arguments)
        latents = torch.cat([part.flatten() for part in parts])
        assert latents.isfinite().all()
        return latents


@functools.lru_cache(maxsize=16)
def _copies(build: Callable[[], Any]) -> Copies:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = build()
    pipe.set_progress_bar_config(disable=True)
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False)
    return Copies(pipe)


def lora_files(pipe: Any, case: FamilyCase, folder: Path) -> tuple[Path, Path]:
    """The content LoRA is stronger in the second denoiser, if any, so gammas are far apart."""
    modules = tuple(case.modules)
    content = tiny_lora(pipe, folder / "content.safetensors", seed=1, rank=4, modules=modules)
    style = tiny_lora(pipe, folder / "style.safetensors", seed=2, rank=3, modules=modules)
    tensors = load_file(str(content))
    for key, tensor in tensors.items():
        if key.startswith("transformer_2.") and ".lora_B." in key:
            tensor.mul_(3)
    save_file(tensors, str(content))
    return content, style


def latents_of(pipe: Any, **arguments: Any) -> Sequence[torch.Tensor]:
    """The latents of a generation: one tensor, or one for each modality."""
    parts = pipe(output_type="latent", **arguments).to_tuple()
    return [part for part in parts if isinstance(part, torch.Tensor)]


def prompts(*, pooled: bool = False, negative: bool = True) -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and a negative prompt."""
    embeddings = {}
    for seed, sign in enumerate(("", "negative_") if negative else ("",)):
        embeddings[f"{sign}prompt_embeds"] = noise(1, TOKENS, WIDTH, seed=seed)
        if pooled:
            embeddings[f"{sign}pooled_prompt_embeds"] = noise(1, POOLED, seed=seed)
    return embeddings


def masks(*names: str) -> dict[str, torch.Tensor]:
    """Attention masks of embeddings that leave out nothing."""
    return {name: torch.ones(1, TOKENS, dtype=torch.long) for name in names}


def assembled(
    pipeline: Any, transformer: Any, scheduler: Any, text_encoders: int = 1, **parts: Any
) -> Any:
    """A pipeline that has a denoiser and little else: it takes embeddings and gives latents."""
    return bare_pipeline(
        pipeline, text_encoders, transformer=transformer, scheduler=scheduler, **parts
    )


def flow_scheduler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def square(pixels: int = PIXELS) -> dict[str, int]:
    return {"height": pixels, "width": pixels}


IMAGE = noise(1, 3, PIXELS, PIXELS, seed=8).sigmoid()
LEFT_HALF = (torch.arange(PIXELS) < PIXELS // 2).float().expand(1, 1, PIXELS, PIXELS)


def sd3() -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return assembled(StableDiffusion3Pipeline, transformer, flow_scheduler(shift=3.0), 3)


def flux_parts(**settings: Any) -> dict[str, Any]:
    shape = {"in_channels": 64, "num_layers": 1, "num_single_layers": 2, **settings}
    transformer = FluxTransformer2DModel(
        **shape,
        **HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(2, 2, 4),
    )
    return {"transformer": transformer, "scheduler": flow_scheduler(use_dynamic_shifting=True)}


def flux(pipeline: Any = FluxPipeline, vae: Any = None, **settings: Any) -> Any:
    return assembled(pipeline, **flux_parts(**settings), text_encoders=2, vae=vae)


def flux_fill() -> Any:
    """Latents, those of the masked image, and the mask side by side."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.1,
    )
    return flux(FluxFillPipeline, vae, in_channels=48, out_channels=16, guidance_embeds=True)


def flux_modular() -> Any:
    pipe = FluxCoreDenoiseStep().init_pipeline()
    pipe.update_components(**flux_parts())
    return pipe


def modular_latents(pipe: Any, **arguments: Any) -> Sequence[torch.Tensor]:
    return [pipe(output="latents", **arguments)]


def flux2() -> Any:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        **HEADS,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
    )
    return assembled(Flux2Pipeline, transformer, flow_scheduler(use_dynamic_shifting=True))


def qwen_image() -> Any:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        **HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
    )
    scheduler = flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    return assembled(QwenImagePipeline, transformer, scheduler)


def z_image() -> Any:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 64, 64],
    )
    return assembled(ZImagePipeline, transformer, flow_scheduler(shift=3.0))


FLUX_PROMPT = prompts(pooled=True, negative=False)

IMAGES = (
    FamilyCase("SD3", sd3, {**prompts(pooled=True), **square(64)}),
    FamilyCase("FLUX.1", flux, {**FLUX_PROMPT, **square(64)}),
    FamilyCase(
        "FLUX.1 true CFG",
        flux,
        {**prompts(pooled=True), "true_cfg_scale": 3.0, **square(64)},
        evaluations=2,
        pattern="s*",
    ),
    FamilyCase(
        "FLUX.1 Kontext",
        lambda: flux(FluxKontextPipeline, guidance_embeds=True),
        {
            **FLUX_PROMPT,
            **square(32),
            "image": noise(1, 16, 4, 4),
            "max_area": 32 * 32,
            "_auto_resize": False,
        },
    ),
    FamilyCase(
        "FLUX.1 Fill",
        flux_fill,
        {**FLUX_PROMPT, "image": IMAGE, "mask_image": LEFT_HALF, **square()},
        pattern="s*",
    ),
    FamilyCase("FLUX.1 modular", flux_modular, {**FLUX_PROMPT, **square(64)}, call=modular_latents),
    FamilyCase("FLUX.2", flux2, {**prompts(negative=False), **square(64)}),
    FamilyCase(
        "Qwen-Image",
        qwen_image,
        {
            **prompts(),
            **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"),
            "true_cfg_scale": 3.0,
            **square(64),
        },
        evaluations=2,
    ),
    FamilyCase(
        "Z-Image",
        z_image,
        {**{name: [part[0]] for name, part in prompts().items()}, **square(64)},
        pattern="s*",
    ),
)
