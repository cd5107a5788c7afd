"""AuraFlow in the names of its author (cloneofsimo/minRF).

The mapping to diffusers' names follows ``convert_auraflow_transformer_checkpoint_to_diffusers`` in
its ``loaders/single_file_utils.py``. ``register_tokens`` and ``positional_encoding`` are not
modules.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Kohya, Mark
from klora_runtime.families.rows import Layout, Row, renamed, swapped_halves

_DOUBLE, _JOINT = "double_layers.{}", "joint_transformer_blocks.{}"
_SINGLE, _ONE = "single_layers.{}", "single_transformer_blocks.{}"
_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_FIRST = {
    "w1q": "add_q_proj",
    "w1k": "add_k_proj",
    "w1v": "add_v_proj",
    "w1o": "to_add_out",
}
_SECOND = {"w2q": "to_q", "w2k": "to_k", "w2v": "to_v", "w2o": "to_out.0"}
_ALONE = {"w1q": "to_q", "w1k": "to_k", "w1v": "to_v", "w1o": "to_out.0"}

ORIGINAL = Layout(
    name="auraflow",
    family="auraflow",
    component="transformer",
    rows=(
        *renamed(f"{_DOUBLE}.attn", f"{_JOINT}.attn", _FIRST | _SECOND),
        *renamed(f"{_DOUBLE}.mlpX", f"{_JOINT}.ff", _MLP),
        *renamed(f"{_DOUBLE}.mlpC", f"{_JOINT}.ff_context", _MLP),
        *renamed(_DOUBLE, _JOINT, {"modX.1": "norm1.linear", "modC.1": "norm1_context.linear"}),
        *renamed(f"{_SINGLE}.attn", f"{_ONE}.attn", _ALONE),
        *renamed(f"{_SINGLE}.mlp", f"{_ONE}.ff", _MLP),
        *renamed(_SINGLE, _ONE, {"modCX.1": "norm1.linear"}),
        *renamed("t_embedder.mlp", "time_step_proj", {"0": "linear_1", "2": "linear_2"}),
        Row("cond_seq_linear", ("context_embedder",)),
        Row("init_x_linear", ("pos_embed.proj",)),
        Row("final_linear", ("proj_out",)),
        Row("modF.1", ("norm_out.linear",), swapped_halves),
    ),
)

FAMILY = Family(
    key="auraflow",
    title="AuraFlow",
    pipeline="AuraFlowPipeline",
    hub="fal/AuraFlow",
    models=("AuraFlowTransformer2DModel",),
    layouts=(ORIGINAL,),
    blocks={"joint_transformer_blocks": 4, "single_transformer_blocks": 32},
    marks=(Mark(r"^joint_transformer_blocks\.", (3072,)),),
    stated=r"auraflow",
    kohya=Kohya((ORIGINAL,), {"modelspec.architecture": "auraflow/lora"}),
    missing={
        "tag": "diffusers has no trainer for it",
        "script": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
