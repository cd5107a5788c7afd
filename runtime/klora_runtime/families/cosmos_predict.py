"""Cosmos-Predict 2 and 2.5 in the names of their authors (nvidia-cosmos), from text to pictures.

diffusion-pipe (``models/cosmos_predict2.py``, after ``diffusion_model.``) trains the authors'
model; diffusers' own trainer (``examples/cosmos/train_cosmos_predict25_lora.py``) writes diffusers'
names. The way into these is that of ``convert_cosmos_transformer_checkpoint_to_diffusers`` (Cosmos
2.0) in its ``loaders/single_file_utils.py``. ``blocks.N.self_attn`` and ``blocks.N.cross_attn`` are
Wan's names too; what is in them differs (``q_proj`` here, ``q`` there). Cosmos-Predict 1 has other
names in its authors' files, which are not read; in diffusers it has the same.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, Row, renamed, same

_BLOCK, _TARGET = "blocks.{}", "transformer_blocks.{}"
_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_LINEARS = {"1": "linear_1", "2": "linear_2"}
_NORMS = {"self_attn": "norm1", "cross_attn": "norm2", "mlp": "norm3"}

#: Of all models; those of image and video embeddings that some have are in :data:`ORIGINAL`.
COMMON = (
    *renamed(f"{_BLOCK}.self_attn", f"{_TARGET}.attn1", _ATTENTION),
    *renamed(f"{_BLOCK}.cross_attn", f"{_TARGET}.attn2", _ATTENTION),
    *(
        row
        for part, norm in _NORMS.items()
        for row in renamed(f"{_BLOCK}.adaln_modulation_{part}", f"{_TARGET}.{norm}", _LINEARS)
    ),
    *renamed(f"{_BLOCK}.mlp", f"{_TARGET}.ff", {"layer1": "net.0.proj", "layer2": "net.2"}),
    *renamed(
        "t_embedder.1",
        "time_embed.t_embedder",
        {"linear_1": "linear_1", "linear_2": "linear_2"},
    ),
    *renamed("final_layer.adaln_modulation", "norm_out", _LINEARS),
    Row("t_embedding_norm", ("time_embed.norm",)),
    Row("x_embedder.proj.1", ("patch_embed.proj",)),
    Row("final_layer.linear", ("proj_out",)),
)

ORIGINAL = Layout(
    name="nvidia",
    family="cosmos-predict",
    component="transformer",
    rows=(*COMMON, *same("crossattn_proj.0")),
)

#: The layers of two dimensions that no other model has as wide: those of adaptive norms, and the
#: keys of the prompt.
MARKS = (
    Mark(r"^transformer_blocks\.\d+\.norm[123]\.linear_1$", (2048, 4096, 5120)),
    Mark(r"^transformer_blocks\.\d+\.attn2\.to_[kv]$", (1024,)),
)

FAMILY = Family(
    key="cosmos-predict",
    title="Cosmos-Predict",
    pipeline="Cosmos2_5_PredictBasePipeline",
    hub="nvidia/Cosmos-Predict2.5-2B",
    models=("CosmosTransformer3DModel",),
    task="text-to-video",
    layouts=(ORIGINAL,),
    # Of 14 billion weights.
    blocks={"transformer_blocks": 36},
    smaller=({"transformer_blocks": 28},),
    widths={r"^transformer_blocks\.\d+\.attn1\.to_[qkv]$": (2048, 4096, 5120)},
    marks=MARKS,
    missing={
        "stated": "none of the trainers whose files klora reads states it",
        "tag": "diffusers' trainer writes none",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
