"""Krea 2 in the names of its authors (krea-ai/krea-2), which all trainers keep.

musubi-tuner (``networks/lora_krea2.py``, every linear layer) writes them with underscores after
``lora_unet_``, ai-toolkit and the authors' trainer write them with dots. The mapping to diffusers'
names follows ``convert_krea2_transformer_checkpoint_to_diffusers`` in its
``loaders/single_file_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from klora_runtime.families.family import MUSUBI_TUNER, Family, Mark, Script
from klora_runtime.families.rows import Layout, Row, renamed

_NAMES = {
    "attn.gate": "attn.to_gate",
    "attn.qknorm.knorm": "attn.norm_k",
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.wk": "attn.to_k",
    "attn.wo": "attn.to_out.0",
    "attn.wq": "attn.to_q",
    "attn.wv": "attn.to_v",
    "mlp.down": "ff.down",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "postnorm": "norm2",
    "prenorm": "norm1",
}
_BLOCKS = {
    "blocks.{}": "transformer_blocks.{}",
    "txtfusion.layerwise_blocks.{}": "text_fusion.layerwise_blocks.{}",
    "txtfusion.refiner_blocks.{}": "text_fusion.refiner_blocks.{}",
}
_TOP = {
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "last.norm": "final_layer.norm",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtfusion.projector": "text_fusion.projector",
    "txtmlp.0": "txt_in.norm",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
}


def _rows() -> Iterator[Row]:
    for source, target in _BLOCKS.items():
        yield from renamed(source, target, _NAMES)
    yield from (Row(source, (target,)) for source, target in _TOP.items())


ORIGINAL = Layout(
    name="krea",
    family="krea-2",
    component="transformer",
    rows=tuple(_rows()),
)

FAMILY = Family(
    key="krea-2",
    title="Krea 2",
    pipeline="Krea2Pipeline",
    hub="krea/Krea-2-Raw",
    models=("Krea2Transformer2DModel",),
    tag="krea2",
    layouts=(ORIGINAL,),
    blocks={
        "text_fusion.layerwise_blocks": 2,
        "text_fusion.refiner_blocks": 2,
        "transformer_blocks": 28,
    },
    marks=(Mark(r"^transformer_blocks\.\d+\.(attn\.to_gate|ff\.(gate|up))$", (6144,)),),
    stated=r"krea-?2",
    script=Script("networks.lora_krea2", MUSUBI_TUNER),
    missing={
        "kohya": "no tool is known here to read them",
        "text_encoders": "none of the trainers whose files klora reads adapts its own",
    },
)
