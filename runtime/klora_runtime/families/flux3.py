"""FLUX.3 in the names of its authors (Black Forest Labs).

Trainers write them after ``diffusion_model.``, as diffusers' own loader of LoRAs expects
(``_convert_non_diffusers_flux3_lora_to_diffusers`` in its ``loaders/lora_conversion_utils.py``).
The way into diffusers' names is that of ``convert_flux3_transformer_checkpoint_to_diffusers`` in
its ``loaders/single_file_utils.py``.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, Row, renamed, swapped_halves

_MODES = ("image", "image_cond")
_INSIDE = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}
_LINEARS = {"in_layer": "linear_1", "out_layer": "linear_2"}

ORIGINAL = Layout(
    name="bfl",
    family="flux.3",
    component="transformer",
    rows=(
        *(
            row
            for mode in _MODES
            for row in renamed(
                f"content_mode_blocks.{mode}.{{}}", f"mode_blocks.{mode}.{{}}", _INSIDE
            )
        ),
        *renamed("txt_mode_blocks.{}", "txt_mode_blocks.{}", _INSIDE),
        *renamed("single_blocks.{}", "single_transformer_blocks.{}", _INSIDE),
        *(
            Row(f"{when}_stream_modulations.{of}.lin", (f"{when}_stream_modulations.{of}.linear",))
            for when in ("early", "single")
            for of in (*_MODES, "txt")
        ),
        *(Row(f"emb_in.{mode}", (f"x_embedders.{mode}",)) for mode in _MODES),
        Row("txt_in", ("context_embedder",)),
        *renamed("time_in", "timestep_embedder", _LINEARS),
        *renamed("ref_time_in", "target_timestep_embedder", _LINEARS),
        Row("final_layer.image.linear", ("proj_out",)),
        Row("final_layer.image.adaLN_modulation.1", ("norm_out.linear",), swapped_halves),
    ),
)

FAMILY = Family(
    key="flux.3",
    title="FLUX.3",
    pipeline="Flux3ModularPipeline",
    hub="black-forest-labs/FLUX-3-Image-Klein-Base",
    models=("Flux3Transformer2DModel",),
    is_modular=True,
    layouts=(ORIGINAL,),
    blocks={
        "mode_blocks.image": 5,
        "mode_blocks.image_cond": 5,
        "txt_mode_blocks": 5,
        "single_transformer_blocks": 28,
    },
    marks=(Mark(r"^(txt_)?mode_blocks\..*\.(attn\.to_[qkv]|ff\.linear_in)$", (3072,)),),
    missing={
        "stated": "none of the trainers whose files klora reads states it",
        "tag": "diffusers has no trainer for it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
