"""Qwen-Image (also Edit): all trainers keep the names of diffusers, which are its authors'.

musubi-tuner (``qwen_image/qwen_image_model.py``) writes them with underscores after
``lora_unet_``, ai-toolkit with dots after ``diffusion_model.``, OneTrainer after ``transformer.``
or with underscores after ``lora_transformer_``, and some files have nothing in front. The names
are those of diffusers' ``models/transformers/transformer_qwenimage.py``.
"""

from __future__ import annotations

from klora_runtime.families.family import MUSUBI_TUNER, Family, Kohya, Mark, Script, TextEncoder
from klora_runtime.families.rows import Layout, same
from klora_runtime.families.text_encoders import QWEN25_VL

_BLOCK = "transformer_blocks.{}"
_ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "norm_q",
    "norm_k",
    "norm_added_q",
    "norm_added_k",
)

DIFFUSERS = Layout(
    name="diffusers",
    family="qwen-image",
    component="transformer",
    rows=(
        *same(*(f"{_BLOCK}.attn.{name}" for name in _ATTENTION)),
        *same(
            *(
                f"{_BLOCK}.{stream}_{name}"
                for stream in ("img", "txt")
                for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2")
            )
        ),
        *same(
            "img_in",
            "txt_in",
            "txt_norm",
            "time_text_embed.timestep_embedder.linear_1",
            "time_text_embed.timestep_embedder.linear_2",
            "norm_out.linear",
            "proj_out",
        ),
    ),
)

FAMILY = Family(
    key="qwen-image",
    title="Qwen-Image",
    pipeline="QwenImagePipeline",
    hub="Qwen/Qwen-Image",
    models=("QwenImageTransformer2DModel",),
    tag="qwen-image",
    layouts=(DIFFUSERS,),
    blocks={"transformer_blocks": 60},
    marks=(Mark(r"^transformer_blocks\.\d+\.(img|txt)_(mod\.1|mlp\.net\.0\.proj)$", (3072,)),),
    stated=r"qwen-image",
    script=Script("networks.lora_qwen_image", MUSUBI_TUNER),
    kohya=Kohya(
        (DIFFUSERS,),
        {"ss_base_model_version": "qwen_image", "modelspec.architecture": "Qwen-Image/lora"},
    ),
    text_encoders=(
        TextEncoder("text_encoder", QWEN25_VL, others=("lora_te_",), comfy="qwen25_7b"),
    ),
)
