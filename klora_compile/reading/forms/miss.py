"""MiSS (PEFT; Bone, arXiv 2409.15371): one small block is repeated along the columns.

Columns j, j + r, j + 2 r ... of the delta are row j of the block, (r, out). ``mini``: the block has
fewer columns, which repeat for all rows. ``bat``: each square block W of the weight changes by
W B + B.
"""

from __future__ import annotations

from types import MappingProxyType

from klora_compile.reading.factoring import low_rank
from klora_compile.reading.forms.parts import Form, Header, Need, Part, Values
from klora_runtime.artifact.delta import Dense, LowRank
from klora_runtime.lazy_torch import torch

BLOCK = Part("miss_block")


class Miss(Form):
    """The form of MiSS; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "miss"
    parts = (BLOCK,)
    needs = Need.WEIGHT
    peft = MappingProxyType({"MISS": None})

    def problems(self, layer: Header) -> list[str]:
        shape = layer.shapes[BLOCK]
        if "init_weights" not in layer.settings:
            return [
                "PEFT's configuration says how its block is meant; keep adapter_config.json beside "
                "the file"
            ]
        start = layer.settings["init_weights"]
        bat = start == "bat"
        if len(shape) != (3 if bat else 2) or 0 in shape or (bat and shape[1] != shape[2]):
            return [f"miss_block {list(shape)} is not a block of init_weights={start}"]
        if layer.weight is None:
            return []
        if len(layer.weight) == 2:
            out, inner = layer.weight
            if bat:
                fits = out == shape[0] * shape[1] and inner % shape[1] == 0
            elif start == "mini":
                fits = out % shape[1] == 0 and shape[0] <= inner
            else:
                fits = out == shape[1] and shape[0] <= inner
            if fits:
                return []
        return [
            f"miss_block {list(shape)} does not fit the base model's weight {list(layer.weight)}"
        ]

    def is_dense(self, layer: Header) -> bool:
        return bool(layer.settings["init_weights"] == "bat")

    def delta(self, layer: Header, values: Values) -> tuple[LowRank | Dense, float]:
        assert values.weight is not None
        weight, block = values.weight, values.tensors[BLOCK].double()
        out, inner = weight.shape
        if block.dim() == 2:
            up = block.repeat(1, out // block.shape[1]).T
            rank = len(block)
            down = torch.eye(rank, dtype=block.dtype).repeat(1, -(-inner // rank))[:, :inner]
            return low_rank(down, up.contiguous()), 0.0
        size = block.shape[1]
        squares = weight.reshape(out // size, size, inner // size, size)
        mixed = torch.einsum("oacb,obd->oacd", squares, block) + block[:, :, None, :]
        return Dense(mixed.reshape(out, inner).float()), 0.0
