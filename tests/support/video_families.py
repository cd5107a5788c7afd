"""Families of videos, as `families` has those of images; some make sound too."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    ModelMixin,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from support.families import (
    HEADS,
    POOLED,
    TOKENS,
    WIDTH,
    FamilyCase,
    assembled,
    flow_scheduler,
    masks,
    prompts,
    square,
)

BOTH_MASKS = masks("prompt_attention_mask", "negative_prompt_attention_mask")


def wan() -> Any:
    """Wan 2.2: one transformer for the noisy part of the schedule, another for the rest."""
    shape = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 8,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    first, second = WanTransformer3DModel(**shape), WanTransformer3DModel(**shape)
    return assembled(WanPipeline, first, scheduler, transformer_2=second, boundary_ratio=0.8)


def ltx() -> Any:
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=WIDTH,
    )
    return assembled(
        LTXPipeline,
        transformer,
        flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.1),
    )


def ltx2() -> Any:
    """Video and sound: the pipeline copies its scheduler for the sound."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=WIDTH,
    )
    return assembled(
        LTX2Pipeline,
        transformer,
        flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=_ltx2_vae(),
        audio_vae=_ltx2_audio_vae(),
        connectors=_ltx2_connectors(),
        vocoder=None,
    )


def _ltx2_vae() -> AutoencoderKLLTX2Video:
    return AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )


def _ltx2_audio_vae() -> AutoencoderKLLTX2Audio:
    return AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )


def _ltx2_connectors() -> LTX2TextConnectors:
    connector = {
        f"{modality}_connector_{name}": value
        for modality in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": WIDTH // 2,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    return LTX2TextConnectors(caption_channels=WIDTH, text_proj_in_factor=1, **connector)


def hunyuan_video() -> Any:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(2, 2, 4),
    )
    return assembled(HunyuanVideoPipeline, transformer, flow_scheduler(shift=7.0), 2)


def cogvideox() -> Any:
    """Its scheduler steps with other arguments than most."""
    transformer = CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=TOKENS,
    )
    return assembled(CogVideoXPipeline, transformer, CogVideoXDPMScheduler())


class _Unchecked(ModelMixin):
    """In place of a safety checker, which the pipeline insists on."""

    device = torch.device("cpu")


def cosmos() -> Any:
    """It calls ``scheduler.step`` twice in each step."""
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        concat_padding_mask=False,  # it would need torchvision
    )
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    return assembled(CosmosTextToWorldPipeline, transformer, scheduler, safety_checker=_Unchecked())


VIDEOS = (
    FamilyCase(
        "Wan 2.2",
        wan,
        {**prompts(), **square(32), "num_frames": 5},
        ran={"transformer": (0, 1), "transformer_2": (2, 3)},
        evaluations=2,
    ),
    FamilyCase("LTX", ltx, {**prompts(), **BOTH_MASKS, **square(64), "num_frames": 9}),
    FamilyCase(
        "LTX2",
        ltx2,
        {**prompts(), **BOTH_MASKS, **square(32), "num_frames": 5},
        evaluations=3,
        pattern="s*",
    ),
    FamilyCase(
        "HunyuanVideo",
        hunyuan_video,
        {
            **prompts(pooled=True, negative=False),
            **masks("prompt_attention_mask"),
            **square(32),
            "num_frames": 5,
        },
        pattern="s*",
    ),
    FamilyCase("CogVideoX", cogvideox, {**prompts(), **square(64), "num_frames": 5}),
    FamilyCase(
        "Cosmos", cosmos, {**prompts(), **square(32), "num_frames": 9}, evaluations=2, pattern="s*"
    ),
)
