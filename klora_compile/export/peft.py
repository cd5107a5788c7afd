"""Names of PEFT and diffusers: component, module path with dots, ``lora_A`` and ``lora_B``.

diffusers assumes alpha = rank if a file states no alpha. There is no name for a delta without
factors, and no name that loaders read for a bias or another parameter.
"""

from __future__ import annotations

from klora_compile.export.targets import Piece, Spelling, Target, is_of_layer, without_keys
from klora_compile.families.convolutions import is_pointwise
from klora_compile.reading.forms.lora import DOWN, UP
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.artifact.schedule import TEXT_ENCODERS
from klora_runtime.families.backwards import Backwards
from klora_runtime.families.text_encoders import CLIP

_ENDINGS = {DOWN: ".lora_A.weight", UP: ".lora_B.weight"}

#: The two transformers of a model have separate files with the same names; users tell the loader.
_COMPONENTS = {"transformer_2": "transformer"}

#: Files have ``text_model.`` in CLIP's paths, for every version of transformers.
_CLIP = Backwards(CLIP.written)


def peft_spelling(fusion: Fusion) -> Spelling:
    """Return the spelling of a fusion in PEFT's names.

    Raises:
        KloraError: it has no names for a parameter.
    """
    entries = [entry for entry in fusion.entries if entry.acts]
    if others := [entry for entry in entries if not is_of_layer(entry)]:
        raise without_keys(others)
    targets = (_target(entry, fusion.family) for entry in entries)
    ordered = sorted(targets, key=lambda target: (target.key, target.parameter))
    return Spelling(_ENDINGS, {}, tuple(ordered))


def _target(entry: Entry, family: str | None) -> Target:
    component = _COMPONENTS.get(entry.component, entry.component)
    home = _CLIP.home(entry.module) if entry.component in TEXT_ENCODERS else None
    return Target(
        key=f"{component}.{entry.module if home is None else home.module}",
        parameter=entry.parameter,
        shape=entry.shape,
        pieces=(Piece(entry),),
        pointwise=is_pointwise(family, entry.component, entry.module),
    )
