"""Which base model family a set of layers belongs to, told by the shapes that differ.

A row names a layer by a pattern and the value of its input width. A new family is a new row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SD3_ATTENTION = re.compile(r"^transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj)$")
_WAN_ATTENTION = re.compile(r"^blocks\.\d+\.attn[12]\.to_[qkv]$")

#: (family, component, pattern of a module path, input width of that layer's weight)
_MARKS: tuple[tuple[str, str, re.Pattern[str], int], ...] = (
    ("sd1", "unet", re.compile(r"\.attn2\.to_[kv]$"), 768),
    ("sd2", "unet", re.compile(r"\.attn2\.to_[kv]$"), 1024),
    ("sdxl-refiner", "unet", re.compile(r"\.attn2\.to_[kv]$"), 1280),
    ("sdxl", "unet", re.compile(r"\.attn2\.to_[kv]$"), 2048),
    # Widths of the released SD3 and SD3.5 medium, and of SD3.5 large.
    ("sd3", "transformer", _SD3_ATTENTION, 1536),
    ("sd3", "transformer", _SD3_ATTENTION, 2432),
    # From here on: the defaults of the model classes of diffusers 0.42, under names that no other
    # model of them has at that width, but those that are trained from this one. FLUX.1's blocks are
    # HunyuanVideo's, Bria's and LongCat-Image's too, its embedder of pooled text HunyuanVideo's.
    ("flux.1", "transformer", re.compile(r"^time_text_embed\.text_embedder\.linear_1$"), 768),
    ("chroma", "transformer", re.compile(r"^distilled_guidance_layer\.in_proj$"), 64),
    ("auraflow", "transformer", re.compile(r"^context_embedder$"), 2048),
    ("lumina2", "transformer", re.compile(r"^layers\.\d+\.attn\.to_[qkv]$"), 2304),
    ("flux.2", "transformer", re.compile(r"\.attn\.(add_[qkv]_proj|to_qkv_mlp_proj)$"), 6144),
    (
        "qwen-image",
        "transformer",
        re.compile(r"^transformer_blocks\.\d+\.(img|txt)_(mod\.1|mlp\.net\.0\.proj)$"),
        3072,
    ),
    ("z-image", "transformer", re.compile(r"^layers\.\d+\.attention\.to_[qkv]$"), 3840),
    # Wan of 1.3, 5 and 14 billion weights.
    *(
        ("wan", component, _WAN_ATTENTION, width)
        for component in ("transformer", "transformer_2")
        for width in (1536, 3072, 5120)
    ),
    ("ltx", "transformer", re.compile(r"^transformer_blocks\.\d+\.attn[12]\.to_[qkv]$"), 2048),
    ("hunyuan-video", "transformer", re.compile(r"^context_embedder\.token_refiner\."), 3072),
)

#: Families whose mark another one has as well, beside a mark of its own.
_SHARED = frozenset({"flux.1"})

#: ``anima`` and ``krea-2`` have no mark; they are known by the names in a LoRA's file.
FAMILY_NAMES: Mapping[str, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "sd3": "Stable Diffusion 3",
    "flux.1": "FLUX.1",
    "flux.2": "FLUX.2",
    "chroma": "Chroma",
    "auraflow": "AuraFlow",
    "lumina2": "Lumina 2",
    "anima": "Anima",
    "krea-2": "Krea 2",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
    "wan": "Wan",
    "ltx": "LTX-Video 2B",
    "hunyuan-video": "HunyuanVideo",
}


def family_of(shapes: Mapping[tuple[str, str], tuple[int, ...]]) -> str | None:
    """The one family whose marks the layers carry.

    Args:
        shapes: (component, module path) -> shape of its weight.

    Returns:
        A key of :data:`FAMILY_NAMES`, or None where no mark or marks of several families match.
    """
    found = {
        family
        for (component, module), shape in shapes.items()
        for family, where, pattern, width in _MARKS
        if component == where and len(shape) > 1 and shape[1] == width and pattern.search(module)
    }
    if len(found) > 1:
        found -= _SHARED
    return found.pop() if len(found) == 1 else None


def family_name(family: str | None) -> str:
    """Words for an error or a report."""
    return "an unknown family" if family is None else FAMILY_NAMES.get(family, family)
