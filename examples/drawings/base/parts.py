"""The parts of the pipeline, untrained: classes of diffusers and transformers, and nothing else.

A trained folder loads with ``DiffusionPipeline.from_pretrained`` alone. It is a
``StableDiffusionPipeline`` that is trained by flow matching, with the scheduler of flow models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.resnet import ResnetBlock2D
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PIXELS = 48
#: Drawings are so many times as high and wide as their latents.
DOWNSAMPLING = 4
#: Shift of the noise levels towards noise, in training and in sampling; 1 is none.
SHIFT = 2.0

_LATENT_CHANNELS = 8
#: Of an untrained autoencoder: the share of a residual branch, and the variance of its latents.
_BRANCH, _LOG_VARIANCE = 0.1, -6.0
_TEXT_WIDTH = 192
_TOKENS, _VOCABULARY = 16, 2048


def new_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder from (3, 48, 48) in [-1, 1] to latents of (8, 12, 12).

    It begins with a path that carries the three colours through. Without one, pictures
    were still grey after 2,000 updates: training rests where latents hold brightness alone.
    """
    widths = (16, 32, 64)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=PIXELS,
        scaling_factor=1.0,
    )
    _open_a_path(vae)
    return vae


@torch.no_grad()
def _open_a_path(vae: AutoencoderKL) -> None:
    """Make the layers outside the residual branches pass their first channels on, unmixed."""
    for layer in vae.modules():
        if isinstance(layer, ResnetBlock2D):
            layer.conv2.weight.mul_(_BRANCH)
            layer.conv2.bias.zero_()
    for name, layer in vae.named_modules():
        if isinstance(layer, torch.nn.Conv2d) and not name.endswith(("conv1", "conv2")):
            identity = torch.nn.init.dirac_(torch.empty_like(layer.weight))
            through = identity.flatten(1).any(1)
            layer.weight[through] = identity[through]
            layer.bias[through] = 0.0
    # The second half of these channels is the logarithm of the latents' variance.
    vae.quant_conv.weight[_LATENT_CHANNELS:] *= _BRANCH
    vae.quant_conv.bias[_LATENT_CHANNELS:] = _LOG_VARIANCE


def new_unet() -> UNet2DConditionModel:
    """Return an untrained denoiser of latents."""
    widths, width_of_a_head = (64, 128, 192), 32
    return UNet2DConditionModel(
        sample_size=PIXELS // DOWNSAMPLING,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        # The name is historical: diffusers takes this for the *number* of heads.
        attention_head_dim=tuple(width // width_of_a_head for width in widths),
        norm_num_groups=16,
        cross_attention_dim=_TEXT_WIDTH,
        use_linear_projection=True,
    )


def new_tokenizer(prompts: Iterable[str]) -> CLIPTokenizer:
    """Return a tokenizer of the frequent words of these prompts, and of pieces of words.

    Any other word has tokens too, made of pieces, so the words of held-out subjects need not be
    known here.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    blank = CLIPTokenizer(model_max_length=_TOKENS)
    special = [blank.bos_token, blank.eos_token]
    backend = blank.backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(prompts, trainer)
    state: dict[str, Any] = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in state["merges"]]
    return CLIPTokenizer(vocab=state["vocab"], merges=merges, model_max_length=_TOKENS)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder for these tokens; it is trained with the denoiser."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=6,
            max_position_embeddings=_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def assembled(
    autoencoder: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    """Make the pipeline of these parts."""
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=SHIFT,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoded(pipe: StableDiffusionPipeline, prompts: list[str]) -> torch.Tensor:
    """Encode prompts for the denoiser, (prompts, tokens, width), with gradients."""
    ids = pipe.tokenizer(
        prompts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
    ).input_ids
    hidden: torch.Tensor = pipe.text_encoder(ids.to(pipe.device)).last_hidden_state
    return hidden
