"""Settings that components of one pipeline have, and no other of their class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.sweep.settings import WIDTH

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

_SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}

_CASCADE_DECODER = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "effnet_in_channels": 16,
    "clip_text_in_channels": None,
    "clip_image_in_channels": None,
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
    "Cosmos3OmniPipeline": {"transformer": {"latent_channel": 16, "patch_latent_dim": 64}},
    "Cosmos2_5_TransferPipeline": {
        "transformer": {
            "in_channels": 17,
            "out_channels": 16,
            "controlnet_block_every_n": 1,
            "concat_padding_mask": True,
            "img_context_dim_in": WIDTH,
            "img_context_num_tokens": 4,
            "img_context_dim_out": WIDTH,
        },
        "controlnet": {"img_context_dim_in": WIDTH, "img_context_dim_out": WIDTH},
    },
    "CosmosTextToWorldPipeline": {"transformer": {"in_channels": 16, "out_channels": 16}},
    "CosmosVideoToWorldPipeline": {"transformer": {"in_channels": 17, "out_channels": 16}},
    "HunyuanSkyreelsImageToVideoPipeline": {"transformer": {"in_channels": 8}},
    "HunyuanVideoImageToVideoPipeline": {
        "transformer": {"in_channels": 9, "image_condition_type": "latent_concat"}
    },
    "HunyuanImageRefinerPipeline": {
        "transformer": {
            "in_channels": 16,
            "out_channels": 8,
            "patch_size": (1, 1, 1),
            "rope_axes_dim": (4, 2, 2),
        }
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
    "LDMSuperResolutionPipeline": {
        "unet": {"in_channels": 6, "out_channels": 3},
        "vqvae": {"latent_channels": 3, "vq_embed_dim": 3},
    },
    "BriaFiboPipeline": {"text_encoder": {"vocab_size": 128_001}},
    "BriaFiboEditPipeline": {"text_encoder": {"vocab_size": 128_001}},
    "ChromaInpaintPipeline": {"vae": {"latent_channels": 16}},
    "AudioLDMPipeline": {"unet": _SOUND, "vae": {"in_channels": 1, "out_channels": 1}},
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
        f"Kandinsky{name}CombinedPipeline": {
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
        f"KandinskyV22{name}CombinedPipeline": {
            "unet": {
                **_SIMPLE,
                "in_channels": 9 if name == "Inpaint" else 4,
                "addition_embed_type": "image",
                "encoder_hid_dim_type": "image_proj",
            }
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
    **{
        f"{name}Pipeline": {"text_encoder": {"text_config": {"rope_parameters": _SECTIONS}}}
        for name in ("LongCatImage", "QwenImageLayered")
    },
    "QwenImageControlNetInpaintPipeline": {"controlnet": {"extra_condition_channels": 4}},
    "ZImageControlNetInpaintPipeline": {"controlnet": {"control_in_dim": 9}},
    "Kandinsky6SRPipeline": {"transformer": {"out_visual_dim": 64}},
    "LTX2DFRPipeline": {"transformer": {"use_keyframes_abs_pos_embedding": True}},
    **{
        f"UnCLIP{name}Pipeline": {
            "decoder": {
                **_SIMPLE,
                "in_channels": 3,
                "out_channels": 6,
                "class_embed_type": "identity",
                "encoder_hid_dim": None,
            },
            "super_res_first": {"in_channels": 6, "out_channels": 3},
            "super_res_last": {"in_channels": 6, "out_channels": 3},
        }
        for name in ("", "ImageVariation")
    },
    "SanaWMPipeline": {"transformer": {"in_channels": 4}},
    "LDMPipeline": {"unet": {"in_channels": 4, "out_channels": 4}},
    "LucyEditPipeline": {"transformer": {"in_channels": 32}, "transformer_2": {"in_channels": 32}},
    "SanaImageToVideoPipeline": {"transformer": {"in_channels": 16, "out_channels": 16}},
    "SanaSprintImg2ImgPipeline": {"transformer": {"guidance_embeds": True}},
    "SanaSprintPipeline": {"transformer": {"guidance_embeds": True}},
    "SkyReelsV2ImageToVideoPipeline": {
        "transformer": {"in_channels": 36, "image_dim": WIDTH, "added_kv_proj_dim": 16}
    },
    "StableDiffusion3ControlNetInpaintingPipeline": {
        "controlnet": {"extra_conditioning_channels": 1}
    },
    "StableDiffusion3InpaintPipeline": {
        "vae": {"latent_channels": 16},
        "transformer": {"in_channels": 16, "out_channels": 16},
    },
    "StableCascadeCombinedPipeline": {
        "decoder": {**_CASCADE_DECODER, "clip_text_pooled_in_channels": WIDTH},
        "prior_prior": {"clip_text_pooled_in_channels": WIDTH},
    },
    "StableCascadeDecoderPipeline": {"decoder": _CASCADE_DECODER},
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
    **{
        f"{name}Pipeline": {
            "vae": {"latent_channels": 4},
            "transformer": {
                "in_channels": 288,  # 256 for the mask
                "out_channels": 16,
                **({"pooled_projection_dim": WIDTH} if "Cloze" in name else {}),
            },
        }
        for name in ("FluxFill", "VisualCloze", "VisualClozeGeneration")
    },
    "ChromaImg2ImgPipeline": {"vae": {"latent_channels": 16}},
    "BriaPipeline": {"transformer": {"in_channels": 16}},
    "CogView4ControlPipeline": {
        "vae": {"latent_channels": 16},
        "transformer": {"in_channels": 32, "out_channels": 16},
    },
}
