"""Tiny models of ComfyUI's own classes, and their twins in diffusers.

diffusers' converters of checkpoints say which number of ComfyUI's model is which of diffusers'.
They are given numbered weights, so neither klora's tables nor ComfyUI's key maps judge themselves.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils as single_file
from diffusers.models.transformers import transformer_z_image
from support.comfyui.models import filled

_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 16,
    "context_in_dim": 24,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "context_dim": 24,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
_SD1 = {
    **_UNET,
    "adm_in_channels": None,
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": False,
    "num_heads": 4,
}
_SDXL = {
    **_UNET,
    "num_classes": "sequential",
    "adm_in_channels": 12 + 6 * 256,
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "use_linear_in_transformer": True,
}
_Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 384,
    "cap_feat_dim": 24,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [32, 32, 32],
    "axes_lens": [96, 32, 32],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 48,
    "out_dim": 16,
    "in_dim": 16,
    "num_heads": 2,
    "ffn_dim": 96,
    "num_layers": 1,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "text_dim": 24,
}
_QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


@dataclass(frozen=True)
class Tiny:
    """A family: the record of ComfyUI, the twin, and the width of what prompts become."""

    config: str
    """Class in ``comfy.supported_models``."""
    unet_config: Mapping[str, Any]
    family: str
    """klora's key."""
    component: str
    twin: Callable[[], Any]
    converter: Callable[[dict[str, Any], Any], dict[str, Any]]
    """(state dict in ComfyUI's names, the twin) -> state dict of the twin."""
    channels: int = 16
    size: tuple[int, ...] = (8, 8)
    pooled: int | None = None
    scheduler: str = "simple"


def _unet(**settings: Any) -> Any:
    own = {"cross_attention_dim": 24, "layers_per_block": 2, "norm_num_groups": 32, **settings}
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, **own)


def _z_image() -> Any:
    """diffusers fixes the width of one layer, which ComfyUI derives from the model's width."""
    model = ZImageTransformer2DModel(
        in_channels=16,
        dim=384,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=24,
        axes_dims=[32, 32, 32],
        axes_lens=[96, 32, 32],
    )
    model.t_embedder = transformer_z_image.TimestepEmbedder(256, mid_size=384)
    return model


def _of_unet(state: dict[str, Any], twin: Any) -> dict[str, Any]:
    named = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    return single_file.convert_ldm_unet_checkpoint(named, dict(twin.config))  # type: ignore[no-any-return]


def _without_twin(convert: Callable[..., Any]) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    return lambda state, twin: convert(dict(state))  # type: ignore[no-any-return]


#: diffusers' converter of FLUX.1 knows the released width alone.
_FLUX_WIDTH = 3072
#: Norms of FLUX.1, whose parameter later versions of ComfyUI call weight.
_NORM = re.compile(r"(\.(?:query|key)_norm)\.weight$")


def _of_flux(state: dict[str, Any], twin: Any) -> dict[str, Any]:
    """Convert with each row of joined layers as often as the released model is wider."""
    times = _FLUX_WIDTH // 32
    named = {_NORM.sub(r"\1.scale", key): value for key, value in state.items()}
    wide = {k: v.repeat_interleave(times, 0) if ".linear1." in k else v for k, v in named.items()}
    found = single_file.convert_flux_transformer_checkpoint_to_diffusers(wide)
    joined = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    return {
        key: value[::times]
        if key.startswith("single_") and key.rpartition(".")[0].endswith(joined)
        else value
        for key, value in found.items()
    }


FAMILIES: Mapping[str, Tiny] = {
    "flux": Tiny(
        "Flux",
        _FLUX,
        "flux.1",
        "transformer",
        lambda: FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        _of_flux,
        pooled=16,
    ),
    "sd1": Tiny(
        "SD15",
        _SD1,
        "sd1",
        "unet",
        lambda: _unet(block_out_channels=(32, 64, 128, 128), attention_head_dim=8),
        _of_unet,
        channels=4,
        scheduler="normal",
    ),
    "sdxl": Tiny(
        "SDXL",
        _SDXL,
        "sdxl",
        "unet",
        lambda: _unet(
            block_out_channels=(32, 64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=12 + 6 * 256,
        ),
        _of_unet,
        channels=4,
        pooled=12,
        scheduler="normal",
    ),
    "z-image": Tiny(
        "ZImage",
        _Z_IMAGE,
        "z-image",
        "transformer",
        _z_image,
        _without_twin(single_file.convert_z_image_transformer_checkpoint_to_diffusers),
    ),
    "wan": Tiny(
        "WAN21_T2V",
        _WAN,
        "wan",
        "transformer",
        lambda: WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=16,
            out_channels=16,
            text_dim=24,
            freq_dim=256,
            ffn_dim=96,
            num_layers=1,
        ),
        _without_twin(single_file.convert_wan_transformer_to_diffusers),
        size=(1, 8, 8),
    ),
    "qwen-image": Tiny(
        "QwenImage",
        _QWEN,
        "qwen-image",
        "transformer",
        lambda: QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda state, twin: dict(state),
        size=(1, 8, 8),
    ),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of ComfyUI with random weights; the same for the same name."""
    import comfy.supported_models

    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.config)(dict(family.unet_config))
    config.set_inference_dtype(dtype, None)
    model = filled(config.get_model({}, "", "cpu"))
    model.tiny = name  # type: ignore[assignment]
    return model


def noise_for(model: Any) -> torch.Tensor:
    family = FAMILIES[model.tiny]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, family.channels, *family.size, generator=generator)


def conditioning(model: Any) -> tuple[list[Any], list[Any]]:
    """A positive and a negative prompt, encoded."""
    family = FAMILIES[model.tiny]
    found = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        more: dict[str, Any] = {"guidance": 3.5} if name_has_guidance(model) else {}
        if family.pooled is not None:
            more["pooled_output"] = torch.randn(1, family.pooled, generator=generator)
        found.append([[torch.randn(1, 6, 24, generator=generator), more]])
    return found[0], found[1]


def name_has_guidance(model: Any) -> bool:
    return bool(model.model_config.unet_config.get("guidance_embed"))


@functools.cache
def numbers_of(name: str) -> dict[str, torch.Tensor]:
    """Parameter of diffusers -> where each of its numbers is in ComfyUI's model.

    A place is an index into all numbers of the denoiser, in the order of :func:`flat`.
    """
    family = FAMILIES[name]
    model = tiny_model(name)
    state, begin = {}, 0
    for key, parameter in model.diffusion_model.named_parameters():
        ids = torch.arange(begin, begin + parameter.numel(), dtype=torch.float64)
        state[key] = ids.reshape(parameter.shape)
        begin += parameter.numel()
    with torch.device("meta"):
        twin = family.twin()
    known = twin.state_dict()
    found = family.converter(state, twin)
    return {key: value.long().reshape(known[key].shape) for key, value in found.items()}


def flat(model: Any) -> torch.Tensor:
    """All numbers of ComfyUI's denoiser, in order."""
    return torch.cat([p.detach().reshape(-1) for p in model.diffusion_model.parameters()])
