"""Detection of files that are not LoRAs, and of token embeddings inside LoRA files."""

from __future__ import annotations

import re
from collections.abc import Collection

#: Endings of keys that only adapters have; a file with one is not a plain model.
_ADAPTER = re.compile(
    r"lora|\.(alpha|diff|diff_b|dora_scale|w_norm|b_norm|on_input|set_weight)$"
    r"|(hada|lokr|oft|boft|ia3|glora)_|\.(oft_|boft_|vera_)|\.(a1|a2|b1|b2)\.weight$"
)

#: Parts of a file of an IP-Adapter. FaceID's hold LoRAs too, for layers by their number.
IP_ADAPTER = ("ip_adapter", "image_proj")
_IP_ADAPTER = re.compile(rf"^({'|'.join(IP_ADAPTER)})\.")

#: Pattern of a tensor's name -> description of a file with it. The first match decides.
_MODELS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"^(emb_params|clip_[lg]|string_to_param(\..*)?)$", "a textual-inversion embedding"),
        (r"^(model\.)?diffusion_model\.", "a whole checkpoint"),
        (r"^(first_stage_model|cond_stage_model|conditioner\.embedders)\.", "a whole checkpoint"),
        (
            r"^(double_blocks|single_blocks|joint_blocks)\.\d+\..*\.(weight|scale)$",
            "a whole denoiser",
        ),
        (r"^(input_blocks|middle_block|output_blocks)\.\d+\..*weight$", "a whole denoiser"),
        (r"^(text_model|encoder\.block|encoder\.layers)\..*weight$", "a whole text encoder"),
        (r"^(encoder|decoder)\.(conv_in|conv_out|mid_block|mid|down|up)\b.*weight$", "a whole VAE"),
        (
            r"^(down_blocks|up_blocks|mid_block|(single_)?transformer_blocks)\..*weight$",
            "a whole denoiser in diffusers' names",
        ),
    )
)

_TOKEN_EMBEDDING = re.compile(
    r"^(emb_params|clip_[lg]|string_to_param(\..*)?)$|^bundle_emb\.|(^|[._])token_embedding"
    r"|(^|\.)embed_tokens|^text_encoder.*embeddings"
)


def full_model(names: Collection[str]) -> str | None:
    """Return a description of a file whose tensors are a model's own weights; None for a LoRA.

    Args:
        names: all tensor names of the file.
    """
    if any(_IP_ADAPTER.search(name) for name in names):
        return "an IP-Adapter"
    if any(_ADAPTER.search(name) for name in names):
        return None
    return next(
        (words for pattern, words in _MODELS if any(pattern.search(name) for name in names)), None
    )


def token_embedding(key: str) -> bool:
    """Return whether a tensor is a token embedding, which pivotal tuning writes beside a LoRA."""
    if "emb" not in key and not key.startswith(("clip_", "string_to_param")):
        return False  # the search takes long, and no file has many of them
    return _TOKEN_EMBEDDING.search(key) is not None and _ADAPTER.search(key) is None
