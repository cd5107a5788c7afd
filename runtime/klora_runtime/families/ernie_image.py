"""ERNIE-Image, whose authors (Baidu) and diffusers have the same names.

ai-toolkit (``extensions_built_in/diffusion_models/ernie_image``) and diffusion-pipe
(``models/ernie_image.py``) write them after ``diffusion_model.``, OneTrainer
(``modules/modelSaver/ernie``) after ``transformer.``. diffusers takes a checkpoint as it is: see
``convert_ernie_image_transformer_checkpoint_to_diffusers`` in its ``loaders/single_file_utils.py``.
"""

from __future__ import annotations

from klora_runtime.families.family import Family, Mark
from klora_runtime.families.rows import Layout, same

_BLOCK = "layers.{}"

DIFFUSERS = Layout(
    name="diffusers",
    family="ernie-image",
    component="transformer",
    rows=(
        *same(
            *("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k"),
            under=f"{_BLOCK}.self_attention",
        ),
        *same("gate_proj", "up_proj", "linear_fc2", under=f"{_BLOCK}.mlp"),
        *same("adaLN_sa_ln", "adaLN_mlp_ln", under=_BLOCK),
        *same("linear_1", "linear_2", under="time_embedding"),
        *same("adaLN_modulation.1", "x_embedder.proj", "text_proj"),
        *same("final_norm.linear", "final_linear"),
    ),
)

FAMILY = Family(
    key="ernie-image",
    title="ERNIE-Image",
    pipeline="ErnieImagePipeline",
    hub="baidu/ERNIE-Image",
    models=("ErnieImageTransformer2DModel",),
    layouts=(DIFFUSERS,),
    blocks={"layers": 36},
    # Of diffusers' defaults, and of eight billion weights.
    marks=(Mark(r"^layers\.\d+\.(self_attention\.to_[qkv]|mlp\.(gate|up)_proj)$", (3072, 4096)),),
    stated=r"ernie(-image)?",
    missing={
        "tag": "diffusers has no trainer for it",
        "script": "none of kohya's trainers trains it",
        "kohya": "none of kohya's trainers trains it",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
