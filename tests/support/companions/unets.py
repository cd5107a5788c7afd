"""What people put around Stable Diffusion."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from support.companions.companion import Companion, On
from support.families import FamilyCase, square
from support.sd_families import sd, sd_case

#: The denoiser, and what makes its input.
BOTH = ("unet", "text_encoder")


def sd1(**arguments: Any) -> FamilyCase:
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
    Companion("DeepCache", sd1(), _deep_cache, "DeepCache", "DeepCache", components=BOTH),
    Companion("FreeU", sd1(), _free_u, components=BOTH),
    Companion("ToMe (tomesd)", sd1(guidance_scale=1.0), _tome, "tomesd", "tomesd", components=BOTH),
    Companion(
        "HiDiffusion",
        _FULL_DEPTH,
        _hi_diffusion,
        "hidiffusion",
        "hidiffusion",
        components=BOTH,
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
    Companion("compel", sd1(), _compel, "compel", "compel", components=BOTH),
)
