"""RandLoRA (arXiv 2502.00987): random matrices for all layers, scaled by learnt vectors.

The delta is B A' with A' = lambda * A * gamma, scaled by alpha / r. A and B are cut to the layer's
shorter and longer side and reshaped to matrices as in PEFT, with A's ranks outside and B's ranks
inside its bases. A layer with more columns than rows has the product transposed.

PEFT saves the pair, or only its seed. The seed reproduces a sparse pair (numbers -1, 0 and 1 before
normalisation). It does not reproduce a dense pair: PEFT draws it in bfloat16 if the machine has
that, else in float16, and no file says which.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Need,
    Part,
    Peers,
    Settings,
    Values,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

LAMBDA, GAMMA = Part("randlora_lambda"), Part("randlora_gamma")
A, B = Part("randlora_A"), Part("randlora_B")
#: The pair of the whole file; PEFT also writes it to each layer.
FILE_A, FILE_B = (Part(f"{part.name} of the file", (part.name,)) for part in (A, B))


class RandLora(Form):
    """The form of RandLoRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

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
            return _problems_without_pair(layer)
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
        out, inner = layer.weight
        short, long = min(out, inner), max(out, inner)
        scales, gamma = (values.tensors[part].double() for part in (LAMBDA, GAMMA))
        if pair is None:
            a, b = (each.double() for each in _grown(layer.settings, len(scales), values.peers))
        else:
            a, b = (values.tensors[part].double() for part in pair)
        bases = len(gamma)
        scaled = scales[:, :, None] * a[:, :, :short] * gamma[None]  # rank, bases, short
        product = b[:long, :bases].flatten(1) @ scaled.flatten(0, 1)
        return Dense((product if short == inner else product.T).float().contiguous()), 0.0


def _pair(layer: Header) -> tuple[Part, Part] | None:
    """Return the tensors of the random pair: the layer's own, else the file's."""
    pairs = ((A, B), (FILE_A, FILE_B))
    return next((pair for pair in pairs if set(pair) <= set(layer.shapes)), None)


def _problems_without_pair(layer: Header) -> list[str]:
    settings, weight = layer.settings, layer.weight
    sparse = settings.get("sparse") is True or settings.get("very_sparse") is True
    if not sparse or type(settings.get("projection_prng_key")) is not int:
        return [
            "the file has no randlora_A and randlora_B, and their seed alone does not tell "
            "them: save it with save_projection=True"
        ]
    scales, gamma = layer.shapes[LAMBDA], layer.shapes[GAMMA]
    fits = len(scales) == len(gamma) == 2 and scales[1] == gamma[0] and 0 not in (*scales, *gamma)
    if weight is not None:
        fits = fits and len(weight) == 2 and gamma == (-(-min(weight) // scales[0]), min(weight))
    return [] if fits else [f"{shapes_text((LAMBDA, GAMMA), layer.shapes)} do not fit each other"]


def _grown(settings: Settings, rank: int, peers: Peers) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sparse A (rank, 1, short) and B (long, bases, rank) of the largest layer."""
    short, long = min(peers.rows, peers.columns), max(peers.rows, peers.columns)
    sparsity = math.sqrt(short) if settings.get("very_sparse") else 3
    generator = torch.Generator().manual_seed(settings["projection_prng_key"])
    pair = []
    for shape in ((rank, 1, short), (long, -(-short // rank), rank)):
        drawn = torch.rand(shape, generator=generator)
        signs = (drawn > 1 - 1 / (2 * sparsity)).float() - (drawn < 1 / (2 * sparsity)).float()
        pair.append(signs / signs.std())
    return pair[0], pair[1]
