"""HunyuanVideo in the names of its authors (Tencent-Hunyuan/HunyuanVideo) and in ComfyUI's.

musubi-tuner and diffusion-pipe write the authors'. The lists of blocks have FLUX.1's names,
``double_blocks`` and ``single_blocks``, but the modules inside differ: ``img_attn_qkv`` is FLUX.1's
``img_attn.qkv``, ``img_mlp.fc1`` is ``img_mlp.0``, and ``img_mod.linear`` is ``img_mod.lin``. With
underscores for dots, the first pair is one name; ``single_blocks_N_linear1`` is the same name
anyway. So a file that adapts only attention and ``linear1`` fits both tables, and both models are
3072 wide. Without metadata, only double block 19 and single blocks 38 and 39, which FLUX.1 lacks,
show that a file is HunyuanVideo's. The mapping to diffusers' names follows
``convert_hunyuan_video_transformer_to_diffusers`` in its ``loaders/single_file_utils.py``.

ComfyUI builds the model from FLUX.1's blocks (``comfy/ldm/hunyuan_video/model.py``), so its blocks
have FLUX.1's names. The modules around them, mostly a refiner of text tokens, have other names.
Files that ComfyUI or its nodes extract have these names.
"""

from __future__ import annotations

from itertools import chain

from klora_runtime.families import flux1
from klora_runtime.families.family import MUSUBI_TUNER, Family, Kohya, Mark, Script, TextEncoder
from klora_runtime.families.rows import (
    Layout,
    Row,
    renamed,
    square_thirds_and_rest,
    swapped_halves,
    thirds,
)
from klora_runtime.families.text_encoders import CLIP, LLAMA

_DOUBLE, _SINGLE = "double_blocks.{}", "single_blocks.{}"
_JOINT, _ONE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_REFINER = "txt_in.individual_token_refiner.blocks.{}"
_REFINED = "context_embedder.token_refiner.refiner_blocks.{}"
_SEQUENTIAL = {"mlp.0": "linear_1", "mlp.2": "linear_2"}

_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
_LINEAR1 = tuple(f"{_ONE}.{name}" for name in (*(f"attn.{n}" for n in _QKV), "proj_mlp"))

_BLOCKS = (
    Row(f"{_DOUBLE}.img_attn_qkv", tuple(f"{_JOINT}.attn.{n}" for n in _QKV), thirds),
    Row(f"{_DOUBLE}.txt_attn_qkv", tuple(f"{_JOINT}.attn.{n}" for n in _ADDED_QKV), thirds),
    *renamed(
        _DOUBLE,
        _JOINT,
        {
            "img_attn_k_norm": "attn.norm_k",
            "img_attn_proj": "attn.to_out.0",
            "img_attn_q_norm": "attn.norm_q",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "img_mod.linear": "norm1.linear",
            "txt_attn_k_norm": "attn.norm_added_k",
            "txt_attn_proj": "attn.to_add_out",
            "txt_attn_q_norm": "attn.norm_added_q",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
            "txt_mod.linear": "norm1_context.linear",
        },
    ),
    Row(f"{_SINGLE}.linear1", _LINEAR1, square_thirds_and_rest),
    *renamed(
        _SINGLE,
        _ONE,
        {
            "k_norm": "attn.norm_k",
            "linear2": "proj_out",
            "modulation.linear": "norm.linear",
            "q_norm": "attn.norm_q",
        },
    ),
)
_TOKEN_REFINER = (
    Row(f"{_REFINER}.self_attn_qkv", tuple(f"{_REFINED}.attn.{n}" for n in _QKV), thirds),
    *renamed(
        _REFINER,
        _REFINED,
        {
            "adaLN_modulation.1": "norm_out.linear",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "norm1": "norm1",
            "norm2": "norm2",
            "self_attn_proj": "attn.to_out.0",
        },
    ),
    Row("txt_in.input_embedder", ("context_embedder.proj_in",)),
    *renamed(
        "txt_in",
        "context_embedder.time_text_embed",
        {
            "c_embedder.linear_1": "text_embedder.linear_1",
            "c_embedder.linear_2": "text_embedder.linear_2",
            "t_embedder.mlp.0": "timestep_embedder.linear_1",
            "t_embedder.mlp.2": "timestep_embedder.linear_2",
        },
    ),
)

