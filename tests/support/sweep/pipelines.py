"""Every pipeline class of the installed diffusers, built and called by rules on names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers
import numpy
import torch
from diffusers import (
    AmusedScheduler,
    AutoencoderKLWan,
    DiffusionPipeline,
    HeliosScheduler,
    IPNDMScheduler,
    SCMScheduler,
)
from PIL import Image
from support.sweep.arguments import PIXELS, arguments_of
from support.sweep.components import make
from support.sweep.settings import WIDTH
from support.sweep.shrinking import tiny
from support.sweep.stable_diffusion import stable_diffusion
from support.sweep.words import tiny_encoder, tiny_tokenizer
from transformers import CLIPTextModelWithProjection, Qwen3Model

_SIMPLE = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "out_channels": 8,
    "cross_attention_dim": WIDTH,
    "encoder_hid_dim": WIDTH,
    "resnet_time_scale_shift": "scale_shift",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
_IF = {
    "unet": {
        **_SIMPLE,
        "in_channels": 3,
        "out_channels": 6,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "act_fn": "gelu",
    }
}

_SOUND = {
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": WIDTH,
    "class_embeddings_concat": True,
    "cross_attention_dim": (8, 16),
}

#: Pipeline -> component -> settings of its own.
OWN_SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ChronoEditPipeline": {
        "transformer": {"in_channels": 36, "image_dim": WIDTH, "added_kv_proj_dim": 16}
    },
    "CogVideoXFunControlPipeline": {"transformer": {"in_channels": 32}},
    "CogVideoXImageToVideoPipeline": {"transformer": {"in_channels": 32}},
    "Cosmos2TextToImagePipeline": {"transformer": {"in_channels": 16, "out_channels": 16}},
    "Cosmos2VideoToWorldPipeline": {"transformer": {"in_channels": 17, "out_channels": 16}},
    "Cosmos2_5_PredictBasePipeline": {"transformer": {"in_channels": 17, "out_channels": 16}},
    "CosmosTextToWorldPipeline": {"transformer": {"in_channels": 16, "out_channels": 16}},
    "CosmosVideoToWorldPipeline": {"transformer": {"in_channels": 17, "out_channels": 16}},
    "HunyuanSkyreelsImageToVideoPipeline": {"transformer": {"in_channels": 8}},
    "HunyuanVideoImageToVideoPipeline": {
        "transformer": {"in_channels": 9, "image_condition_type": "latent_concat"}
    },
    "IFImg2ImgPipeline": _IF,
    "IFInpaintingPipeline": _IF,
    "IFPipeline": _IF,
    **{
        f"IF{name}SuperResolutionPipeline": {
            "unet": {**_IF["unet"], "in_channels": 6, "class_embed_type": "timestep"}
        }
        for name in ("", "Img2Img", "Inpainting")
    },
    "Kandinsky5I2IPipeline": {"transformer": {"visual_cond": True}},
    "Kandinsky5I2VPipeline": {"transformer": {"visual_cond": True}},
    **{
        f"KandinskyV22{name}Pipeline": {
            "unet": {
                **_SIMPLE,
                "addition_embed_type": "image",
                "encoder_hid_dim_type": "image_proj",
            }
        }
        for name in ("", "Img2Img")
    },
    "KandinskyV22InpaintPipeline": {
        "unet": {
            **_SIMPLE,
            "in_channels": 9,
            "addition_embed_type": "image",
            "encoder_hid_dim_type": "image_proj",
        }
    },
    **{
        f"KandinskyV22Controlnet{name}Pipeline": {
            "unet": {
                **_SIMPLE,
                "in_channels": 8,
                "addition_embed_type": "image_hint",
                "encoder_hid_dim_type": "image_proj",
            }
        }
        for name in ("", "Img2Img")
    },
    "LDMSuperResolutionPipeline": {"unet": {"in_channels": 8, "out_channels": 4}},
    "BriaFiboPipeline": {"text_encoder": {"vocab_size": 128_001}},
    "BriaFiboEditPipeline": {"text_encoder": {"vocab_size": 128_001}},
    "ChromaInpaintPipeline": {"vae": {"latent_channels": 16}},
    "AudioLDMPipeline": {"unet": _SOUND},
    "MusicLDMPipeline": {"unet": _SOUND},
    "EasyAnimateControlPipeline": {"transformer": {"in_channels": 8}},
    "EasyAnimateInpaintPipeline": {"transformer": {"in_channels": 9}},
    **{
        f"Kandinsky{name}Pipeline": {
            "text_encoder": {"transformerDimSize": WIDTH, "imageDimSize": WIDTH},
            "unet": {
                **_SIMPLE,
                "in_channels": 9 if name == "Inpaint" else 4,
                "addition_embed_type": "text_image",
                "encoder_hid_dim_type": "text_image_proj",
            },
        }
        for name in ("", "Img2Img", "Inpaint")
    },
    **{
        f"ShapE{name}Pipeline": {
            "prior": {
                "embedding_dim": 16,
                "num_embeddings": 16,
                "embedding_proj_dim": WIDTH,
                "time_embed_dim": 64,
                "clip_embed_dim": 32,
                "additional_embeddings": 0,
                "norm_in_type": "layer",
                "encoder_hid_proj_type": None,
                "added_emb_type": None,
            }
        }
        for name in ("", "Img2Img")
    },
    "StableUnCLIPPipeline": {
        "prior": {"embedding_dim": 32},
        "prior_text_encoder": {"projection_dim": 32, "hidden_size": 32},
    },
    "StableVideoDiffusionPipeline": {"image_encoder": {"image_size": 224, "patch_size": 112}},
    "LDMPipeline": {"unet": {"in_channels": 4, "out_channels": 4}},
    "LucyEditPipeline": {"transformer": {"in_channels": 32}, "transformer_2": {"in_channels": 32}},
    "SanaSprintImg2ImgPipeline": {"transformer": {"guidance_embeds": True}},
    "SanaSprintPipeline": {"transformer": {"guidance_embeds": True}},
    "SkyReelsV2ImageToVideoPipeline": {"transformer": {"in_channels": 36}},
    "StableDiffusion3ControlNetInpaintingPipeline": {
        "controlnet": {"extra_conditioning_channels": 1}
    },
    "StableDiffusion3InpaintPipeline": {
        "vae": {"latent_channels": 16},
        "transformer": {"in_channels": 16, "out_channels": 16},
    },
    "StableCascadeDecoderPipeline": {
        "decoder": {
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "effnet_in_channels": 16,
            "clip_text_in_channels": None,
            "clip_image_in_channels": None,
        }
    },
    "WanImageToVideoPipeline": {
        "transformer": {"in_channels": 36},
        "transformer_2": {"in_channels": 36},
    },
    **{
        f"Flux{name}Pipeline": {"vae": {"latent_channels": 16}}
        for name in (
            *("Img2Img", "Inpaint", "Kontext", "KontextInpaint"),
            *("ControlNet", "ControlNetImg2Img"),
        )
    },
    **{
        f"FluxControl{name}Pipeline": {
            "vae": {"latent_channels": 16},
            "transformer": {"in_channels": 128, "out_channels": 64},
        }
        for name in ("", "Img2Img", "Inpaint")
    },
    "FluxControlNetInpaintPipeline": {"vae": {"latent_channels": 16}},
    "FluxFillPipeline": {
        "vae": {"latent_channels": 4},
        "transformer": {"in_channels": 288, "out_channels": 16},  # 256 for the mask
    },
    "ChromaImg2ImgPipeline": {"vae": {"latent_channels": 16}},
    "BriaPipeline": {"transformer": {"in_channels": 16}},
    "CogView4ControlPipeline": {
        "vae": {"latent_channels": 16},
        "transformer": {"in_channels": 32, "out_channels": 16},
    },
}


#: Pipeline -> components that no rule makes.
OWN_PARTS: Mapping[str, Callable[[], Mapping[str, Any]]] = {
    **dict.fromkeys(
        (
            *("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline"),
            *("Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline"),
            *("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline", "Cosmos3OmniPipeline"),
        ),
        lambda: {"safety_checker": Harmless()},
    ),
    **dict.fromkeys(
        ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"),
        lambda: {"scheduler": SCMScheduler()},
    ),
    **dict.fromkeys(
        (*("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "LucyEditPipeline"),),
        lambda: {"boundary_ratio": 0.5},
    ),
    "AceStepPipeline": lambda: {
        "text_encoder": tiny_encoder(Qwen3Model),
        "tokenizer": tiny_tokenizer(),
    },
    **dict.fromkeys(
        ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline"),
        lambda: {"scheduler": AmusedScheduler(mask_token_id=31)},
    ),
    **dict.fromkeys(
        ("StableCascadePriorPipeline", "StableCascadeDecoderPipeline"),
        lambda: {"text_encoder": tiny_encoder(CLIPTextModelWithProjection)},
    ),
    "HeliosPipeline": lambda: {"scheduler": HeliosScheduler(stages=1, stage_range=[0, 1])},
    "DanceDiffusionPipeline": lambda: {"scheduler": IPNDMScheduler()},
    "StableDiffusionDepth2ImgPipeline": lambda: {"depth_estimator": None},
    "StableDiffusionPix2PixZeroPipeline": lambda: {
        "caption_generator": None,
        "caption_processor": None,
    },
    "VisualClozePipeline": lambda: {"resolution": PIXELS},
    "VisualClozeGenerationPipeline": lambda: {"resolution": PIXELS},
    **dict.fromkeys(
        ("SanaVideoPipeline", "SanaImageToVideoPipeline"),
        lambda: {"vae": tiny(AutoencoderKLWan)},
    ),
}


class Harmless:
    """Stands for a checker that finds nothing."""

    def check_text_safety(self, text: str) -> bool:
        return isinstance(text, str)

    def to(self, *_: Any) -> Harmless:
        return self

    def check_video_safety(self, video: Any) -> Any:
        return video


def pipeline_classes() -> dict[str, type[DiffusionPipeline]]:
    """Name -> class, of all that diffusers exports."""
    found = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if "Pipeline" in name else None
        if isinstance(kind, type) and issubclass(kind, DiffusionPipeline):
            found[kind.__name__] = kind
    del found["DiffusionPipeline"]
    return found


def build(kind: type[DiffusionPipeline]) -> Any:
    """A tiny pipeline of a class.

    Raises:
        TypeError: the rules do not fit its components.
    """
    own = {**stable_diffusion(kind), **OWN_PARTS.get(kind.__name__, dict)()}
    parts = make(kind, own, OWN_SETTINGS.get(kind.__name__, {}))
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any) -> torch.Tensor:
    """All that one generation gives, flat; equal weights and schedules give equal numbers."""
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(7)  # some draw from the global generator
        given = arguments_of(pipe)
        if "generator" in inspect.signature(type(pipe).__call__).parameters:
            given["generator"] = generator
        found = pipe(**given)
    return torch.cat([tensor.flatten().float() for tensor in tensors_in(found)])


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The numbers of an output: of tensors, arrays, pictures, and of all of these that it holds."""
    match value:
        case torch.Tensor():
            yield value
        case numpy.ndarray() if value.dtype != object:
            yield torch.from_numpy(value)
        case Image.Image():
            yield torch.from_numpy(numpy.array(value))
        case Mapping():
            for part in value.values():
                yield from tensors_in(part)
        case list() | tuple():
            for part in value:
                yield from tensors_in(part)
