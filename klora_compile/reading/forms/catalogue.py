"""All forms, and which one a layer's tensors are of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from klora_compile.reading.forms.full import Full
from klora_compile.reading.forms.loha import Loha
from klora_compile.reading.forms.lokr import Lokr
from klora_compile.reading.forms.lora import Lora
from klora_compile.reading.forms.parts import Form, Part

#: A new form is a new file and a row here.
FORMS: tuple[Form, ...] = (
    Lora(),
    Loha(),
    Lokr(),
    Full("full", Part.DIFF),
    Full("norm", Part.NORM_WEIGHT),
    Full("value", Part.VALUE),
)

#: Parts that change the bias beside a weight, each a delta as it is -> the form's name.
BIASES: Mapping[Part, str] = {
    Part.UP_BIAS: "bias",
    Part.DIFF_BIAS: "bias",
    Part.NORM_BIAS: "norm",
}

#: DoRA's magnitudes; they go with any form of a weight's delta.
MAGNITUDES = (Part.MAGNITUDE, Part.ROW_MAGNITUDE)


def form_of(parts: Iterable[Part]) -> Form | str | None:
    """The form of a weight's delta.

    Returns:
        The form, None where only a bias is changed, or what is wrong.
    """
    parts = set(parts)
    found = [form for form in FORMS if not parts.isdisjoint(form.parts)]
    if len(found) > 1:
        return f"is {' and '.join(form.name for form in found)} at once"
    if found:
        return found[0]
    if parts.isdisjoint(BIASES):
        return "has no down and no up"
    return None
