"""VeRA (arXiv 2310.11454): one pair of random matrices for all layers, scaled by learnt vectors.

The delta is b * (B (d * A)), with B and A cut to the layer's rows and columns. PEFT saves the pair
of the largest layer's size once in the file, or only its seed.

PVeRA (arXiv 2512.07703) learns a mean and a variance: d and A have twice the rank, with the mean in
the first half. Like PEFT's merge, klora uses the mean.
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import (
    KEEP_CONFIG,
    Form,
    Header,
    Need,
    Part,
    Peers,
    Values,
    missing,
)
from klora_runtime.artifact.delta import LowRank
from klora_runtime.lazy_torch import torch

_SEED = "projection_prng_key"


class Vera(Form):
    """The form of VeRA and PVeRA; see :class:`~klora_compile.reading.forms.parts.Form`.

    Args:
        name: beginning of PEFT's keys, and name in reports.
        halves: number of ranks of d and A per rank of B; only the first share of them is used.
    """

    needs = Need.SHAPE

    def __init__(self, name: str, halves: int = 1) -> None:
        self.name = name
        self.peft = MappingProxyType({name.upper(): None})
        self._rows, self._ranks = self.parts = (
            Part(f"{name}_lambda_b"),
            Part(f"{name}_lambda_d"),
        )
        self._a, self._b = self.shared = (
            Part(f"{name}_A", (f"{name}_A",)),
            Part(f"{name}_B", (f"{name}_B",)),
        )
        self._halves = halves

    def problems(self, layer: Header) -> list[str]:
        shapes, (a, b) = layer.shapes, self.shared
        absent = missing(self.parts, shapes)
        if absent:
            return absent
        if any(len(shapes[part]) != 1 for part in self.parts):
            return ["its vectors are not one-dimensional"]
        (rows,), (ranks,) = (shapes[part] for part in self.parts)
        if (a in shapes) != (b in shapes):
            return [f"the file has only {a.name if a in shapes else b.name}, expected both"]
        if ranks % self._halves:
            return [f"{self._ranks.name} {list(shapes[self._ranks])} has no two halves"]
        if a not in shapes and type(layer.settings.get(_SEED)) is not int:
            return [f"the file has neither {a.name} and {b.name} nor their seed: {KEEP_CONFIG}"]
        if layer.weight is None:
            return []
        if len(layer.weight) != 2 or layer.weight[0] != rows:
            return [f"it scales {rows} rows, and the base model's weight is {list(layer.weight)}"]
        if a in shapes and not (
            len(shapes[a]) == len(shapes[b]) == 2
            and shapes[a][0] == self._halves * shapes[b][1] == ranks
            and shapes[a][1] >= layer.weight[1]
            and shapes[b][0] >= rows
        ):
            return [
                f"{a.name} {list(shapes[a])} and {b.name} {list(shapes[b])} do not hold rank "
                f"{ranks // self._halves} of {list(layer.weight)}"
            ]
        return []

    def is_dense(self, layer: Header) -> bool:
        return False

    def delta(self, layer: Header, values: Values) -> tuple[LowRank, float]:
        assert layer.weight is not None
        out, inner = layer.weight
        rows, ranks = (values.tensors[part].double() for part in self.parts)
        rank = len(ranks) // self._halves
        if self._a in values.tensors:
            a, b = (values.tensors[part] for part in self.shared)
        else:
            a, b = _grown(layer.settings[_SEED], len(ranks), rank, values.peers)
        down = ranks[:rank, None] * a[:rank, :inner].double()
        return low_rank(down, rows[:, None] * b[:out].double()), 0.0


def _grown(seed: int, ranks: int, rank: int, peers: Peers) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (ranks, columns) and B (rows, rank) from PEFT's seed: Kaiming uniform, A first."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.empty(ranks, peers.columns), torch.empty(peers.rows, rank)
    for each in (a, b):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(each.shape[1]))
        each.uniform_(-bound, bound, generator=generator)
    return a, b
