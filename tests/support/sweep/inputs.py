"""What is given to pipelines: numbers, pictures, and embeddings that stand for prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bare_pipelines import noise
from PIL import Image
from support.sweep.settings import POOLED, WIDTH
from torch.nn import functional

STEPS, PIXELS, FRAMES, TOKENS = 4, 64, 5, 6

#: Pixels of a picture of Stable Diffusion's.
FEW = 16


def picture(pixels: int, seed: int = 8) -> Image.Image:
    """A smooth picture of random colours."""
    colours = functional.interpolate(noise(1, 3, 4, 4, seed=seed).sigmoid(), pixels, mode="bicubic")
    values = (255 * colours[0].clamp(0, 1)).permute(1, 2, 0).to(torch.uint8)
    return Image.fromarray(values.numpy())


def mask(pixels: int) -> Image.Image:
    """White to the left."""
    return Image.fromarray((255 * MASK[0, 0, :pixels, :pixels]).to(torch.uint8).numpy())


IMAGE = noise(1, 3, PIXELS, PIXELS, seed=8).sigmoid()
MASK = (torch.arange(PIXELS) < PIXELS // 2).float().expand(1, 1, PIXELS, PIXELS)

#: Argument -> what stands for prompts in a pipeline that has it.
EMBEDDED: Mapping[str, Any] = {
    **{
        f"{sign}{name}": noise(1, TOKENS, WIDTH, seed=len(sign))
        for sign in ("", "negative_")
        for name in ("prompt_embeds", "prompt_embeds_2", "prompt_embeds_t5", "prompt_embeds_qwen")
    },
    **{
        f"{sign}{name}": noise(1, POOLED, seed=len(sign))
        for sign in ("", "negative_")
        for name in ("pooled_prompt_embeds", "prompt_embeds_clip")
    },
    **{
        f"{sign}prompt_embeds_llama3": noise(2, 1, TOKENS, WIDTH, seed=len(sign))
        for sign in ("", "negative_")
    },
    **{
        f"{sign}prompt_cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32)
        for sign in ("", "negative_")
    },
    **{
        f"{sign}{name}": torch.ones(1, TOKENS, dtype=torch.long)
        for sign in ("", "negative_")
        for name in (
            *("prompt_attention_mask", "prompt_embeds_mask", "prompt_mask", "attention_mask"),
            *("prompt_attention_mask_2", "prompt_embeds_mask_2", "encoder_attention_mask"),
        )
    },
}

#: Argument -> what a pipeline that has it is called with.
NUMBERS: Mapping[str, Any] = {
    "num_inference_steps": STEPS,
    "height": PIXELS,
    "width": PIXELS,
    "num_frames": FRAMES,
    "frames": FRAMES,
    "video_length": FRAMES,
    "max_sequence_length": TOKENS,
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": None,
    "decoder_num_inference_steps": STEPS,
    "prior_num_inference_steps": STEPS,
    "super_res_num_inference_steps": STEPS,
    "output_type": "latent",
}
