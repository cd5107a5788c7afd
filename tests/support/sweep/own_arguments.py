"""What one pipeline is called with, where no rule on names says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bare_pipelines import noise
from support.sweep.inputs import EMBEDDED, FEW, FRAMES, IMAGE, MASK, PIXELS, STEPS, TOKENS, picture
from support.sweep.settings import POOLED, WIDTH

_IMAGE = {"image": IMAGE}
_CONTROL = {"control_image": IMAGE}
_BOOL_MASKS = {
    f"{sign}prompt_attention_mask": torch.ones(1, TOKENS, dtype=torch.bool)
    for sign in ("", "negative_")
}
_BOOL_EMBEDS_MASKS = {
    f"{sign}prompt_embeds_mask": torch.ones(1, TOKENS, dtype=torch.bool)
    for sign in ("", "negative_")
}
_MASKED = {"image": IMAGE, "mask_image": MASK}
_CLIP_AND_T5 = {
    f"{sign}prompt_{name}": value
    for sign in ("", "negative_")
    for name, value in {
        "embeds_2": EMBEDDED["prompt_embeds"],
        "attention_mask_2": EMBEDDED["prompt_attention_mask"],
    }.items()
}

_LISTS = {
    f"{sign}prompt_embeds": [EMBEDDED[f"{sign}prompt_embeds"][0]] for sign in ("", "negative_")
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
    "AnyFlowFARPipeline": {"num_frames": 9, "guidance_scale": 3.0},
    "CosmosVideoToWorldPipeline": {"num_frames": 9},
    "Cosmos2VideoToWorldPipeline": {"num_frames": 9},
    "Cosmos2_5_TransferPipeline": {
        "controls": [picture(PIXELS, seed) for seed in range(FRAMES)],
        "num_frames_per_chunk": FRAMES,
    },
    "Kandinsky5I2VPipeline": {"num_frames": 17},
    "LTXImageToVideoPipeline": {"num_frames": 9},
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
    "JoyImageEditPlusPipeline": {"images": [[picture(PIXELS)]], "prompt": "a fox"},
    **{
        f"QwenImageEdit{name}Pipeline": {"image": picture(PIXELS)}
        for name in ("", "Plus", "Inpaint")
    },
    "QwenImageLayeredPipeline": {"image": picture(PIXELS), "layers": 1, "output_type": "pt"},
    "StableAudioPipeline": {"audio_end_in_s": 1.0},
    **{
        f"StableAudio3{name}Pipeline": {"duration": 1.0, "output_type": "latent", **own}
        for name, own in {
            "": {},
            "AudioToAudio": {"audio": noise(1, 2, FEW)},
            "Inpaint": {
                "audio": noise(1, 2, FEW),
                "mask_start_seconds": 0.25,
                "mask_end_seconds": 0.75,
            },
        }.items()
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
    "VisualClozePipeline": {**_CLOZE, "upsampling_height": PIXELS, "upsampling_width": PIXELS},
    "VisualClozeGenerationPipeline": _CLOZE,
    "HunyuanVideo15ImageToVideoPipeline": {"image": picture(PIXELS)},
    "Ideogram4Pipeline": {"guidance_schedule": None, "max_sequence_length": 32},
    "KandinskyV22PriorEmb2EmbPipeline": {"image": picture(FEW), "strength": 0.9},
    "LDMSuperResolutionPipeline": {"image": picture(PIXELS)},
    "ShapEImg2ImgPipeline": {"image": picture(FEW)},
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": {"overlap_history": 1},
    "Kandinsky6SRPipeline": {"output_type": "pt"},
    "Kandinsky6TI2VAPipeline": {"sample_audio": False, "image": None},
    **{
        f"LTX2{name}Pipeline": {"height": 32, "width": 32, **own}
        for name, own in {
            **{name: {} for name in ("", "Condition", "DFR", "HDR", "InContext")},
            "ImageToVideo": {"image_crf": 0},
        }.items()
    },
    "Cosmos3OmniPipeline": {
        "prompt": "a fox",
        "num_frames": 1,
        "use_system_prompt": False,
        "add_resolution_template": False,
        "add_duration_template": False,
    },
    "VersatileDiffusionDualGuidedPipeline": {"image": picture(FEW)},
    "UnCLIPImageVariationPipeline": {"image": picture(FEW)},
    "SanaWMPipeline": {
        "image": picture(PIXELS),
        "action": "w-1",
        "intrinsics": [float(PIXELS), float(PIXELS), PIXELS / 2, PIXELS / 2],
        "prompt": "a fox",
    },
    **{
        f"LEditsPPPipelineStableDiffusion{name}": {
            "editing_prompt": ["a dog"],
            "reverse_editing_direction": [False],
            "edit_guidance_scale": [3.0],
            "use_cross_attn_mask": False,
            "use_intersect_mask": False,
        }
        for name in ("", "XL")
    },
    "StableVideoDiffusionPipeline": {**_SMALL, "image": picture(FEW)},
    "QwenImageControlNetInpaintPipeline": {**_CONTROL, "control_mask": MASK},
    "StableDiffusionGLIGENTextImagePipeline": {
        "gligen_phrases": ["fox"],
        "gligen_images": [picture(FEW)],
        "gligen_boxes": [[0.0, 0.0, 0.5, 0.5]],
    },
    "StableDiffusionPix2PixZeroPipeline": {
        "source_embeds": noise(2, 77, 32, seed=1),
        "target_embeds": noise(2, 77, 32, seed=2),
    },
    "StableDiffusionDiffEditPipeline": {
        "image_latents": noise(1, STEPS - 1, 4, FEW // 2, FEW // 2),
        "mask_image": MASK[:, 0, 24:40:2, 24:40:2],
    },
    "BriaFibo2Pipeline": {
        f"{sign}prompt_embeds": noise(1, 3, TOKENS, WIDTH, seed=len(sign))
        for sign in ("", "negative_")
    },
    "HunyuanImageRefinerPipeline": _IMAGE,
    "Krea2Pipeline": {
        **_BOOL_EMBEDS_MASKS,
        **{
            f"{sign}prompt_embeds": noise(1, TOKENS, 2, WIDTH, seed=len(sign))
            for sign in ("", "negative_")
        },
    },
    "LatentConsistencyModelPipeline": {"original_inference_steps": 50},
    "LatentConsistencyModelImg2ImgPipeline": {"original_inference_steps": 50},
    "KandinskyPipeline": {"output_type": "pt"},
    "KandinskyImg2ImgPipeline": {"output_type": "pt", "strength": 0.9},
    "KandinskyInpaintPipeline": {"output_type": "pt"},
    **{
        f"Kandinsky{name}CombinedPipeline": {
            "output_type": "pt",
            **({"strength": 0.9} if name == "Img2Img" else {}),
        }
        for name in ("", "Img2Img", "Inpaint")
    },
    "KandinskyV22Img2ImgCombinedPipeline": {"strength": 0.9},
    "Kandinsky3Img2ImgPipeline": {"strength": 0.9},
    "KandinskyV22Img2ImgPipeline": {"strength": 0.9},
    "KandinskyV22ControlnetPipeline": {"output_type": "pt", "hint": noise(1, 3, 256, 256, seed=2)},
    "KandinskyV22ControlnetImg2ImgPipeline": {
        "output_type": "pt",
        "hint": noise(1, 3, 256, 256, seed=2),
        "strength": 0.9,
    },
    "ConsistencyModelPipeline": {"output_type": "pt"},
    "BriaFiboEditPipeline": {"image": picture(PIXELS), "prompt": '{"edit_instruction": "fox"}'},
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
    "WuerstchenCombinedPipeline": {"height": 256, "width": 256},
    "StableCascadeCombinedPipeline": {"height": 256, "width": 256},
    "WuerstchenPriorPipeline": {"height": 256, "width": 256},
    "WuerstchenDecoderPipeline": {"image_embeddings": noise(1, 4, 6, 6)},
    "WanAnimatePipeline": {"segment_frame_length": FRAMES},
    "ZImageControlNetPipeline": _LISTS,
    "ZImageControlNetInpaintPipeline": _LISTS,
    "ZImageOmniPipeline": {name: [embedding] for name, embedding in _LISTS.items()},
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
