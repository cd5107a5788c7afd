"""kohya's names: a prefix for the component, the module path in underscores, an alpha.

sd-scripts and musubi-tuner write each family in one set of names: SD 1.x and 2.x in diffusers', the
others in their authors', where query, key and value are one module. ComfyUI, Forge and A1111 read
these. diffusers 0.42 reads them in part: it takes no attention of CLIP where a file has CLIP's
feed-forward layers too, and of FLUX.1 only the blocks. A family is not here whose files of this
spelling no tool is known to read: HunyuanVideo's need musubi-tuner's converter, LTX-Video, AuraFlow
and Krea 2 come in other names.
Deltas that are no products are ``diff`` and ``diff_b``, as ComfyUI reads them. The prefixes of text
encoders are explained in ``klora_runtime.families.text_encoders``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from klora_compile.export.targets import Piece, Spelling, Target
from klora_compile.reading.forms.parts import Part
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.errors import KloraError, shown
from klora_runtime.families import (
    anima,
    chroma,
    flux1,
    flux2,
    lumina2,
    qwen_image,
    sd3,
    text_encoders,
    unet,
    wan,
    z_image,
)
from klora_runtime.families.backwards import Backwards, Home, shares
from klora_runtime.families.catalogue import FAMILY_NAMES
from klora_runtime.families.rows import Layout
from klora_runtime.families.unet import is_pointwise

_ENDINGS = {
    Part.DOWN: ".lora_down.weight",
    Part.UP: ".lora_up.weight",
    Part.ALPHA: ".alpha",
    Part.DIFF: ".diff",
    Part.DIFF_BIAS: ".diff_b",
}
_DENOISER = "lora_unet_"


@dataclass(frozen=True)
class KohyaFamily:
    """How files of one family are written."""

    places: Mapping[str, tuple[str, Layout]]
    """Component -> prefix of its modules and whose names they have."""
    module: str
    """``ss_network_module``: the script that trains it."""
    metadata: Mapping[str, str] = field(default_factory=dict)


_CLIP_1 = ("lora_te1_", text_encoders.CLIP_INSIDE)
_CLIP_2 = ("lora_te2_", text_encoders.CLIP_INSIDE)
_T5 = ("lora_te3_", text_encoders.T5)
_ARCHITECTURE = "modelspec.architecture"
_BASE = "ss_base_model_version"

#: Family -> how its files are written.
FAMILIES: Mapping[str, KohyaFamily] = {
    "sd1": KohyaFamily(
        {
            "unet": (_DENOISER, unet.SD1.in_diffusers_names()),
            "text_encoder": ("lora_te_", text_encoders.CLIP_INSIDE),
        },
        "networks.lora",
        {_BASE: "sd_v1", _ARCHITECTURE: "stable-diffusion-v1/lora"},
    ),
    "sd2": KohyaFamily(
        {
            "unet": (_DENOISER, unet.SD2.in_diffusers_names()),
            "text_encoder": ("lora_te_", text_encoders.CLIP_INSIDE),
        },
        "networks.lora",
        {_BASE: "sd_v2", "ss_v2": "True"},
    ),
    "sdxl": KohyaFamily(
        {
            "unet": (_DENOISER, unet.SDXL),
            "text_encoder": _CLIP_1,
            "text_encoder_2": _CLIP_2,
        },
        "networks.lora",
        {_BASE: "sdxl_base_v1-0", _ARCHITECTURE: "stable-diffusion-xl-v1-base/lora"},
    ),
    "sd3": KohyaFamily(
        {
            "transformer": (_DENOISER, sd3.MMDIT),
            "text_encoder": _CLIP_1,
            "text_encoder_2": _CLIP_2,
            "text_encoder_3": _T5,
        },
        "networks.lora_sd3",
    ),
    "flux.1": KohyaFamily(
        {
            "transformer": (_DENOISER, flux1.BFL),
            "text_encoder": _CLIP_1,
            "text_encoder_2": _T5,
        },
        "networks.lora_flux",
        {_BASE: "flux1", _ARCHITECTURE: "flux-1-dev/lora"},
    ),
    "chroma": KohyaFamily(
        {"transformer": (_DENOISER, chroma.BFL), "text_encoder": _T5},
        "networks.lora_flux",
        {_ARCHITECTURE: "chroma/lora"},
    ),
    "flux.2": KohyaFamily({"transformer": (_DENOISER, flux2.BFL)}, "networks.lora_flux_2"),
    "qwen-image": KohyaFamily(
        {"transformer": (_DENOISER, qwen_image.DIFFUSERS)}, "networks.lora_qwen_image"
    ),
    "z-image": KohyaFamily({"transformer": (_DENOISER, z_image.COMFY)}, "networks.lora_zimage"),
    "wan": KohyaFamily(
        dict.fromkeys(("transformer", "transformer_2"), (_DENOISER, wan.ORIGINAL)),
        "networks.lora_wan",
    ),
    "lumina2": KohyaFamily(
        {
            "transformer": (_DENOISER, lumina2.ORIGINAL),
            "text_encoder": ("lora_te_", text_encoders.GEMMA2),
        },
        "networks.lora_lumina",
        {_ARCHITECTURE: "lumina-2/lora"},
    ),
    "anima": KohyaFamily(
        {
            "transformer": (_DENOISER, anima.COSMOS),
            "text_conditioner": (_DENOISER, anima.LLM_ADAPTER),
            "text_encoder": ("lora_te_", text_encoders.QWEN3),
        },
        "networks.lora_anima",
        {_ARCHITECTURE: "anima-preview/lora"},
    ),
}


def kohya_spelling(fusion: Fusion) -> Spelling:
    """The file in kohya's names.

    Raises:
        KloraError: the family has none, or a layer has none in it.
    """
    family = FAMILIES.get(fusion.family or "")
    if family is None:
        raise KloraError(_no_names(fusion.family))
    modules: dict[tuple[str, str], list[tuple[Entry, Home]]] = {}
    issues = []
    backwards = {component: Backwards(layout) for component, (_, layout) in family.places.items()}
    for entry in (entry for entry in fusion.entries if entry.acts):
        table = backwards.get(entry.component)
        home = None if table is None else table.home(entry.module)
        if home is None:
            issues.append(f"{shown(entry.layer)}: has no name in it")
            continue
        flat = home.module.replace(".", "_")
        key = f"{family.places[entry.component][0]}{flat}"
        modules.setdefault((key, entry.parameter), []).append((entry, home))
    targets = []
    for (key, parameter), parts in sorted(modules.items()):
        weights = modules.get((key, "weight"), ())
        target = _target(key, parameter, parts, weights, fusion.family)
        if isinstance(target, str):
            issues.append(target)
        else:
            targets.append(target)
    if issues:
        raise KloraError(
            f"{len(issues)} layers cannot be written in kohya's names of "
            f"{FAMILY_NAMES[str(fusion.family)]}; take --keys peft.",
            issues,
        )
    metadata = {"ss_network_module": family.module, **family.metadata}
    return Spelling(_ENDINGS, metadata, tuple(targets))


def _no_names(family: str | None) -> str:
    known = ", ".join(FAMILY_NAMES[each] for each in FAMILIES)
    found = "an unknown base model" if family is None else FAMILY_NAMES.get(family, shown(family))
    return (
        f"there are no names in kohya's spelling that tools read for {found}, only for {known}; "
        "take --keys peft."
    )


def _target(
    key: str,
    parameter: str,
    parts: Sequence[tuple[Entry, Home]],
    weights: Sequence[tuple[Entry, Home]],
    family: str | None,
) -> Target | str:
    """One parameter of a file's module out of those of diffusers' modules, or why there is none."""
    entry, home = parts[0]
    if home.row.split is None:
        pointwise = is_pointwise(family, entry.component, entry.module)
        return Target(key, parameter, entry.shape, (Piece(entry),), pointwise)
    columns = next(_columns(parts), None) or next(_columns(weights), None)
    sizes = {each.index: entry.shape[0] for entry, each in parts}
    placed = None if columns is None else shares(home.row, home.numbers, sizes, columns)
    if placed is None:
        others = ", ".join(home.others)
        return f"{shown(entry.layer)}: is one module with {others}, whose sizes nothing here tells"
    out, rows = placed
    pieces = tuple(Piece(entry, rows[each.index]) for entry, each in parts)
    return Target(key, parameter, (out, *entry.shape[1:]), pieces)


def _columns(parts: Sequence[tuple[Entry, Home]]) -> Iterator[int]:
    return (math.prod(entry.shape[1:]) for entry, _ in parts if len(entry.shape) > 1)
