"""Models of diffusers made tiny by a rule on the names of their settings.

A model that the rule does not fit has its own settings in :data:`OWN`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

#: Width of prompts' embeddings, of pooled ones, and of a transformer.
WIDTH, POOLED, HIDDEN = 16, 8, 16

#: Numbers that a tiny model may have.
MOST = 3_000_000

#: Setting -> what it is in a tiny model, where its class has it and gives it a default.
SMALL: Mapping[str, Any] = {
    **dict.fromkeys(
        ("num_layers", "n_layers", "depth", "num_layers_per_block", "num_visual_blocks"), 2
    ),
    **dict.fromkeys(
        (
            "num_single_layers",
            "num_refiner_layers",
            "n_refiner_layers",
            "num_mmdit_layers",
            "mmdit_layers",
            "num_single_dit_layers",
            "num_text_blocks",
            "num_key_value_heads",
            "num_kv_heads",
            "layers_per_block",
        ),
        1,
    ),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_kv_heads"), 2),
    **dict.fromkeys(
        (
            "joint_attention_dim",
            "cross_attention_dim",
            "caption_channels",
            "text_embed_dim",
            "text_embed_dim_2",
            "text_dim",
            "text_states_dim",
            "cap_feat_dim",
            "in_text_dim",
            "text_hidden_dim",
            "llm_features_dim",
            "text_in_dim",
        ),
        WIDTH,
    ),
    **dict.fromkeys(("pooled_projection_dim", "in_text_dim2", "time_dim", "freq_dim"), POOLED),
    **dict.fromkeys(
        (
            "hidden_size",
            "dim",
            "model_dim",
            "inner_dim",
            "caption_projection_dim",
            "time_embed_dim",
            "timestep_embed_dim",
            "context_in_dim",
        ),
        HIDDEN,
    ),
    **dict.fromkeys(("ffn_dim", "ff_dim", "intermediate_size"), 32),
    **dict.fromkeys(("attention_head_dim", "sample_size", "timestep_guidance_channels"), 8),
    "pos_embed_max_size": 64,
    "rope_dim_list": (4, 2, 2),
    "rope_axes_dim": (4, 2, 2),
    "axes_dim_rope": (4, 2, 2),
    "multiple_of": 8,
}

#: Widths of a head's part for each axis, by the number of axes; together one head.
AXES = {2: (4, 4), 3: (4, 2, 2), 4: (2, 2, 2, 2)}

_BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4}

#: Class -> settings of its own.
OWN: Mapping[str, Mapping[str, Any]] = {
    "AutoencoderKL": {
        **_BLOCKS,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "shift_factor": 0.0,
    },
    "AutoencoderKLFlux2": {
        **_BLOCKS,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AuraFlowTransformer2DModel": {"pos_embed_max_size": 1024},
    "ChromaTransformer2DModel": {"approximator_hidden_dim": 32, "approximator_layers": 1},
    "CogVideoXTransformer3DModel": {
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": 6,
    },
    "CogView3PlusTransformer2DModel": {"condition_dim": 4},
    "CosmosTransformer3DModel": {
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "mlp_ratio": 2,
        "adaln_lora_dim": 4,
        "max_size": (4, 8, 8),
        "concat_padding_mask": False,
    },
    "ErnieImageTransformer2DModel": {"ffn_hidden_size": 32},
    "Flux2Transformer2DModel": {"in_channels": 16},
    "HiDreamImageTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "caption_channels": [WIDTH, WIDTH],
        "text_emb_dim": POOLED,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (32, 32),
        "llama_layers": [0, 1],
    },
    "HunyuanDiT2DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "mlp_ratio": 2.0,
        "cross_attention_dim_t5": WIDTH,
        "pooled_projection_dim": WIDTH,
        "text_len": 6,
        "text_len_t5": 6,
    },
    "HunyuanImageTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "rope_axes_dim": (4, 4),
    },
    "HunyuanVideo15Transformer3DModel": {
        "in_channels": 9,
        "out_channels": 4,
        "text_embed_2_dim": WIDTH,
        "image_embed_dim": WIDTH,
    },
    "HunyuanVideoTransformer3DModel": {"in_channels": 4, "out_channels": 4},
    "LatteTransformer3DModel": {
        **_HEADS,
        "patch_size": 2,
        "sample_size": 8,
        "norm_type": "ada_norm_single",
        "caption_channels": WIDTH,
        "cross_attention_dim": 16,
        "num_embeds_ada_norm": 1000,
        "norm_elementwise_affine": False,
        "video_length": 2,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 1},
    "NucleusMoEImageTransformer2DModel": {"in_channels": 16, "out_channels": 4, "num_experts": 2},
    "PRXTransformer2DModel": {"axes_dim": [4, 4], "in_channels": 4},
    "PixArtTransformer2DModel": {"cross_attention_dim": 16},
    "SD3Transformer2DModel": {"in_channels": 4, "out_channels": 4},
    "SanaTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
    },
    "SanaVideoTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 12,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
    },
    "WanVACETransformer3DModel": {"vace_layers": [0], "attention_head_dim": 12},
    "ZImageTransformer2DModel": {
        "in_channels": 4,
        "axes_lens": [64, 64, 64],
        "axes_dims": [4, 2, 2],
    },
}


def tiny(kind: type[nn.Module], **settings: Any) -> Any:
    """A model of this class, always with the same weights.

    Raises:
        TypeError: it would not be tiny.
    """
    given = {**_by_rule(kind), **OWN.get(kind.__name__, {}), **settings}
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(**given).parameters())
    if size > MOST:
        raise TypeError(f"no tiny settings of {kind.__name__} are known")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**given)
    return model.eval().requires_grad_(False)


def _by_rule(kind: type[nn.Module]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        default = parameter.default
        if name in ("axes_dims_rope", "axes_dims"):
            given[name] = type(default)(AXES[len(default)])
        elif name in SMALL and default is not None and default is not parameter.empty:
            given[name] = SMALL[name]
    return given
