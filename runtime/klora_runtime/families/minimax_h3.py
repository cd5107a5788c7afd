"""MiniMax-H3 in the names of its authors (MiniMaxAI/MiniMax-H3), videos with sound.

ai-toolkit (``extensions_built_in/diffusion_models/minimax_h3``) and diffusion-pipe
(``models/minimax_h3.py``) write them after ``diffusion_model.``, musubi-tuner with underscores
after ``lora_unet_``. The way into diffusers' names is that of
``convert_minimax_h3_transformer_checkpoint_to_diffusers`` in its ``loaders/single_file_utils.py``.
DiffSynth-Studio leaves query, key and value of each head beside each other, where all others have
all queries first; what tells its files is PEFT's name of an adapter behind these names
(``_convert_non_diffusers_minimax_h3_lora_to_diffusers`` in ``loaders/lora_conversion_utils.py``).
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, Row, renamed, same, swapped_halves, thirds

_LISTS = {
    "blocks.{}": "transformer_blocks.{}",
    "token_refiner.blocks.{}": "token_refiner.refiner_blocks.{}",
}
_INSIDE = {
    "attn.out_proj": "attn.to_out.0",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "mlp.fc2": "ff.net.2",
    "norm1": "norm1",
    "norm2": "norm2",
}

ORIGINAL = Layout(
    name="minimax",
    family="minimax-h3",
    component="transformer",
    rows=(
        *(
            row
            for block, target in _LISTS.items()
            for row in (
                Row(
                    f"{block}.attn.qkv_proj", tuple(f"{target}.attn.to_{n}" for n in "qkv"), thirds
                ),
                Row(f"{block}.mlp.fc1", (f"{target}.ff.net.0.proj",), swapped_halves),
                *renamed(block, target, _INSIDE),
            )
        ),
        Row("blocks.{}.adaln_proj.linear", ("transformer_blocks.{}.adaln_proj.linear",)),
        *same("token_refiner.final_norm"),
        *renamed("time_embedder", "time_embedder", {"proj_in": "linear_1", "proj_out": "linear_2"}),
        Row("video_patch_proj", ("proj_in",)),
        Row("audio_patch_proj", ("audio_proj_in",)),
        Row("condition_proj", ("context_embedder",)),
        Row("final_layer.norm", ("norm_out.norm",)),
        Row("final_layer.adaln_proj.linear", ("norm_out.linear",)),
        Row("final_layer.video_out", ("proj_out",)),
        Row("final_layer.audio_out", ("audio_proj_out",)),
    ),
    without_adapters="DiffSynth-Studio writes such names, and the rows of its fused query, key and "
    "value lie head by head. Convert it with the tool that it is from",
)

FAMILY = Family(
    key="minimax-h3",
    title="MiniMax-H3",
    pipeline="MiniMaxH3ModularPipeline",
    hub="MiniMaxAI/MiniMax-H3",
    models=("MiniMaxH3Transformer3DModel",),
    task="text-to-video",
    is_modular=True,
    denoisers=("transformer", "transformer_ref"),
    layouts=(ORIGINAL,),
    blocks={"token_refiner.refiner_blocks": 2, "transformer_blocks": 50},
    marks=(
        Mark(r"^(transformer_blocks|token_refiner\.refiner_blocks)\.\d+\.attn\.to_[qkv]$", (5376,)),
    ),
    stated=r"minimax-h3",
    missing={
        "tag": "diffusers has no trainer for it",
        "script": "its network module of kohya's trainers was not seen",
        "kohya": "which tools read its files in kohya's spelling was not seen",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
