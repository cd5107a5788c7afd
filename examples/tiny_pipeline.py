"""Real diffusers pipelines, tiny and with random weights, so that nothing is downloaded.

They have the layers of Stable Diffusion 1.x, 2.x and XL with the same names, but narrower. An
untrained network amplifies rounding from step to step; so its output layer is scaled down, and two
exact ways to sample stay equal over many steps.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # nothing here needs torchvision

import json
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from random_loras import random_lora
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

Family = Literal["sd1", "sd2", "sdxl"]

#: Components that LoRAs are for.
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)

TEXT_WIDTH = 32
LATENT_SIZE = 16
OUTPUT_SCALE = 0.2
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_pipeline(family: Family = "sd1", *, seed: int = 0, latent_channels: int = 4) -> Any:
    """Return a pipeline of about a million parameters, float32, on the CPU.

    Args:
        family: family of the layer names and kinds: ``sd1`` has convolutions as ``proj_in``,
            ``sd2`` and ``sdxl`` have linear layers, ``sdxl`` has two text encoders.
        seed: seed of the random weights.
        latent_channels: input channels of the UNet (9 for an inpainting model).
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = _unet(family, latent_channels)
        vae = AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            latent_channels=4,
            sample_size=2 * LATENT_SIZE,
        )
        text_encoder = CLIPTextModel(_text_config())
        scheduler = PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1)
        common = {"vae": vae, "unet": unet, "scheduler": scheduler, "text_encoder": text_encoder}
        if family == "sdxl":
            pipe = StableDiffusionXLPipeline(
                **common,
                tokenizer=_tokenizer(),
                text_encoder_2=CLIPTextModelWithProjection(_text_config()),
                tokenizer_2=_tokenizer(),
                add_watermarker=False,
            )
        else:
            pipe = StableDiffusionPipeline(
                **common,
                tokenizer=_tokenizer(),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
    pipe.set_progress_bar_config(disable=True)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.eval().requires_grad_(False)
    return pipe


def tiny_lora(
    pipe: Any,
    path: str | Path,
    *,
    seed: int,
    rank: int = 4,
    strength: float = 0.5,
    modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj"),
) -> Path:
    """Write a LoRA with random weights for a pipeline, in diffusers/PEFT keys.

    Args:
        modules: last parts of the names of layers to adapt, linear or convolution.
        strength: mean norm of a delta relative to the norm of its weight; layers vary around it.
    """
    models = {
        component: model
        for component in COMPONENTS
        if isinstance(model := getattr(pipe, component, None), nn.Module)
    }

    def adapts(name: str) -> bool:
        return name.endswith(modules)

    return random_lora(models, Path(path), adapts, seed=seed, rank=rank, strength=strength)


def _unet(family: Family, in_channels: int) -> UNet2DConditionModel:
    # As in the real models: attention at the first level of SD 1 and 2, and at the last of SDXL.
    down = ["CrossAttnDownBlock2D", "DownBlock2D"]
    extra: dict[str, Any] = {}
    if family == "sdxl":
        down.reverse()
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + TEXT_WIDTH,
            "transformer_layers_per_block": (1, 2),
        }
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=in_channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=8,
        norm_num_groups=8,
        cross_attention_dim=2 * TEXT_WIDTH if family == "sdxl" else TEXT_WIDTH,
        use_linear_projection=family != "sd1",
        **extra,
    )
    with torch.no_grad():
        unet.conv_out.weight.mul_(OUTPUT_SCALE)
        unet.conv_out.bias.mul_(OUTPUT_SCALE)
    return unet


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return {token: index for index, token in enumerate(tokens)}


def _tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer that knows single letters only."""
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps(_vocabulary()))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)


def parameters(pipe: Any) -> dict[str, torch.Tensor]:
    """Return a copy of every parameter of a pipeline, by component and name."""
    return {
        f"{component}.{name}": parameter.detach().clone()
        for component in COMPONENTS
        if isinstance(model := getattr(pipe, component, None), nn.Module)
        for name, parameter in model.named_parameters()
    }


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return ||one - other|| / ||other||, computed in float64."""
    scale = float(other.double().norm())
    return float((one.double() - other.double()).norm()) / (scale or math.nan)
