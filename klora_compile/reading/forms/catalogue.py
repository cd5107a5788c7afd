"""All forms, and the detection of a layer's form by its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from klora_compile.reading.forms.adalora import Adalora
from klora_compile.reading.forms.c3a import C3a
from klora_compile.reading.forms.deft import Deft
from klora_compile.reading.forms.delora import Delora
from klora_compile.reading.forms.dora import MAGNITUDE, ROW_MAGNITUDE
from klora_compile.reading.forms.frod import Frod
from klora_compile.reading.forms.full import (
    BEFT_BIAS,
    DIFF,
    DIFF_BIAS,
    NORM_BIAS,
    NORM_WEIGHT,
    Full,
    Value,
)
from klora_compile.reading.forms.glora import Glora, PeftGlora
from klora_compile.reading.forms.gralora import Gralora
from klora_compile.reading.forms.hira import Hira
from klora_compile.reading.forms.hra import Hra
from klora_compile.reading.forms.ia3 import Ia3, PeftIa3
from klora_compile.reading.forms.loha import Loha
from klora_compile.reading.forms.lokr import Lokr
from klora_compile.reading.forms.lora import UP_BIAS, Lora
from klora_compile.reading.forms.miss import Miss
from klora_compile.reading.forms.oft import Oft
from klora_compile.reading.forms.osf import Osf
from klora_compile.reading.forms.parts import ALPHA, Form, Part
from klora_compile.reading.forms.peanut import Peanut
from klora_compile.reading.forms.peft_oft import PeftBoft, PeftOft
from klora_compile.reading.forms.poly import Poly
from klora_compile.reading.forms.randlora import RandLora
from klora_compile.reading.forms.road import Road
from klora_compile.reading.forms.shira import Shira
from klora_compile.reading.forms.spectra import FourierFt, WaveFt
from klora_compile.reading.forms.supertuning import Supertuning
from klora_compile.reading.forms.tinylora import Tinylora
from klora_compile.reading.forms.unilora import Unilora
from klora_compile.reading.forms.vblora import Vblora
from klora_compile.reading.forms.vera import Vera

#: A new form is a new file and a row here.
FORMS: tuple[Form, ...] = (
    Lora(),
    Loha(),
    Lokr(),
    Full("full", DIFF),
    Full("norm", NORM_WEIGHT),
    Value(),
    Oft(),
    PeftOft(),
    PeftBoft(),
    Glora(),
    PeftGlora(),
    Ia3(),
    PeftIa3(),
    Vera("vera"),
    Vera("pvera", halves=2),
    Hira(),
    Miss(),
    Shira(),
    FourierFt(),
    WaveFt(),
    Delora(),
    C3a(),
    Gralora(),
    RandLora(),
    Adalora(),
    Hra(),
    Road(),
    Vblora(),
    Unilora(),
    Tinylora(),
    Osf(),
    Supertuning(),
    Deft(),
    Peanut(),
    Frod(),
    Poly(),
)

_FORM_OF_PART: Mapping[Part, Form] = {part: form for form in FORMS for part in form.parts}

#: Part that is the delta of the bias beside a weight -> name of the form.
BIASES: Mapping[Part, str] = {
    UP_BIAS: "bias",
    DIFF_BIAS: "bias",
    BEFT_BIAS: "bias",
    NORM_BIAS: "norm",
}

#: DoRA's magnitudes, which combine with any form of a weight's delta.
MAGNITUDES = (MAGNITUDE, ROW_MAGNITUDE)

#: Ending of a key -> the part of its module. The longest match is used.
ENDINGS: Mapping[str, Part] = {
    ending: part
    for part in (ALPHA, *chain.from_iterable(form.parts for form in FORMS), *BIASES, *MAGNITUDES)
    for ending in part.all_endings
}

#: Whole key -> part that a file has once.
SHARED: Mapping[str, Part] = {
    ending: part for form in FORMS for part in form.shared for ending in part.all_endings
}

_SHARED_BEGINNINGS = tuple(chain.from_iterable(form.shared_beginnings for form in FORMS))

#: PEFT's type of adapter that klora reads -> key of its alpha.
PEFT_TYPES: Mapping[str, str | None] = {
    **{name: alpha for form in FORMS for name, alpha in form.peft.items()},
    "BEFT": None,
}


def shared_part(key: str) -> Part | None:
    """Return the part that a file has once under this key; None for other keys."""
    part = SHARED.get(key)
    return Part(key) if part is None and key.startswith(_SHARED_BEGINNINGS) else part


def form_of(parts: Iterable[Part]) -> Form | str | None:
    """Return the form of a weight's delta.

    Returns:
        The form; None if only a bias changes; or the problem.
    """
    parts = tuple(parts)
    found = {_FORM_OF_PART[part] for part in parts if part in _FORM_OF_PART}
    if len(found) > 1:
        return f"is {' and '.join(form.name for form in FORMS if form in found)} at once"
    if found:
        return found.pop()
    if not any(part in BIASES for part in parts):
        return "has no down and no up"
    return None
