"""kohya's names: a prefix for the component, the module path with underscores, and an alpha.

sd-scripts and musubi-tuner write each family in one set of names, which its record has: diffusers'
names, or its authors', which join query, key and value. ComfyUI, Forge and A1111 read these files.
diffusers 0.42 reads them in part: it ignores CLIP's attention if a file also has CLIP's
feed-forward layers. Families whose files of this spelling no known tool reads are refused; some
are read by ComfyUI alone, which takes its own names of any model under this prefix. Deltas
without factors are written as ``diff`` and ``diff_b``, as ComfyUI reads them. Parameters that are
no layer's weight or bias have ComfyUI's full name, the only one under which it reads them
(``model_lora_keys_unet`` in its comfy/lora.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from klora_compile.export.targets import Piece, Spelling, Target, is_of_layer, without_keys
from klora_compile.families.convolutions import is_pointwise
from klora_compile.reading.forms.full import DIFF, DIFF_BIAS
from klora_compile.reading.forms.lora import DOWN, UP
from klora_compile.reading.forms.parts import ALPHA
from klora_compile.reading.names.spelling import COMFY_PREFIX
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.errors import KloraError, shown
from klora_runtime.families.backwards import Backwards, Home, shares
from klora_runtime.families.catalogue import FAMILIES, families_name
from klora_runtime.families.family import Family, Kohya
from klora_runtime.families.text_encoders import CLIP

_ENDINGS = {
    DOWN: ".lora_down.weight",
    UP: ".lora_up.weight",
    ALPHA: ".alpha",
    DIFF: ".diff",
    DIFF_BIAS: ".diff_b",
}


#: The CLIP modules that ComfyUI reads under kohya's prefix.
_KNOWN_OF_CLIP = re.compile(r"\.self_attn\.|\.mlp\.|text_projection$")


def kohya_spelling(fusion: Fusion) -> Spelling:
    """Return the spelling of a fusion in kohya's names.

    Raises:
        KloraError: the family or a layer has no such names.
    """
    family, kohya = _family_of(fusion)
    names = {component: family.kohya_names(component) for component in fusion.components}
    places = {
        component: (own[0], Backwards(own[1]))
        for component, own in names.items()
        if own is not None
    }
    modules: dict[tuple[str, str], list[tuple[Entry, Home]]] = {}
    issues: list[str] = []
    others: list[Entry] = []
    for entry in (entry for entry in fusion.entries if entry.acts):
        prefix, table = places.get(entry.component, ("", None))
        home = None if table is None else _home(entry, table)
        if home is None:
            if is_of_layer(entry):
                issues.append(f"{shown(entry.layer)}: has no name in kohya's spelling")
            else:
                others.append(entry)
            continue
        full = _full_name(family, entry, home)
        key = full or prefix + home.module.replace(".", "_")
        modules.setdefault((key, entry.parameter), []).append((entry, home))
    if others:
        raise without_keys(others)
    targets = []
    for (key, parameter), parts in sorted(modules.items()):
        weights = modules.get((key, "weight"), ())
        target = _target(key, parameter, parts, weights, family.key)
        if isinstance(target, str):
            issues.append(target)
        else:
            targets.append(target)
    if issues:
        raise KloraError(
            f"{len(issues)} layers have no name in kohya's spelling of {family.title}. Use "
            "--keys peft.",
            issues,
        )
    script = {} if family.script is None else {"ss_network_module": family.script.module}
    return Spelling(_ENDINGS, {**script, **kohya.metadata}, tuple(targets))


def _home(entry: Entry, table: Backwards) -> Home | None:
    """Return the place of an entry in a file; None if the table does not name it."""
    if is_of_layer(entry):
        return table.home(entry.module)
    return table.home(entry.path.removeprefix(f"{entry.component}."))


def _full_name(family: Family, entry: Entry, home: Home) -> str | None:
    """Return ComfyUI's full name of what it does not read under kohya's prefix.

    Return None for everything else. Under ``lora_te_``, ``lora_te1_`` and ``lora_te2_`` ComfyUI
    reads only attention, feed-forward layers and the projection of CLIP (``LORA_CLIP_MAP`` and
    ``model_lora_keys_clip`` in its comfy/lora.py), and under ``lora_unet_`` only weights and biases
    of layers.
    """
    if not is_of_layer(entry):
        return COMFY_PREFIX + home.module
    encoder = next((e for e in family.text_encoders if e.component == entry.component), None)
    if encoder is None or encoder.model is not CLIP or encoder.comfy is None:
        return None
    if _KNOWN_OF_CLIP.search(home.module):
        return None
    return f"text_encoders.{encoder.comfy}.transformer.{home.module}"


def _family_of(fusion: Fusion) -> tuple[Family, Kohya]:
    """Return the family in whose names to write, the only candidate that has kohya's; and these.

    Raises:
        KloraError: no candidate has such names, or several have.
    """
    families = [FAMILIES[key] for key in fusion.candidates if key in FAMILIES]
    named = [(each, each.kohya) for each in families if each.kohya is not None]
    if len(named) == 1:
        return named[0]
    if named:
        raise KloraError(
            f"this artifact is for {families_name(fusion.candidates)}, and kohya-style files state "
            f"their base model. Compile it again with --family {named[0][0].key} or another, or "
            "use --keys peft."
        )
    known = ", ".join(each.title for each in FAMILIES.values() if each.kohya is not None)
    if not fusion.candidates:
        raise KloraError(
            "the layers do not say which base model this artifact is for, and kohya-style files "
            "state it. Compile it again with --family KEY, or use --keys peft."
        )
    raise KloraError(
        f"klora knows no kohya-style keys that tools read for "
        f"{shown(families_name(fusion.candidates))}; supported: {known}. Use --keys peft for "
        "diffusers."
    )


def _target(
    key: str,
    parameter: str,
    parts: Sequence[tuple[Entry, Home]],
    weights: Sequence[tuple[Entry, Home]],
    family: str | None,
) -> Target | str:
    """Return a parameter of a file's module from those of diffusers' modules, or why it fails."""
    entry, home = parts[0]
    if home.row.split is None:
        pointwise = is_of_layer(entry) and is_pointwise(family, entry.component, entry.module)
        return Target(key, parameter, entry.shape, (Piece(entry),), pointwise)
    columns = next(_columns(parts), None) or next(_columns(weights), None)
    sizes = {each.index: entry.shape[0] for entry, each in parts}
    placed = None if columns is None else shares(home.row, home.numbers, sizes, columns)
    if placed is None:
        others = ", ".join(home.others)
        return (
            f"{shown(entry.layer)}: kohya stores it fused with {others}, which this "
            "artifact does not contain"
        )
    out, rows = placed
    pieces = tuple(Piece(entry, rows[each.index]) for entry, each in parts)
    return Target(key, parameter, (out, *entry.shape[1:]), pieces)


def _columns(parts: Sequence[tuple[Entry, Home]]) -> Iterator[int]:
    return (math.prod(entry.shape[1:]) for entry, _ in parts if len(entry.shape) > 1)
