"""What pipelines are called with, by rules on the names of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bare_pipelines import noise
from PIL import Image
from support.sweep.settings import POOLED, WIDTH
from support.sweep.stable_diffusion import is_stable_diffusion
from torch.nn import functional

STEPS, PIXELS, FRAMES, TOKENS = 4, 64, 5, 6

#: Pixels of a picture of Stable Diffusion's.
FEW = 16


def picture(pixels: int, seed: int = 8) -> Image.Image:
    """A smooth picture of random colours."""
    colours = functional.interpolate(noise(1, 3, 4, 4, seed=seed).sigmoid(), pixels, mode="bicubic")
    values = (255 * colours[0].clamp(0, 1)).permute(1, 2, 0).to(torch.uint8)
    return Image.fromarray(values.numpy())


def mask(pixels: int) -> Image.Image:
    """White to the left."""
    return Image.fromarray((255 * MASK[0, 0, :pixels, :pixels]).to(torch.uint8).numpy())


IMAGE = noise(1, 3, PIXELS, PIXELS, seed=8).sigmoid()
MASK = (torch.arange(PIXELS) < PIXELS // 2).float().expand(1, 1, PIXELS, PIXELS)

#: Argument -> what a pipeline that has it is called with.
ARGUMENTS: Mapping[str, Any] = {
    **{
        f"{sign}{name}": noise(1, TOKENS, WIDTH, seed=len(sign))
        for sign in ("", "negative_")
        for name in ("prompt_embeds", "prompt_embeds_2", "prompt_embeds_t5", "prompt_embeds_qwen")
    },
    **{
        f"{sign}{name}": noise(1, POOLED, seed=len(sign))
        for sign in ("", "negative_")
        for name in ("pooled_prompt_embeds", "prompt_embeds_clip")
    },
    **{
        f"{sign}prompt_embeds_llama3": noise(2, 1, TOKENS, WIDTH, seed=len(sign))
        for sign in ("", "negative_")
    },
    **{
        f"{sign}prompt_cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32)
        for sign in ("", "negative_")
    },
    **{
        f"{sign}{name}": torch.ones(1, TOKENS, dtype=torch.long)
        for sign in ("", "negative_")
        for name in (
            *("prompt_attention_mask", "prompt_embeds_mask", "prompt_mask", "attention_mask"),
            *("prompt_attention_mask_2", "prompt_embeds_mask_2", "encoder_attention_mask"),
        )
    },
    "num_inference_steps": STEPS,
    "height": PIXELS,
    "width": PIXELS,
    "num_frames": FRAMES,
    "frames": FRAMES,
    "video_length": FRAMES,
    "max_sequence_length": TOKENS,
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": None,
    "decoder_num_inference_steps": STEPS,
    "prior_num_inference_steps": STEPS,
    "super_res_num_inference_steps": STEPS,
    "output_type": "latent",
}

#: Argument -> what a pipeline that cannot do without it is called with.
WHERE_NEEDED: Mapping[str, Any] = {
    "image": IMAGE,
    "mask_image": MASK,
    "control_image": IMAGE,
    "class_labels": [1],
    "prompt": None,
    "image_embeds": noise(1, WIDTH, seed=3),
    "negative_image_embeds": noise(1, WIDTH, seed=4),
    "hint": IMAGE,
    "source_prompt": "a dog",
    "example_image": picture(FEW),
    "pose_video": [picture(PIXELS, seed) for seed in range(FRAMES)],
    "face_video": [picture(FEW, seed) for seed in range(FRAMES)],
    "video": [picture(PIXELS, seed) for seed in range(FRAMES)],
}

#: Argument -> what a pipeline that reads words is called with, where it has that argument.
WITH_WORDS: Mapping[str, Any] = {
    "prompt": "a fox",
    "num_inference_steps": STEPS,
    "guidance_scale": 3.0,
    "output_type": "latent",
}

#: The same, of a pipeline of Stable Diffusion.
STABLE_DIFFUSION: Mapping[str, Any] = {
    **WITH_WORDS,
    "height": FEW,
    "width": FEW,
    "image": IMAGE[..., :FEW, :FEW],
    "mask_image": MASK[..., PIXELS // 2 - FEW // 2 : PIXELS // 2 + FEW // 2][..., :FEW, :],
    "control_image": IMAGE[..., :FEW, :FEW],
    "num_frames": 2,
    "video_length": 2,
    "conditioning_frames": [picture(FEW, seed) for seed in range(2)],
    "video": [picture(FEW, seed) for seed in range(2)],
    "strength": 0.8,
    "clean_caption": False,
}

#: Word in the name of a pipeline -> arguments that it then gets, where it has them.
BY_NAME: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("Img2Img", "ImageTo", "I2V", "I2I", "Edit", "Upscale"), ("image",)),
    "Inpaint": ("image", "mask_image"),
    "VideoTo": ("video",),
    "ControlNet": ("control_image",),
    "Control": ("control_image", "control_video"),
}

#: Argument -> what a pipeline whose name asks for it is called with.
ASKED: Mapping[str, Any] = {
    **WHERE_NEEDED,
    "control_video": WHERE_NEEDED["video"],
}

_IMAGE = {"image": IMAGE}
_CONTROL = {"control_image": IMAGE}
_BOOL_MASKS = {
    f"{sign}prompt_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool)
    for sign in ("", "negative_")
}
_MASKED = {"image": IMAGE, "mask_image": MASK}
_CLIP_AND_T5 = {
    f"{sign}prompt_{name}": value
    for sign in ("", "negative_")
    for name, value in {
        "embeds_2": ARGUMENTS["prompt_embeds"],
        "attention_mask_2": ARGUMENTS["prompt_attention_mask"],
    }.items()
}

_LISTS = {
    f"{sign}prompt_embeds": [ARGUMENTS[f"{sign}prompt_embeds"][0]] for sign in ("", "negative_")
}
_SMALL = {"height": FEW, "width": FEW}
_SMALL_IMAGE = {**_SMALL, "image": IMAGE[..., :FEW, :FEW]}
_POOLED = {
    f"{sign}prompt_embeds_pooled": noise(1, 1, POOLED, seed=len(sign)) for sign in ("", "negative_")
}

_SOUND = {
    "prompt": None,
    "audio_length_in_s": 0.5,
    **{f"{sign}prompt_embeds": noise(1, WIDTH, seed=len(sign)) for sign in ("", "negative_")},
}
_CLOZE = {
    "task_prompt": "a task",
    "content_prompt": "a fox",
    "image": [[picture(PIXELS), picture(PIXELS, 2)], [picture(PIXELS, 3), None]],
}

#: Pipeline -> arguments of its own.
OWN_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "AnyFlowFARPipeline": {"num_frames": 9},
    "ChromaInpaintPipeline": _BOOL_MASKS,
    **{
        f"Marigold{name}Pipeline": {
            "num_inference_steps": STEPS,
            "processing_resolution": 0,
            "match_input_resolution": False,
            "output_type": "pt",
        }
        for name in ("Depth", "Intrinsics", "Normals")
    },
    **{
        f"Amused{name}Pipeline": {
            f"{sign}{given}": value
            for sign in ("", "negative_")
            for given, value in {
                "prompt_embeds": noise(1, POOLED, seed=len(sign)),
                "encoder_hidden_states": noise(1, TOKENS, WIDTH, seed=len(sign)),
            }.items()
        }
        for name in ("", "Img2Img", "Inpaint")
    },
    "AudioLDM2Pipeline": {
        "audio_length_in_s": 0.5,
        **{
            f"{sign}generated_prompt_embeds": noise(1, 4, WIDTH, seed=len(sign))
            for sign in ("", "negative_")
        },
    },
    "AudioLDMPipeline": _SOUND,
    "MusicLDMPipeline": _SOUND,
    "CycleDiffusionPipeline": {"eta": 0.1},
    "DanceDiffusionPipeline": {"num_inference_steps": STEPS},
    "GlmImagePipeline": {"prior_token_ids": torch.arange(16)[None]},
    "EasyAnimateInpaintPipeline": {
        "video": noise(1, 3, FRAMES, PIXELS, PIXELS).sigmoid(),
        "mask_video": torch.ones(1, 1, FRAMES, PIXELS, PIXELS),
    },
    "JoyImageEditPipeline": {"image": picture(PIXELS)},
    "JoyImageEditPlusPipeline": {"images": [[picture(PIXELS)]]},
    **{
        f"QwenImageEdit{name}Pipeline": {"image": picture(PIXELS)}
        for name in ("", "Plus", "Inpaint")
    },
    "QwenImageLayeredPipeline": {"image": picture(PIXELS), "layers": 1},
    "StableAudioPipeline": {"audio_end_in_s": 1.0},
    **{
        f"StableAudio3{name}Pipeline": {"duration": 1.0} for name in ("", "AudioToAudio", "Inpaint")
    },
    "StableDiffusionAttendAndExcitePipeline": {
        "token_indices": [[1]],
        "attn_res": (4, 4),
        "max_iter_to_alter": 0,
        "thresholds": {},
    },
    "StableDiffusionDepth2ImgPipeline": {"depth_map": noise(1, FEW, FEW)},
    "StableDiffusionGLIGENPipeline": {
        "gligen_phrases": ["fox"],
        "gligen_boxes": [[0.0, 0.0, 0.5, 0.5]],
    },
    "StableDiffusionLDM3DPipeline": {"output_type": "np"},
    "StableDiffusionPipelineSafe": {"output_type": "np"},
    "StableDiffusionParadigmsPipeline": {"parallel": 2},
    **{
        f"StableDiffusionXLControlNetUnion{name}Pipeline": {"control_mode": [0]}
        for name in ("", "Img2Img", "Inpaint")
    },
    "TextToVideoZeroPipeline": {"t0": 1, "t1": 2},
    "TextToVideoZeroSDXLPipeline": {"t0": 1, "t1": 2},
    "VisualClozePipeline": _CLOZE,
    "VisualClozeGenerationPipeline": _CLOZE,
    "HunyuanVideo15ImageToVideoPipeline": {"image": picture(PIXELS)},
    "Krea2Pipeline": {
        f"{sign}prompt_embeds": noise(1, TOKENS, 2, WIDTH, seed=len(sign))
        for sign in ("", "negative_")
    },
    "LatentConsistencyModelPipeline": {"original_inference_steps": 50},
    "LatentConsistencyModelImg2ImgPipeline": {"original_inference_steps": 50},
    "KandinskyPipeline": {"output_type": "pt"},
    "KandinskyImg2ImgPipeline": {"output_type": "pt", "strength": 0.9},
    "KandinskyInpaintPipeline": {"output_type": "pt"},
    "Kandinsky3Img2ImgPipeline": {"strength": 0.9},
    "KandinskyV22Img2ImgPipeline": {"strength": 0.9},
    "KandinskyV22ControlnetPipeline": {"hint": noise(1, 3, 256, 256, seed=2)},
    "KandinskyV22ControlnetImg2ImgPipeline": {
        "hint": noise(1, 3, 256, 256, seed=2),
        "strength": 0.9,
    },
    "ConsistencyModelPipeline": {"output_type": "pt"},
    "BriaFiboEditPipeline": {"image": picture(PIXELS), "prompt": '{"a": "fox"}'},
    "BriaFiboPipeline": {"prompt": '{"a": "fox"}'},
    "HunyuanDiTControlNetPipeline": {**_CLIP_AND_T5, **_CONTROL},
    "HunyuanVideoFramepackPipeline": {"num_frames": 9, "latent_window_size": 3},
    "IFImg2ImgPipeline": {"image": _SMALL_IMAGE["image"]},
    "IFImg2ImgSuperResolutionPipeline": {
        "image": _SMALL_IMAGE["image"],
        "original_image": _SMALL_IMAGE["image"],
    },
    "IFInpaintingPipeline": {"image": _SMALL_IMAGE["image"], "mask_image": MASK[..., 24:40, 24:40]},
    "IFInpaintingSuperResolutionPipeline": {
        "image": _SMALL_IMAGE["image"],
        "original_image": _SMALL_IMAGE["image"],
        "mask_image": MASK[..., 24:40, 24:40],
    },
    "IFPipeline": _SMALL,
    "IFSuperResolutionPipeline": _SMALL_IMAGE,
    "LongCatImagePipeline": {"enable_prompt_rewrite": False},
    "RePaintPipeline": {
        "image": IMAGE[..., :FEW, :FEW],
        "mask_image": MASK[..., 24:40, 24:40],
        "jump_length": 1,
        "jump_n_sample": 1,
    },
    "SanaSprintImg2ImgPipeline": {"intermediate_timesteps": None},
    "SanaSprintPipeline": {"intermediate_timesteps": None},
    "StableCascadePriorPipeline": {**_POOLED, "height": 256, "width": 256},
    "StableCascadeDecoderPipeline": {**_POOLED, "image_embeddings": noise(1, 16, 6, 6)},
    "WuerstchenPriorPipeline": {"height": 256, "width": 256},
    "WuerstchenDecoderPipeline": {"image_embeddings": noise(1, 4, 6, 6)},
    "WanAnimatePipeline": {"segment_frame_length": FRAMES},
    "ZImageControlNetPipeline": _LISTS,
    "ZImageControlNetInpaintPipeline": _LISTS,
    "ZImageOmniPipeline": _LISTS,
    "ZImagePipeline": _LISTS,
    "ErnieImagePipeline": _LISTS,
    "ChromaImg2ImgPipeline": {**_IMAGE, **_BOOL_MASKS},
    "ChromaPipeline": _BOOL_MASKS,
    "CogView4ControlPipeline": _CONTROL,
    "FluxControlImg2ImgPipeline": {**_IMAGE, **_CONTROL},
    "FluxControlInpaintPipeline": {**_MASKED, **_CONTROL},
    "FluxControlNetImg2ImgPipeline": {**_IMAGE, **_CONTROL},
    "FluxControlNetInpaintPipeline": {**_MASKED, **_CONTROL},
    "FluxControlNetPipeline": _CONTROL,
    "FluxControlPipeline": _CONTROL,
    "FluxImg2ImgPipeline": _IMAGE,
    "FluxInpaintPipeline": _MASKED,
    "FluxFillPipeline": _MASKED,
    "FluxKontextInpaintPipeline": {**_MASKED, "max_area": PIXELS**2, "_auto_resize": False},
    "FluxKontextPipeline": {**_IMAGE, "max_area": PIXELS**2, "_auto_resize": False},
    "HunyuanDiTPAGPipeline": _CLIP_AND_T5,
    "HunyuanDiTPipeline": _CLIP_AND_T5,
    "LattePipeline": {"video_length": 2},
    "QwenImageImg2ImgPipeline": _IMAGE,
    "QwenImageInpaintPipeline": _MASKED,
    "StableDiffusion3ControlNetInpaintingPipeline": {
        "control_image": IMAGE,
        "control_mask": MASK,
    },
    "StableDiffusion3ControlNetPipeline": _CONTROL,
    "StableDiffusion3Img2ImgPipeline": _IMAGE,
    "StableDiffusion3InpaintPipeline": _MASKED,
    "StableDiffusion3PAGImg2ImgPipeline": _IMAGE,
    "ZImageImg2ImgPipeline": {**_LISTS, **_IMAGE},
    "ZImageInpaintPipeline": {**_LISTS, **_MASKED},
}


def arguments_of(pipe: Any) -> dict[str, Any]:
    """What a pipeline is called with."""
    kind = type(pipe)
    own = OWN_ARGUMENTS.get(kind.__name__, {})
    named = inspect.signature(kind.__call__).parameters
    rest = {name: value for name, value in WHERE_NEEDED.items() if _needs(named, name)}
    if is_stable_diffusion(kind):
        given = {name: value for name, value in STABLE_DIFFUSION.items() if name in named}
        return {**rest, **given, **own}
    asked = {
        name: ASKED[name]
        for word, names in BY_NAME.items()
        if word in kind.__name__
        for name in names
        if name in named
    }
    common = {name: value for name, value in ARGUMENTS.items() if name in named}
    if "negative_prompt_embeds" in named and "negative_prompt" in named:
        common["negative_prompt"] = None  # some have an empty text
    if common.get("output_type") and named["output_type"].default == "pt":
        del common["output_type"]  # embeddings or sounds
    words = WITH_WORDS if getattr(pipe, "tokenizer", None) is not None else {}
    spoken = {n: v for n, v in words.items() if n in named and n not in ARGUMENTS}
    return {**common, **rest, **asked, **spoken, **own}


def _needs(named: Mapping[str, inspect.Parameter], name: str) -> bool:
    return name in named and named[name].default is inspect.Parameter.empty
