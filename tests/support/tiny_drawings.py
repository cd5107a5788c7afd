"""A base of drawings with a denoiser of a few thousand weights, untrained."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from drawings.base.parts import assembled, new_autoencoder, new_text_encoder, new_tokenizer


def tiny_drawings() -> StableDiffusionPipeline:
    """Return the same pipeline in every call."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer(["a fox, noto style"] * 3)
    unet = UNet2DConditionModel(
        sample_size=12,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=1,
        norm_num_groups=4,
        cross_attention_dim=192,
        use_linear_projection=True,
    )
    return assembled(new_autoencoder(), unet, new_text_encoder(tokenizer), tokenizer)
