"""Five layers of Stable Diffusion that stand for all kinds: names and shapes."""

from __future__ import annotations

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY, KEY, VALUE, OUT = (f"{BLOCK}.to_{name}" for name in ("q", "k", "v", "out.0"))
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.mlp.fc1"
#: Layer -> (out, in, kernel).
SHAPES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    QUERY: (8, 12, ()),
    KEY: (8, 10, ()),
    VALUE: (6, 10, ()),
    CONV: (6, 4, (3, 3)),
    TEXT: (5, 7, ()),
}
