"""RandLoRA (arXiv 2502.00987): random matrices for all layers, scaled by learnt vectors.

B A', A' = lambda * A * gamma, A and B cut to the layer's shorter and longer side and made matrices
as PEFT does, A's ranks outside and B's inside its bases; a layer with more columns than rows has
the product transposed. All is scaled by alpha / r.
The pair's dtype depends on the machine that drew it, so that its seed alone does not tell it.
"""

from __future__ import annotations

from types import MappingProxyType

from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Need,
    Part,
    Values,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense

LAMBDA, GAMMA = Part("randlora_lambda"), Part("randlora_gamma")
A, B = Part("randlora_A"), Part("randlora_B")
#: PEFT writes the pair to each layer as well.
FILE_A, FILE_B = (Part(f"{part.name} of the file", (part.name,)) for part in (A, B))


class RandLora(Form):
    """See :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "randlora"
    parts = (LAMBDA, GAMMA, A, B)
    shared = (FILE_A, FILE_B)
    needs = Need.SHAPE
    peft = MappingProxyType({"RANDLORA": "randlora_alpha"})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing((LAMBDA, GAMMA), shapes)
        if absent:
            return absent
        pair = _pair(layer)
        if pair is None:
            return [
                "the file has no randlora_A and randlora_B, and their seed alone does not tell "
                "them: save it with save_projection=True"
            ]
        text = shapes_text((LAMBDA, GAMMA, *pair), shapes)
        a, b, scales, gamma = (shapes[part] for part in (*pair, LAMBDA, GAMMA))
        if not (len(a) == len(b) == 3 and len(scales) == len(gamma) == 2):
            return [f"{text} do not fit each other"]
        rank, bases = scales
        if a[:2] != (rank, 1) or b[2] != rank or b[1] < bases or gamma[0] != bases:
            return [f"{text} do not fit each other"]
        if layer.weight is None:
            return []
        short, long = min(layer.weight), max(layer.weight)
        if len(layer.weight) != 2 or gamma[1] != short or a[2] < short or b[0] < long:
            return [f"{text} do not fit the base model's weight {list(layer.weight)}"]
        return []

    def rank(self, layer: Header) -> int:
        return layer.shapes[LAMBDA][0]

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        pair = _pair(layer)
        assert layer.weight is not None
        assert pair is not None
        out, inner = layer.weight
        short, long = min(out, inner), max(out, inner)
        scales, gamma, a, b = (values.tensors[part].double() for part in (LAMBDA, GAMMA, *pair))
        bases = len(gamma)
        scaled = scales[:, :, None] * a[:, :, :short] * gamma[None]  # rank, bases, short
        product = b[:long, :bases].flatten(1) @ scaled.flatten(0, 1)
        return Dense((product if short == inner else product.T).float().contiguous()), 0.0


def _pair(layer: Header) -> tuple[Part, Part] | None:
    """The tensors of the random pair: the layer's own, else the file's."""
    pairs = ((A, B), (FILE_A, FILE_B))
    return next((pair for pair in pairs if set(pair) <= set(layer.shapes)), None)