ORIGINAL = Layout(
    name="hunyuan",
    family="hunyuan-video",
    component="transformer",
    rows=(
        *_BLOCKS,
        *_TOKEN_REFINER,
        *chain.from_iterable(
            renamed(source, f"time_text_embed.{target}", names)
            for source, target, names in (
                ("time_in", "timestep_embedder", _SEQUENTIAL),
                ("guidance_in", "guidance_embedder", _SEQUENTIAL),
                (
                    "vector_in",
                    "text_embedder",
                    {"in_layer": "linear_1", "out_layer": "linear_2"},
                ),
            )
        ),
        Row("img_in.proj", ("x_embedder.proj",)),
        Row("final_layer.linear", ("proj_out",)),
        Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped_halves),
    ),
)

_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}

COMFY = Layout(
    name="comfy",
    family="hunyuan-video",
    component="transformer",
    rows=(
        *(row for row in flux1.BFL.rows if row.source.startswith((_DOUBLE, _SINGLE))),
        Row(f"{_REFINER}.self_attn.qkv", tuple(f"{_REFINED}.attn.{n}" for n in _QKV), thirds),
        *renamed(
            _REFINER,
            _REFINED,
            {
                "adaLN_modulation.1": "norm_out.linear",
                "mlp.0": "ff.net.0.proj",
                "mlp.2": "ff.net.2",
                "norm1": "norm1",
                "norm2": "norm2",
                "self_attn.proj": "attn.to_out.0",
            },
        ),
        Row("txt_in.input_embedder", ("context_embedder.proj_in",)),
        *chain.from_iterable(
            renamed(source, target, _LAYERS)
            for source, target in (
                ("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder"),
                ("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder"),
                ("time_in", "time_text_embed.timestep_embedder"),
                ("guidance_in", "time_text_embed.guidance_embedder"),
                ("vector_in", "time_text_embed.text_embedder"),
            )
        ),
        Row("img_in.proj", ("x_embedder.proj",)),
        Row("final_layer.linear", ("proj_out",)),
        Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped_halves),
    ),
)

FAMILY = Family(
    key="hunyuan-video",
    title="HunyuanVideo",
    pipeline="HunyuanVideoPipeline",
    hub="hunyuanvideo-community/HunyuanVideo",
    models=(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
    ),
    task="text-to-video",
    layouts=(ORIGINAL, COMFY),
    blocks={
        "context_embedder.token_refiner.refiner_blocks": 2,
        "transformer_blocks": 20,
        "single_transformer_blocks": 40,
    },
    widths=flux1.FAMILY.widths,
    marks=(Mark(r"^context_embedder\.token_refiner\.", (3072,)),),
    named_after=flux1.FAMILY,
    shares_marks_of=(flux1.FAMILY,),
    # HunyuanVideo 1.5 is another model.
    stated=r"hunyuan-video(?!-1-5)",
    script=Script("networks.lora", MUSUBI_TUNER),
    # In ComfyUI's names: it reads musubi-tuner's own only after that trainer's converter.
    kohya=Kohya(
        (COMFY,),
        {
            "ss_base_model_version": "hunyuan_video",
            "modelspec.architecture": "hunyuan-video/lora",
        },
    ),
    text_encoders=(
        TextEncoder("text_encoder", LLAMA, others=("lora_te1_",), comfy="llama"),
        TextEncoder("text_encoder_2", CLIP, others=("lora_te2_",), comfy="clip_l"),
    ),
    missing={
        "tag": "diffusers has no trainer for it",
    },
)
