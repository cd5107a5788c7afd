"""Anima: NVIDIA's Cosmos-Predict2 transformer in its authors' names, and Anima's own adapter.

sd-scripts (``library/anima_models.py``) writes them with underscores after ``lora_unet_``, others
with dots after ``diffusion_model.``. diffusers runs the transformer as ``CosmosTransformer3DModel``
and the adapter, ``llm_adapter`` in a file, as a separate component, ``text_conditioner``. The
mapping to diffusers' names follows ``convert_cosmos_transformer_checkpoint_to_diffusers`` (Cosmos
2.0) in its ``loaders/single_file_utils.py`` and ``scripts/convert_anima_to_diffusers.py``.
"""

from __future__ import annotations

from klora_runtime.families import cosmos_predict
from klora_runtime.families.family import SD_SCRIPTS, Family, Kohya, Mark, Script, TextEncoder
from klora_runtime.families.rows import Layout, Row
from klora_runtime.families.text_encoders import QWEN3

#: The transformer's layers are Cosmos-Predict's.
COSMOS = Layout(name="cosmos", family="anima", component="transformer", rows=cosmos_predict.COMMON)

_ADAPTER = "llm_adapter"
_ADAPTER_BLOCK = (
    *(
        f"blocks.{{}}.{attention}.{name}"
        for attention in ("self_attn", "cross_attn")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    ),
    *(f"blocks.{{}}.{name}" for name in ("norm_self_attn", "norm_cross_attn", "norm_mlp")),
    "blocks.{}.mlp.0",
    "blocks.{}.mlp.2",
)

LLM_ADAPTER = Layout(
    name="cosmos",
    family="anima",
    component="text_conditioner",
    rows=tuple(
        Row(f"{_ADAPTER}.{name}", (name,))
        for name in (*_ADAPTER_BLOCK, "embed", "out_proj", "norm")
    ),
)

FAMILY = Family(
    key="anima",
    title="Anima",
    pipeline="AnimaModularPipeline",
    hub="circlestone-labs/Anima-Base-v1.0-Diffusers",
    models=(
        "CosmosTransformer3DModel",
        "AnimaTextConditioner",
    ),
    is_modular=True,
    layouts=(COSMOS, LLM_ADAPTER),
    blocks={"transformer_blocks": 28, "blocks": 6},
    # The transformer's layers are Cosmos-Predict's; only the adapter identifies Anima.
    marks=(
        *cosmos_predict.MARKS,
        Mark(r"^blocks\.\d+\.(self|cross)_attn\.[qkv]_proj$", (1024,), LLM_ADAPTER.component),
    ),
    stated=r"anima",
    script=Script("networks.lora_anima", SD_SCRIPTS),
    kohya=Kohya(
        (COSMOS, LLM_ADAPTER),
        {"ss_base_model_version": "anima", "modelspec.architecture": "anima-preview/lora"},
    ),
    text_encoders=(TextEncoder("text_encoder", QWEN3, kohya="lora_te_", comfy="qwen3_06b"),),
    missing={"tag": "diffusers has no trainer for it"},
)
