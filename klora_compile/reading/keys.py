"""How trainers name the tensors of a LoRA file, as tables: a new spelling is new rows.

A key is a *prefix* that says which component, a *module path* in dots or underscores, and a
*suffix* that says which part of the layer. :func:`parse_key` takes a key apart; a key that fits
no row is never guessed at. Module paths in diffusers' names are understood here; those in the names
of a model's authors are a :class:`~klora_compile.reading.placing.Stem`, for ``layouts`` to place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from klora_compile.reading.flat_names import CLIP, T5, UNET, Vocabulary
from klora_compile.reading.placing import Stem


class Part(Enum):
    """What a tensor is to its layer."""

    DOWN = "down"
    UP = "up"
    ALPHA = "alpha"


#: Suffix -> part. The longest suffix that fits is taken.
PARTS: Mapping[str, Part] = {
    ".lora_A.weight": Part.DOWN,
    ".lora_B.weight": Part.UP,
    ".lora_A.default.weight": Part.DOWN,
    ".lora_B.default.weight": Part.UP,
    ".lora.down.weight": Part.DOWN,
    ".lora.up.weight": Part.UP,
    ".lora_down.weight": Part.DOWN,
    ".lora_up.weight": Part.UP,
    ".down.weight": Part.DOWN,
    ".up.weight": Part.UP,
    ".lora_linear_layer.down.weight": Part.DOWN,
    ".lora_linear_layer.up.weight": Part.UP,
    ".alpha": Part.ALPHA,
}

#: Suffix -> the form it belongs to, of forms that are refused by name.
REFUSED_FORMS: Mapping[str, str] = {
    ".lora_magnitude_vector": "DoRA",
    ".lora_magnitude_vector.weight": "DoRA",
    ".lora_magnitude_vector.default.weight": "DoRA",
    ".dora_scale": "DoRA",
    ".lora_mid.weight": "LoCon with a Tucker core",
    ".lora_A.bias": "LoRA with a bias",
    ".lora_B.bias": "LoRA with a bias",
    ".lora_down.bias": "LoRA with a bias",
    ".lora_up.bias": "LoRA with a bias",
    ".diff": "full difference",
    ".diff_b": "bias difference",
    ".diff.weight": "full difference",
    ".w_norm": "norm difference",
    ".b_norm": "norm difference",
    ".scale_weight": "scaled float8",
    ".ia3_l": "IA3",
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".on_input": "IA3",
    **{f".hada_w{i}_{side}": "LoHa" for i in (1, 2) for side in "ab"},
    **{f".hada_t{i}": "LoHa" for i in (1, 2)},
    **{f".lokr_w{i}{side}": "LoKr" for i in (1, 2) for side in ("", "_a", "_b")},
    ".lokr_t2": "LoKr",
    **{f".{side}{i}.weight": "GLoRA" for side in "ab" for i in (1, 2)},
}

#: Components a dotted key may name.
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)

#: Prefix that PEFT's own ``save_pretrained`` puts before the path inside one model.
PEFT_PREFIX = "base_model.model."

#: Prefix that ComfyUI's names put before the denoiser's.
COMFY_PREFIX = "diffusion_model."

#: First names of a path that says no component -> the component whose models have them.
ROOTS: Mapping[str, str] = {
    "down_blocks": "unet",
    "mid_block": "unet",
    "up_blocks": "unet",
    "conv_in": "unet",
    "conv_out": "unet",
    "time_embedding": "unet",
    "add_embedding": "unet",
    "text_model": "text_encoder",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
}


@dataclass(frozen=True)
class FlatPrefix:
    """A prefix before a path in underscores."""

    prefix: str
    component: str
    vocabularies: tuple[Vocabulary, ...]
    """Of the names of diffusers and transformers, in the order in which they are tried."""
    denoiser: bool = False
    """Whether the names may also be those of a denoiser's authors."""


#: kohya's sd-scripts and musubi-tuner; OneTrainer (``lora_transformer_``).
FLAT_PREFIXES: tuple[FlatPrefix, ...] = (
    FlatPrefix("lora_unet_", "unet", (UNET,), denoiser=True),
    FlatPrefix("lora_transformer_", "transformer", (), denoiser=True),
    FlatPrefix("lora_te_", "text_encoder", (CLIP,)),
    FlatPrefix("lora_te1_", "text_encoder", (CLIP,)),
    FlatPrefix("lora_te2_", "text_encoder_2", (CLIP, T5)),
    FlatPrefix("lora_te3_", "text_encoder_3", (T5,)),
)

