"""A tiny checkpoint of ComfyUI's own classes: denoiser, text encoders and picture decoder."""

from __future__ import annotations

from typing import Any

import torch
from support.comfyui.encoders import tiny_clip
from support.comfyui.models import filled

_VAE = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True,
        "z_channels": 4,
        "resolution": 64,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    },
}


def tiny_vae() -> Any:
    """ComfyUI's ``VAE`` with random weights, in float32; 8 pixels a latent."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    numbers = filled(AutoencoderKL(**_VAE)).state_dict()
    return comfy.sd.VAE(numbers, config={"params": _VAE}, dtype=torch.float32)


def loader(patcher: Any, options: list[str]) -> type:
    """A node in place of *Load Checkpoint*: ComfyUI recognises no model of another size.

    Args:
        patcher: what it gives as the model.
        options: the files that it lists.
    """

    class TinyCheckpoint:
        RETURN_TYPES = ("MODEL", "CLIP", "VAE")
        FUNCTION = "load"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"ckpt_name": (options,)}}

        def load(self, ckpt_name: str) -> tuple[Any, Any, Any]:
            return patcher, tiny_clip("sdxl", width=12), tiny_vae()

    return TinyCheckpoint
