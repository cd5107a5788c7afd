"""PEANuT (arXiv 2410.01870): a small network computes the delta from the weight.

Each column of the weight, as an output vector, passes through A, then encoders and decoders of one
width with an activation after each, and B. Each decoder's result is added to the input of the
opposite encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import (
    KEEP_CONFIG,
    Form,
    Header,
    Need,
    Part,
    Shapes,
    Values,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import LowRank
from klora_runtime.errors import shown
from klora_runtime.lazy_torch import torch

A, B = (Part(f"peanut_{side}", (f".peanut_{side}.weight",)) for side in "AB")

#: Greatest number of encoders; published files have at most three.
_MAX_DEPTH = 16


def _stages(kind: str) -> tuple[Part, ...]:
    names = (f"peanut_{kind}.{stage}" for stage in range(_MAX_DEPTH))
    return tuple(Part(name, (f".{name}.weight",)) for name in names)


ENCODERS, DECODERS = _stages("encoders"), _stages("decoders")

#: transformers' names of activation functions.
_CURVES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": lambda x: torch.relu(x),
    "silu": lambda x: torch.nn.functional.silu(x),
    "swish": lambda x: torch.nn.functional.silu(x),
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "tanh": lambda x: torch.tanh(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x),
    "linear": lambda x: x,
}


class Peanut(Form):
    """The form of PEANuT; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "peanut"
    parts = (A, B, *ENCODERS, *DECODERS)
    needs = Need.WEIGHT
    peft = MappingProxyType({"PEANUT": None})

    def problems(self, layer: Header) -> list[str]:
        shapes, settings = layer.shapes, layer.settings
        absent = missing((A, B), shapes)
        if absent:
            return absent
        curve, scaling = settings.get("act_fn"), settings.get("scaling")
        if not isinstance(curve, str) or type(scaling) not in (int, float):
            return [f"PEFT's configuration says its act_fn and scaling; {KEEP_CONFIG}"]
        if curve not in _CURVES:
            known = ", ".join(_CURVES)
            return [f"its act_fn is {shown(curve)}, and klora computes {known}"]
        a, b, rows = shapes[A], shapes[B], (layer.weight or shapes[B])[0]
        encoders, decoders = (_present(stages, shapes) for stages in (ENCODERS, DECODERS))
        square = all(shapes[part] == (a[0], a[0]) for part in (*encoders, *decoders))
        fits = len(a) == len(b) == 2 and b == (a[1], a[0]) and 0 not in a
        if not (fits and square) or len(encoders) != len(decoders) or rows != b[0]:
            return [f"{shapes_text(self.parts, shapes)} do not fit each other or the base's weight"]
        return []

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        assert values.weight is not None
        curve = _CURVES[layer.settings["act_fn"]]
        a, b = (values.tensors[part].double() for part in (A, B))
        encoders, decoders = (
            [values.tensors[part].double() for part in _present(stages, layer.shapes)]
            for stages in (ENCODERS, DECODERS)
        )
        found, entered = curve(a @ values.weight), []
        for encoder in encoders:
            entered.append(found)
            found = curve(encoder @ found)
        for decoder in decoders:
            found = curve(decoder @ found) + entered.pop()
        return low_rank(found, layer.settings["scaling"] * b), 0.0


def _present(stages: tuple[Part, ...], shapes: Shapes) -> list[Part]:
    return [part for part in stages if part in shapes]
