"""Module paths written with underscores, as kohya's sd-scripts does, turned back into dots.

sd-scripts replaces every dot of a module path by an underscore, and the names themselves have
underscores: ``down_blocks_0_attn1_to_out_0``. The way back is a vocabulary of the names that
occur in a model; the longest name that fits is taken at each place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: Names inside a diffusers UNet2DConditionModel (SD1.x, SD2.x, and SDXL in diffusers names).
UNET_NAMES = frozenset(
    [
        "down_blocks",
        "up_blocks",
        "mid_block",
        "attentions",
        "resnets",
        "transformer_blocks",
        "downsamplers",
        "upsamplers",
        "attn1",
        "attn2",
        "to_q",
        "to_k",
        "to_v",
        "to_out",
        "ff",
        "net",
        "proj",
        "proj_in",
        "proj_out",
        "norm",
        "norm1",
        "norm2",
        "norm3",
        "conv",
        "conv1",
        "conv2",
        "conv_in",
        "conv_out",
        "conv_shortcut",
        "conv_norm_out",
        "time_emb_proj",
        "time_embedding",
        "linear_1",
        "linear_2",
        "add_embedding",
        "class_embedding",
    ]
)

#: Names inside a transformers CLIP text model.
CLIP_NAMES = frozenset(
    [
        "text_model",
        "encoder",
        "layers",
        "self_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "mlp",
        "fc1",
        "fc2",
        "embeddings",
        "token_embedding",
        "position_embedding",
        "layer_norm1",
        "layer_norm2",
        "final_layer_norm",
        "text_projection",
    ]
)


#: Names inside a transformers T5 encoder.
T5_NAMES = frozenset(
    [
        "encoder",
        "block",
        "layer",
        "SelfAttention",
        "DenseReluDense",
        *"qkvo",
        "wi_0",
        "wi_1",
        "wo",
    ]
)


@dataclass(frozen=True)
class Vocabulary:
    """Names that may occur between two dots of a module path; numbers always may."""

    names: frozenset[str]
    _step: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        longest_first = sorted(self.names, key=lambda name: (-len(name), name))
        names = "|".join(map(re.escape, longest_first))
        object.__setattr__(self, "_step", re.compile(rf"({names}|\d+)(?:_|$)"))

    def dotted(self, flat: str) -> str | None:
        """``flat`` with dots between its names, or None where it is not made of these names."""
        parts, position = [], 0
        while position < len(flat):
            match = self._step.match(flat, position)
            if match is None:
                return None
            parts.append(match[1])
            position = match.end()
        return ".".join(parts) if parts and not flat.endswith("_") else None


UNET = Vocabulary(UNET_NAMES)
CLIP = Vocabulary(CLIP_NAMES)
T5 = Vocabulary(T5_NAMES)
