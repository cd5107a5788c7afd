"""ACE-Step 1.5 in the names of its authors (ACE-Step/ACE-Step-1.5), music from text.

Their trainer wraps the decoder with PEFT and writes its names after ``base_model.model.``. The way
into diffusers' names is that of ``scripts/convert_ace_step_to_diffusers.py`` and, of LoRAs,
``_convert_non_diffusers_ace_step_lora_to_diffusers`` in its ``loaders/lora_conversion_utils.py``.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, Row, parameters, renamed, same

_BLOCK = "layers.{}"
_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "o_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}

ORIGINAL = Layout(
    name="ace-step",
    family="ace-step",
    component="transformer",
    rows=(
        *renamed(f"{_BLOCK}.self_attn", f"{_BLOCK}.self_attn", _ATTENTION),
        *renamed(f"{_BLOCK}.cross_attn", f"{_BLOCK}.cross_attn", _ATTENTION),
        *same("gate_proj", "up_proj", "down_proj", under=f"{_BLOCK}.mlp"),
        *same("self_attn_norm", "cross_attn_norm", "mlp_norm", under=_BLOCK),
        *same("linear_1", "linear_2", "time_proj", under="time_embed"),
        *same("linear_1", "linear_2", "time_proj", under="time_embed_r"),
        Row("proj_in.1", ("proj_in_conv",)),
        Row("proj_out.1", ("proj_out_conv",)),
        *same("condition_embedder", "norm_out"),
        *parameters(f"{_BLOCK}.scale_shift_table", "scale_shift_table"),
    ),
)

FAMILY = Family(
    key="ace-step",
    title="ACE-Step 1.5",
    pipeline="AceStepPipeline",
    hub="ACE-Step/acestep-v15-xl-turbo-diffusers",
    models=("AceStepTransformer1DModel",),
    task="text-to-audio",
    layouts=(ORIGINAL,),
    blocks={"layers": 24},
    marks=(Mark(r"^layers\.\d+\.cross_attn\.to_[qkv]$", (2048, 2560)),),
    missing={
        "stated": "none of the trainers whose files klora reads states it",
        "tag": "diffusers has no trainer for it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
