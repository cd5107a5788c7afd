"""The double of ``comfy.lora``: names in files -> parameters, and the reader of LoRAs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_DENOISER = "diffusion_model."

#: Some modules of SD 1.x in ComfyUI's names -> in diffusers', with underscores.
OF_SD1 = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks_0_resnets_0_conv1",
    "input_blocks.1.1.proj_in": "down_blocks_0_attentions_0_proj_in",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": (
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    ),
    "output_blocks.11.1.proj_out": "up_blocks_3_attentions_2_proj_out",
}

#: Attention and feed-forward layers of CLIP, and how trainers write them.
_OF_CLIP = {
    "self_attn.q_proj": "self_attn_q_proj",
    "self_attn.k_proj": "self_attn_k_proj",
    "self_attn.v_proj": "self_attn_v_proj",
    "self_attn.out_proj": "self_attn_out_proj",
    "mlp.fc1": "mlp_fc1",
    "mlp.fc2": "mlp_fc2",
}


def model_lora_keys_unet(model: Any, key_map: dict[str, Any]) -> dict[str, Any]:
    for key in model.state_dict():
        if not key.startswith(_DENOISER):
            continue
        if not key.endswith(".weight"):
            key_map[key] = key
            continue
        module = key.removeprefix(_DENOISER).removesuffix(".weight")
        key_map[f"lora_unet_{module.replace('.', '_')}"] = key
        key_map[_DENOISER + module] = key
        if module in OF_SD1:
            key_map[f"lora_unet_{OF_SD1[module]}"] = key
    return key_map


def model_lora_keys_clip(model: Any, key_map: dict[str, Any]) -> dict[str, Any]:
    keys = model.state_dict()
    for key in keys:
        if key.endswith(".weight"):
            key_map[f"text_encoders.{key.removesuffix('.weight')}"] = key
    for block in range(32):
        for module, name in _OF_CLIP.items():
            key = f"clip_l.transformer.text_model.encoder.layers.{block}.{module}.weight"
            if key in keys:
                for prefix in ("lora_te", "lora_te1"):
                    key_map[f"{prefix}_text_model_encoder_layers_{block}_{name}"] = key
    return key_map


def load_lora(
    lora: Mapping[str, torch.Tensor], to_load: Mapping[str, str], log_missing: bool = True
) -> dict[str, torch.Tensor]:
    """Return parameter -> delta; without an alpha, a LoRA is up @ down."""
    patches = {}
    for name, key in to_load.items():
        if f"{name}.lora_up.weight" in lora:
            patches[key] = lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"]
        if f"{name}.diff" in lora:
            patches[key] = lora[f"{name}.diff"]
        if f"{name}.diff_b" in lora:
            patches[key.removesuffix("weight") + "bias"] = lora[f"{name}.diff_b"]
    return patches