#: ``lora_te3_`` is T5; in these families that is not the pipeline's third text encoder.
T5_COMPONENTS: Mapping[str, str] = {"flux.1": "text_encoder_2", "chroma": "text_encoder"}

#: What the old attention processors of diffusers called their layers -> the layer they stand for.
PROCESSORS: Mapping[str, str] = {
    **{f".processor.to_{name}_lora": f".to_{name}" for name in "qkv"},
    ".processor.to_out_lora": ".to_out.0",
}

#: CLIP modules carry this prefix in files and in some transformers classes; klora leaves it out.
CLIP_PREFIX = "text_model."

_FLAT = re.compile(r"[A-Za-z0-9]+(_+[A-Za-z0-9]+)*")
_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_BY_LENGTH = sorted([*PARTS, *REFUSED_FORMS], key=lambda suffix: -len(suffix))


@dataclass(frozen=True)
class ParsedKey:
    """A key taken apart."""

    layout: str
    """``peft`` (module paths in dots) or ``kohya`` (in underscores)."""
    component: str
    module: str
    part: Part
    stem: Stem | None = field(default=None, compare=False)
    """The module in kohya's spelling, where a model's authors may have one of the same name."""

    @property
    def layer(self) -> str:
        """Component, dot, module path."""
        return f"{self.component}.{self.module}"


@dataclass(frozen=True)
class UnplacedKey:
    """A key taken apart whose module is in the names of the model's authors, or of no component."""

    layout: str
    stem: Stem
    part: Part

    @property
    def layer(self) -> str:
        """The module as the file names it."""
        return self.stem.name


def parse_key(key: str) -> ParsedKey | UnplacedKey | str:
    """Take a key of a LoRA file apart.

    Returns:
        The parsed key, or one sentence that says why it cannot be used.
    """
    suffix = next((s for s in _BY_LENGTH if key.endswith(s)), None)
    if suffix is None:
        return "its ending is of no known LoRA form"
    if suffix in REFUSED_FORMS:
        return f"is part of a {REFUSED_FORMS[suffix]} layer, which is not supported"
    place = _place(key.removesuffix(suffix))
    if isinstance(place, str):
        return place
    if place.module is None:
        assert place.stem is not None
        return UnplacedKey(place.layout, place.stem, PARTS[suffix])
    component, module = place.module
    if component.startswith("text_encoder"):
        module = module.removeprefix(CLIP_PREFIX)
    return ParsedKey(place.layout, component, module, PARTS[suffix], place.stem)


@dataclass(frozen=True)
class _Place:
    """What the prefix and the path of a key say; at least one of the last two."""

    layout: str
    module: tuple[str, str] | None = None
    """Component and path in diffusers' names."""
    stem: Stem | None = None


def _place(path: str) -> _Place | str:
    for row in FLAT_PREFIXES:
        if path.startswith(row.prefix):
            flat = path.removeprefix(row.prefix)
            dotted = (vocabulary.dotted(flat) for vocabulary in row.vocabularies)
            module = next((each for each in dotted if each is not None), None)
            if module is None and not (row.denoiser and _FLAT.fullmatch(flat)):
                return f"names no module of a known {row.component} in kohya's spelling"
            return _Place(
                "kohya",
                None if module is None else (row.component, module),
                Stem(flat, flat=True) if row.denoiser else None,
            )
    return _dotted_place(path)


def _dotted_place(path: str) -> _Place | str:
    inner = path.removeprefix(PEFT_PREFIX)
    component, _, module = inner.partition(".")
    if component not in COMPONENTS:
        inner = inner.removeprefix(COMFY_PREFIX).removeprefix(PEFT_PREFIX)
        component, module = ROOTS.get(inner.partition(".")[0], ""), inner
    module = module.removeprefix(PEFT_PREFIX)
    if not _PATH.fullmatch(module):
        return "is not a module path"
    for processor, layer in PROCESSORS.items():
        if module.endswith(processor):
            module = module.removesuffix(processor) + layer
    if component:
        return _Place("peft", (component, module))
    return _Place("peft", stem=Stem(module, flat=False))
