"""Wan 2.1 and 2.2 in the names of their authors (Wan-Video/Wan2.1), text and image to video.

musubi-tuner (``wan/modules/model.py``, after ``lora_unet_``), diffusion-pipe and ai-toolkit (after
``diffusion_model.``) write these. ai-toolkit (``toolkit/models/wan21/wan_lora_convert.py``) keeps
diffusers' names outside attention and feed-forward layers. Its LoKr of 2025 has underscores, and
mixes both namings in an attention's last layer, ``self_attn.to_out.0``. The mapping to diffusers'
names follows ``convert_wan_transformer_to_diffusers`` in its ``loaders/single_file_utils.py``. Only
Wan 2.1 from image to video has ``k_img``, ``v_img`` and ``img_emb``. diffusers swaps the numbers of
the second and third norm; only the authors' third one has a weight. No file says whether it is for
Wan 2.2's first or second transformer; the table's component is the first. SkyReels V2, ChronoEdit,
Wan Animate, AnyFlow and Helios have Wan's layers under the same names; their additional layers have
diffusers' own paths.
"""

from __future__ import annotations

from klora_runtime.families.family import MUSUBI_TUNER, Family, Kohya, Mark, Script
from klora_runtime.families.rows import Layout, Row, renamed, same

_BLOCK = "blocks.{}"
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_NORMS = {"norm_q": "norm_q", "norm_k": "norm_k"}
_EMBEDDER = {"0": "linear_1", "2": "linear_2"}

ORIGINAL = Layout(
    name="wan",
    family="wan",
    component="transformer",
    rows=(
        *renamed(f"{_BLOCK}.self_attn", f"{_BLOCK}.attn1", _PROJECTIONS | _NORMS),
        *renamed(f"{_BLOCK}.cross_attn", f"{_BLOCK}.attn2", _PROJECTIONS | _NORMS | _IMAGE),
        *renamed(
            _BLOCK,
            _BLOCK,
            {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"},
        ),
        *renamed("time_embedding", "condition_embedder.time_embedder", _EMBEDDER),
        *renamed("text_embedding", "condition_embedder.text_embedder", _EMBEDDER),
        *renamed(
            "img_emb.proj",
            "condition_embedder.image_embedder",
            {"0": "norm1", "1": "ff.net.0.proj", "3": "ff.net.2", "4": "norm2"},
        ),
        Row("time_projection.1", ("condition_embedder.time_proj",)),
        Row("head.head", ("proj_out",)),
        *same("patch_embedding"),
        Row(f"{_BLOCK}.modulation", (f"{_BLOCK}.scale_shift_table",), is_parameter=True),
        Row("head.modulation", ("scale_shift_table",), is_parameter=True),
    ),
)

AI_TOOLKIT = Layout(
    name="ai-toolkit",
    family="wan",
    component="transformer",
    rows=(
        Row(f"{_BLOCK}.self_attn.to_out.0", (f"{_BLOCK}.attn1.to_out.0",)),
        Row(f"{_BLOCK}.cross_attn.to_out.0", (f"{_BLOCK}.attn2.to_out.0",)),
    ),
    is_whole=False,
)

FAMILY = Family(
    key="wan",
    title="Wan",
    pipeline="WanPipeline",
    hub="Wan-AI/Wan2.1-T2V-14B-Diffusers",
    models=(
        "WanTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
        "WanAnimateTransformer3DModel",
        "AnyFlowTransformer3DModel",
        "AnyFlowFARTransformer3DModel",
        "HeliosTransformer3DModel",
    ),
    task="text-to-video",
    denoisers=("transformer", "transformer_2"),
    layouts=(ORIGINAL, AI_TOOLKIT),
    blocks={"blocks": 40},
    smaller=({"blocks": 30},),
    # Models of 1.3, 5 and 14 billion weights.
    marks=(Mark(r"^blocks\.\d+\.attn[12]\.to_[qkv]$", (1536, 3072, 5120)),),
    stated=r"wan(-?2-[12])?",
    script=Script("networks.lora_wan", MUSUBI_TUNER),
    kohya=Kohya(
        (ORIGINAL,), {"ss_base_model_version": "wan", "modelspec.architecture": "wan2.1/lora"}
    ),
    missing={
        "tag": "diffusers has no trainer for it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
