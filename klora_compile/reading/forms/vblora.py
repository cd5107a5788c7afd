"""VB-LoRA (arXiv 2405.15179): a low-rank pair with factors mixed from a bank of vectors.

Each piece of a factor is the mean of the ``topk`` vectors with the largest logits, weighted by
their softmax. The file has all logits, or (``save_only_topk_weights``) the indices of the vectors
and all weights but the last.
"""

from __future__ import annotations

from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import (
    KEEP_CONFIG,
    Form,
    Header,
    Part,
    Shape,
    Shapes,
    Tensors,
    Values,
    WrongValuesError,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import LowRank
from klora_runtime.lazy_torch import torch

BANK = Part("vblora_vector_bank", ("vblora_vector_bank",))
#: Logits of A (rank, pieces, vectors) and of B (pieces, rank, vectors).
LOGITS = tuple(Part(f"vblora_logits_{side}") for side in "AB")
#: Instead of logits: indices (.., .., topk), and weights (.., .., topk - 1).
CHOSEN = tuple(Part(f"{part.name}_topk_indices", whole_numbers=True) for part in LOGITS)
WEIGHTS = tuple(Part(f"{part.name}_topk_weights") for part in LOGITS)


class Vblora(Form):
    """The form of VB-LoRA; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "vblora"
    parts = (*LOGITS, *CHOSEN, *WEIGHTS)
    shared = (BANK,)
    peft = MappingProxyType({"VBLORA": None})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        needed = LOGITS if _has_logits(shapes) else (*CHOSEN, *WEIGHTS)
        absent = missing((*needed, BANK), shapes)
        if absent:
            return absent
        if len(shapes[BANK]) != 2 or 0 in shapes[BANK] or not _fits(shapes):
            return [f"{shapes_text((*self.parts, BANK), shapes)} do not fit each other"]
        topk = layer.settings.get("topk")
        if _has_logits(shapes) and (type(topk) is not int or not 0 < topk <= shapes[BANK][0]):
            return [f"PEFT's configuration says how many vectors are mixed (topk); {KEEP_CONFIG}"]
        return []

    def shape(self, layer: Header) -> Shape:
        shapes = layer.shapes
        a, b = (shapes[part] for part in (LOGITS if _has_logits(shapes) else CHOSEN))
        return b[0] * shapes[BANK][1], a[1] * shapes[BANK][1]

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        down, up = (_mixed(layer, values.tensors, side) for side in range(2))
        rank = len(down)
        return low_rank(down.reshape(rank, -1), up.transpose(1, 2).reshape(-1, rank)), 0.0


def _has_logits(shapes: Shapes) -> bool:
    return not shapes.keys().isdisjoint(LOGITS)


def _fits(shapes: Shapes) -> bool:
    vectors = shapes[BANK][0]
    if _has_logits(shapes):
        a, b = (shapes[part] for part in LOGITS)
        counted = a[2:] == b[2:] == (vectors,)
    else:
        a, b = (shapes[part] for part in CHOSEN)
        counted = a[2:] == b[2:] and all(
            shapes[weights] == (*chosen[:2], chosen[-1] - 1)
            for chosen, weights in zip((a, b), WEIGHTS, strict=True)
        )
    return counted and len(a) == len(b) == 3 and a[0] == b[1] and 0 not in (*a, *b)


def _mixed(layer: Header, tensors: Tensors, side: int) -> torch.Tensor:
    """Return the vectors of a factor, float64, (.., .., length)."""
    bank = tensors[BANK].double()
    if LOGITS[side] in tensors:
        logits, chosen = tensors[LOGITS[side]].double().topk(layer.settings["topk"], dim=-1)
        weights = logits.softmax(dim=-1)
    else:
        chosen, known = tensors[CHOSEN[side]].long(), tensors[WEIGHTS[side]].double()
        if not 0 <= int(chosen.min()) <= int(chosen.max()) < len(bank):
            raise WrongValuesError(
                f"its {CHOSEN[side].name} are not indices of {len(bank)} vectors"
            )
        weights = torch.cat([known, 1.0 - known.sum(-1, keepdim=True)], dim=-1)
    return torch.einsum("abk,abkl->abl", weights, bank[chosen])
