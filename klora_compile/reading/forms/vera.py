"""VeRA (arXiv 2310.11454): one pair of random matrices for all layers, scaled by learnt vectors.

b * (B (d * A)), B and A cut to the layer's rows and columns. PEFT saves the pair once in the file,
or only the seed that it grows from, at the size of the largest layer.
"""

from __future__ import annotations

import math
from types import MappingProxyType

import torch

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import Form, Header, Need, Part, Values, missing
from klora_runtime.artifact.delta import LowRank

ROWS, RANKS = Part("vera_lambda_b"), Part("vera_lambda_d")
A, B = Part("vera_A", ("vera_A",)), Part("vera_B", ("vera_B",))

_SEED = "projection_prng_key"


class Vera(Form):
    """See :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "vera"
    parts = (ROWS, RANKS)
    shared = (A, B)
    needs = Need.SHAPE
    peft = MappingProxyType({"VERA": None})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing(self.parts, shapes)
        if absent:
            return absent
        if any(len(shapes[part]) != 1 for part in self.parts):
            return ["its vectors are no vectors"]
        (rows,), (rank,) = shapes[ROWS], shapes[RANKS]
        if (A in shapes) != (B in shapes):
            return [f"the file has only {A.name if A in shapes else B.name}, expected both"]
        if A not in shapes and type(layer.settings.get(_SEED)) is not int:
            return [
                "the file has neither vera_A and vera_B nor their seed: keep adapter_config.json "
                "beside it"
            ]
        if layer.weight is None:
            return []
        if len(layer.weight) != 2 or layer.weight[0] != rows:
            return [f"it scales {rows} rows, and the base model's weight is {list(layer.weight)}"]
        if A in shapes and not (
            len(shapes[A]) == len(shapes[B]) == 2
            and shapes[A][0] == shapes[B][1] == rank
            and shapes[A][1] >= layer.weight[1]
            and shapes[B][0] >= rows
        ):
            return [
                f"vera_A {list(shapes[A])} and vera_B {list(shapes[B])} do not hold rank {rank} of "
                f"{list(layer.weight)}"
            ]
        return []

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        assert layer.weight is not None
        out, inner = layer.weight
        rows, ranks = (values.tensors[part].double() for part in (ROWS, RANKS))
        if A in values.tensors:
            a, b = values.tensors[A], values.tensors[B]
        else:
            a, b = _grown(layer.settings[_SEED], len(ranks), values.largest)
        down = ranks[:, None] * a[:, :inner].double()
        return low_rank(down, rows[:, None] * b[:out].double()), 0.0


def _grown(seed: int, rank: int, largest: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, columns) and B (rows, rank) from PEFT's seed: uniform, Kaiming's bound, A first."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = largest
    a, b = torch.empty(rank, columns), torch.empty(rows, rank)
    for each in (a, b):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(each.shape[1]))
        each.uniform_(-bound, bound, generator=generator)
    return a, b
