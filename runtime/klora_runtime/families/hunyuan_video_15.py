"""HunyuanVideo 1.5 in the names of its authors (Tencent-Hunyuan/HunyuanVideo-1.5) and in ComfyUI's.

musubi-tuner writes the authors' (``hunyuan_video_1_5/hunyuan_video_1_5_models.py``, the blocks),
and converts them into ComfyUI's (``networks/convert_hunyuan_video_1_5_lora_to_comfy.py``). Query,
key and value are three layers in the authors' names and one layer in ComfyUI's. The other names are
HunyuanVideo's. The mapping to diffusers' names follows its
``scripts/convert_hunyuan_video1_5_to_diffusers.py``.
"""

from __future__ import annotations

from klora_runtime.families import flux1, hunyuan_video
from klora_runtime.families.family import MUSUBI_TUNER, Family, Mark, Script
from klora_runtime.families.rows import Layout, Row, renamed

_DOUBLE, _JOINT = "double_blocks.{}", "transformer_blocks.{}"
_REFINER = "txt_in."
_EMBEDDER = {"mlp.0": "linear_1", "mlp.2": "linear_2"}

#: ByT5's embedder, which HunyuanImage also has.
BYT5 = tuple(
    renamed(
        "byt5_in",
        "context_embedder_2",
        {"fc1": "linear_1", "fc2": "linear_2", "fc3": "linear_3", "layernorm": "norm"},
    )
)
_AROUND = (_REFINER, "img_in.", "final_layer.")

ORIGINAL = Layout(
    name="hunyuan",
    family="hunyuan-video-1.5",
    component="transformer",
    rows=(
        *(
            row
            for row in hunyuan_video.ORIGINAL.rows
            if row.source.startswith(_AROUND)
            or (row.source.startswith(_DOUBLE) and row.split is None)
        ),
        *renamed(
            _DOUBLE,
            _JOINT,
            {
                **{f"img_attn_{n}": f"attn.to_{n}" for n in "qkv"},
                **{f"txt_attn_{n}": f"attn.add_{n}_proj" for n in "qkv"},
            },
        ),
        *renamed("time_in", "time_embed.timestep_embedder", _EMBEDDER),
        *renamed("time_r_in", "time_embed.timestep_embedder_r", _EMBEDDER),
        *BYT5,
        *renamed(
            "vision_in.proj",
            "image_embedder",
            {"0": "norm_in", "1": "linear_1", "3": "linear_2", "4": "norm_out"},
        ),
        Row("cond_type_embedding", ("cond_type_embed",)),
    ),
)

COMFY = Layout(
    name="comfy",
    family="hunyuan-video-1.5",
    component="transformer",
    rows=tuple(
        row for row in hunyuan_video.COMFY.rows if row.source.startswith((_DOUBLE, _REFINER))
    ),
    is_whole=False,
)

FAMILY = Family(
    key="hunyuan-video-1.5",
    title="HunyuanVideo 1.5",
    pipeline="HunyuanVideo15Pipeline",
    hub="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
    models=("HunyuanVideo15Transformer3DModel",),
    task="text-to-video",
    layouts=(ORIGINAL, COMFY),
    blocks={"context_embedder.token_refiner.refiner_blocks": 2, "transformer_blocks": 54},
    marks=(
        Mark(r"^transformer_blocks\.\d+\.attn\.add_q_proj$", (2048,)),
        Mark(r"^context_embedder\.token_refiner\.", (2048,)),
    ),
    named_after=flux1.FAMILY,
    stated=r"hunyuan-video-1-5",
    script=Script("networks.lora_hv_1_5", MUSUBI_TUNER),
    missing={
        "tag": "diffusers has no trainer for it",
        "kohya": "ComfyUI reads them after musubi-tuner's converter alone",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
