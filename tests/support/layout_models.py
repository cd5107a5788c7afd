"""The models that the layout tables speak of, on the meta device, with the released widths."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from torch import nn

SD1: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
#: Of stabilityai/stable-diffusion-xl-refiner-1.0: widths as in SGM's sd_xl_refiner.yaml, which
#: diffusers reads in `create_unet_diffusers_config_from_ldm`.
SDXL_REFINER: dict[str, Any] = {
    "cross_attention_dim": 1280,
    "attention_head_dim": (6, 12, 24, 24),
    "use_linear_projection": True,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2560,
}
#: SD3.5 medium, as `scripts/convert_sd3_to_diffusers.py` of diffusers infers it.
SD35_MEDIUM: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
#: Wan 2.1 14B from image to video, of diffusers' `scripts/convert_wan_to_diffusers.py`.
WAN_I2V: dict[str, Any] = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
#: "Cosmos-2.0-Diffusion-2B-Text2Image" of diffusers' `scripts/convert_cosmos_to_diffusers.py`,
#: which `scripts/convert_anima_to_diffusers.py` names for Anima.
COSMOS_2B: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_layers": 28,
    "extra_pos_embed_type": None,
}
#: LTX-2.3, of diffusers' `scripts/convert_ltx2_to_diffusers.py`; its defaults are LTX-2.
LTX_23: dict[str, Any] = {
    **dict.fromkeys(("gated_attn", "audio_gated_attn"), True),
    **dict.fromkeys(("cross_attn_mod", "audio_cross_attn_mod"), True),
    "use_prompt_embeddings": False,
}
LTX_23_CONNECTORS: dict[str, Any] = {
    **dict.fromkeys(("video_connector_num_layers", "audio_connector_num_layers"), 8),
    **dict.fromkeys(("video_gated_attn", "audio_gated_attn", "per_modality_projections"), True),
    "video_connector_num_attention_heads": 32,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
}
#: HiDream-I1, of the `transformer/config.json` that all of its releases have.
HIDREAM: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 16,
    "num_single_layers": 32,
    "attention_head_dim": 128,
    "num_attention_heads": 20,
    "caption_channels": [4096, 4096],
    "text_emb_dim": 2048,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": (64, 32, 32),
    "max_resolution": (128, 128),
    "llama_layers": list(range(48)),
}
#: HunyuanImage 2.1, of diffusers' `scripts/convert_hunyuan_image_to_diffusers.py`, with what its
#: distilled and its refining models have besides.
HUNYUAN_IMAGE: dict[str, Any] = {
    "guidance_embeds": True,
    "use_meanflow": True,
    "text_embed_2_dim": 1472,
}
#: Kandinsky 5 Pro, of the authors' `configs`.
KANDINSKY_5_PRO: dict[str, Any] = {
    "num_text_blocks": 4,
    "num_visual_blocks": 60,
    "model_dim": 4096,
    "ff_dim": 16384,
    "time_dim": 1024,
}
#: "Cosmos-2.5-Predict-Base-14B" of diffusers' `scripts/convert_cosmos_to_diffusers.py`.
COSMOS_25_14B: dict[str, Any] = {
    "num_attention_heads": 40,
    "num_layers": 36,
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
}
#: ERNIE-Image of eight billion weights: what makes as many. Its `config.json` was not at hand.
ERNIE_IMAGE: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_layers": 36,
    "ffn_hidden_size": 12288,
}
#: Of diffusers' `scripts/convert_cogview4_to_diffusers.py`.
COGVIEW_4: dict[str, Any] = {
    "num_layers": 28,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "time_embed_dim": 512,
}
#: Of BRIA 3.2's own `transformer/config.json`, and as mflux builds FIBO.
BRIA: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 8,
    "num_single_layers": 28,
    "attention_head_dim": 96,
    "axes_dims_rope": [0, 48, 48],
}
FIBO: dict[str, Any] = {"in_channels": 48, "num_layers": 8, "num_single_layers": 38}
#: CogVideoX 5B, of diffusers' `scripts/convert_cogvideox_to_diffusers.py`, and what only 1.5 has.
COGVIDEOX_5B: dict[str, Any] = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "ofs_embed_dim": 512,
}

#: Family of a layout -> class and what differs from its defaults.
DENOISERS: Mapping[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "sd1": (diffusers.UNet2DConditionModel, SD1),
    "sd2": (diffusers.UNet2DConditionModel, SD2),
    "sdxl": (diffusers.UNet2DConditionModel, SDXL),
    "sdxl-refiner": (diffusers.UNet2DConditionModel, SDXL_REFINER),
    "sd3": (diffusers.SD3Transformer2DModel, SD35_MEDIUM),
    "flux.1": (diffusers.FluxTransformer2DModel, {"guidance_embeds": True}),
    "chroma": (diffusers.ChromaTransformer2DModel, {}),
    "flux.2": (diffusers.Flux2Transformer2DModel, {}),
    "qwen-image": (diffusers.QwenImageTransformer2DModel, {}),
    "z-image": (diffusers.ZImageTransformer2DModel, {}),
    "wan": (diffusers.WanTransformer3DModel, WAN_I2V),
    "hunyuan-video": (diffusers.HunyuanVideoTransformer3DModel, {}),
    "ltx": (diffusers.LTXVideoTransformer3DModel, {}),
    # Widths of Gemma 2 2B, its text encoder.
    "lumina2": (diffusers.Lumina2Transformer2DModel, {"cap_feat_dim": 2304}),
    "anima": (diffusers.CosmosTransformer3DModel, COSMOS_2B),
    "krea-2": (diffusers.Krea2Transformer2DModel, {}),
    "auraflow": (diffusers.AuraFlowTransformer2DModel, {}),
    "ltx-2": (diffusers.LTX2VideoTransformer3DModel, LTX_23),
    "hidream-i1": (diffusers.HiDreamImageTransformer2DModel, HIDREAM),
    "hunyuan-video-1.5": (diffusers.HunyuanVideo15Transformer3DModel, {"use_meanflow": True}),
    "hunyuan-image": (diffusers.HunyuanImageTransformer2DModel, HUNYUAN_IMAGE),
    "wan-vace": (diffusers.WanVACETransformer3DModel, {}),
    "qwen-image-2.1": (diffusers.QwenImage21Transformer2DModel, {}),
    "kandinsky-5": (diffusers.Kandinsky5Transformer3DModel, KANDINSKY_5_PRO),
    "pixart": (diffusers.PixArtTransformer2DModel, {"caption_channels": 4096}),
    "sana": (diffusers.SanaTransformer2DModel, {}),
    "cogview-4": (diffusers.CogView4Transformer2DModel, COGVIEW_4),
    "cogvideox": (diffusers.CogVideoXTransformer3DModel, COGVIDEOX_5B),
    "mochi-1": (diffusers.MochiTransformer3DModel, {}),
    "ideogram-4": (diffusers.Ideogram4Transformer2DModel, {}),
    "flux.3": (diffusers.Flux3Transformer2DModel, {"flow_map": True}),
    "ernie-image": (diffusers.ErnieImageTransformer2DModel, ERNIE_IMAGE),
    "minimax-h3": (diffusers.MiniMaxH3Transformer3DModel, {}),
    "ace-step": (diffusers.AceStepTransformer1DModel, {}),
    "cosmos-predict": (diffusers.CosmosTransformer3DModel, COSMOS_25_14B),
    "sana-video": (diffusers.SanaVideoTransformer3DModel, {}),
    "bria": (diffusers.BriaTransformer2DModel, BRIA),
    "fibo": (diffusers.BriaFiboTransformer2DModel, FIBO),
    "glm-image": (diffusers.GlmImageTransformer2DModel, {}),
}

#: Released models of a family that have modules which the one above has not.
OTHERS: Mapping[str, tuple[dict[str, Any], ...]] = {"ltx-2": ({},)}

#: Component that is no denoiser -> class and settings of each released model.
PARTS: Mapping[str, tuple[type[nn.Module], tuple[dict[str, Any], ...]]] = {
    "text_conditioner": (AnimaTextConditioner, ({},)),
    "connectors": (LTX2TextConnectors, (LTX_23_CONNECTORS, {})),
}

#: The text encoders of SDXL, as `formats/base_models` of the shared data lists them.
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
#: T5 v1.1 XXL, of sd-scripts' `library/flux_utils.py`.
T5_XXL: dict[str, Any] = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
}
#: Qwen 3 0.6B, of sd-scripts' `configs/qwen3_06b`, and Gemma 2 2B, of its `library/lumina_util.py`.
QWEN3_06B: dict[str, Any] = {
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
}
GEMMA2_2B: dict[str, Any] = {
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
}
#: Llama 3 8B, which HunyuanVideo has, of its `config.json`.
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
}
#: The language model of Qwen 2.5 VL 7B, which Qwen-Image has, of its `config.json`; without eyes.
QWEN25_VL_7B: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
    },
    "vision_config": {"depth": 1},
}


def _qwen25_vl(_: str) -> nn.Module:
    config = transformers.Qwen2_5_VLConfig(**QWEN25_VL_7B)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.model.visual = nn.Identity()  # no trainer adapts it
    model.lm_head = nn.Identity()
    return model


def _clip(component: str) -> nn.Module:
    widths = CLIP_BIG_G if component == "text_encoder_2" else CLIP_L
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**widths))


#: The same for the layouts of text encoders: the classes that pipelines hold.
TEXT_ENCODERS: Mapping[str, Callable[[str], nn.Module]] = {
    "clip": _clip,
    "t5": lambda _: transformers.T5EncoderModel(transformers.T5Config(**T5_XXL)),
    "qwen3": lambda _: transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3_06B)),
    "qwen2.5-vl": _qwen25_vl,
    "llama": lambda _: transformers.LlamaModel(transformers.LlamaConfig(**LLAMA_8B)),
    "gemma2": lambda _: transformers.Gemma2Model(transformers.Gemma2Config(**GEMMA2_2B)),
}


def _as_it_is(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


_INITIALISERS = {
    name: _as_it_is for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")
}


def on_meta(make: Callable[..., nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    """Make a model without its numbers.

    Nothing initialises them either: on the meta device that takes half of the time.
    """
    with torch.device("meta"), mock.patch.multiple(nn.init, **_INITIALISERS):
        return make(*arguments, **options)


@functools.cache
def weights(family: str, component: str) -> Mapping[str, tuple[int, ...]]:
    """Path of every module that has a weight -> the weight's shape; and of every parameter that is
    neither weight nor bias."""
    models = list(_models(family, component))
    return {
        name.removesuffix(".weight").removeprefix("text_model."): tuple(parameter.shape)
        for model in models
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not name.endswith(".bias")
    }


def _models(family: str, component: str) -> Iterator[nn.Module]:
    if component in PARTS:
        kind, released = PARTS[component]
    elif family in TEXT_ENCODERS:
        yield on_meta(TEXT_ENCODERS[family], component)
        return
    else:
        kind, options = DENOISERS[family]
        released = (options, *OTHERS.get(family, ()))
    for options in released:
        yield on_meta(kind, **options)
