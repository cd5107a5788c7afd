"""Krea 2 in the names of its authors (krea-ai/krea-2), which all trainers keep.

musubi-tuner (``networks/lora_krea2.py``, every linear layer) writes them with underscores after
``lora_unet_``, ai-toolkit and the authors' trainer with dots. The way into diffusers' names is that
of ``convert_krea2_transformer_checkpoint_to_diffusers`` in its ``loaders/single_file_utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

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
