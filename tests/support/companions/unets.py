"""What people put around Stable Diffusion."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from bare_pipelines import noise
from diffusers import UNet2DConditionModel
from support.companions.companion import Companion, On
from support.families import FamilyCase, square
from support.sd_families import sd, sd_case

#: The UNet's part alone, and one that acts on its input.
_BOTH = ("unet", "text_encoder")


def _sd1(**arguments: Any) -> FamilyCase:
    return _of_both(sd_case("SD1", lambda: sd("sd1"), **square(), **arguments))


def _of_both(case: FamilyCase) -> FamilyCase:
    """With LoRAs of the text encoder, too."""
    return replace(case, modules=(*case.modules, "q_proj", "v_proj"))


def _deep_cache(pipe: Any) -> On:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    return On(helper.disable)


def _free_u(pipe: Any) -> On:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return On(pipe.disable_freeu)


def _tome(pipe: Any) -> On:
    import tomesd

    tomesd.apply_patch(pipe, ratio=0.5)
    return On(lambda: tomesd.remove_patch(pipe))


def _hi_diffusion(pipe: Any) -> On:
    moved = "diffusers.pipelines.controlnet.multicontrolnet"  # which it imports
    sys.modules.setdefault(moved, import_module("diffusers.models.controlnets.multicontrolnet"))
    from hidiffusion import apply_hidiffusion, remove_hidiffusion

    apply_hidiffusion(pipe)

    def arguments() -> Mapping[str, Any]:
        """None; but it shifts its windows by torch's random numbers."""
        torch.manual_seed(3)
        return {}

    return On(lambda: remove_hidiffusion(pipe), arguments)


def _compel(pipe: Any) -> On:
    from compel import CompelForSD

    def arguments() -> Mapping[str, Any]:
        """One compel for each generation: it keeps what the text encoder once made of nothing."""
        conditioning = CompelForSD(pipe)("a (fox)1.5, ink", negative_prompt="blurry")
        return {
            "prompt": None,
            "prompt_embeds": conditioning.embeds,
            "negative_prompt_embeds": conditioning.negative_embeds,
        }

    return On(lambda: None, arguments)


def _ip_adapter(pipe: Any) -> On:
    pipe.load_ip_adapter(ip_adapter_weights(pipe.unet), None, "", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)
    embeddings = torch.stack([noise(1, _IMAGE_WIDTH, seed=4), noise(1, _IMAGE_WIDTH, seed=5)])
    return On(pipe.unload_ip_adapter, lambda: {"ip_adapter_image_embeds": [embeddings]})


_IMAGE_WIDTH, _IMAGE_TOKENS = 16, 4


def ip_adapter_weights(unet: UNet2DConditionModel) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights in the layout of the first IP-Adapter."""
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": 0.3 * noise(_IMAGE_TOKENS * width, _IMAGE_WIDTH, seed=1),
        "proj.bias": torch.zeros(_IMAGE_TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    adapter = {}
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            out = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for seed, part in enumerate(("k", "v")):
                key = f"{index}.to_{part}_ip.weight"
                adapter[key] = 0.3 * noise(out, width, seed=10 * index + seed)
    return {"image_proj": projection, "ip_adapter": adapter}


def sd1_of_full_depth() -> Any:
    """With all the blocks of Stable Diffusion 1, by whose names HiDiffusion knows it."""
    pipe = sd("sd1")
    settings = {
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 2,
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
    }
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **settings})
    pipe.register_to_config(_name_or_path="a folder")
    return pipe


_FULL_DEPTH = _of_both(sd_case("SD1 of full depth", sd1_of_full_depth, **square(64)))

UNETS = (
    Companion("DeepCache", _sd1(), _deep_cache, "DeepCache", "DeepCache", components=_BOTH),
    Companion("FreeU", _sd1(), _free_u, components=_BOTH),
    Companion(
        "ToMe (tomesd)", _sd1(guidance_scale=1.0), _tome, "tomesd", "tomesd", components=_BOTH
    ),
    Companion(
        "HiDiffusion",
        _FULL_DEPTH,
        _hi_diffusion,
        "hidiffusion",
        "hidiffusion",
        components=_BOTH,
        quick=False,
    ),
    Companion(
        "HiDiffusion, on LoRAs of its convolutions",
        replace(
            _FULL_DEPTH,
            modules=(*_FULL_DEPTH.modules, "downsamplers.0.conv", "upsamplers.0.conv"),
        ),
        _hi_diffusion,
        "hidiffusion",
        "hidiffusion",
        quick=False,
        after_a_branch=r"2 layers were changed .*\n.*its class was changed to downsampler_block",
    ),
    Companion("compel", _sd1(), _compel, "compel", "compel", components=_BOTH),
    Companion("IP-Adapter", _sd1(), _ip_adapter, components=_BOTH),
)
