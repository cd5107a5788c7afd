"""OFT and BOFT in PEFT's files: small rotations of the layer's input.

A weight W becomes W R^T by blocks of its columns (a convolution's include the kernel), where R is
the Cayley transform (I - Q)(I + Q)^-1. OFT's file has the upper triangle of Q. Its configuration
says whether R is a sum of powers of Q instead (``use_cayley_neumann``), whether all blocks are
equal (``block_share``), and how far each may turn (``coft``, ``eps``). BOFT's file has B with Q =
(B - B^T)/2, stages between shuffles, and a number per row (``boft_s``).
"""

from __future__ import annotations

import math
from types import MappingProxyType

from klora_compile.reading.forms.parts import Form, Header, Need, Part, Values, missing
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

TRIANGLES = Part("oft_R", (".oft_R.weight",))
BLOCKS, ROWS = Part("boft_R"), Part("boft_s")

_ADVICE = "keep adapter_config.json beside the file"


class PeftOft(Form):
    """The form of PEFT's OFT; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "oft"
    parts = (TRIANGLES,)
    needs = Need.WEIGHT
    peft = MappingProxyType({"OFT": None})

    def problems(self, layer: Header) -> list[str]:
        shape, settings = layer.shapes[TRIANGLES], layer.settings
        if len(shape) != 2 or 0 in shape or _size(shape[1]) is None:
            return [f"oft_R {list(shape)} are not triangles of square blocks"]
        if "use_cayley_neumann" not in settings or "block_share" not in settings:
            return [f"PEFT's configuration says how its blocks are meant; {_ADVICE}"]
        terms, eps = settings.get("num_cayley_neumann_terms", 5), settings.get("eps", 6e-5)
        if type(terms) is not int or not 0 < terms < 100 or not _is_small(eps):
            return ["its num_cayley_neumann_terms or eps in PEFT's configuration is not a number"]
        if layer.weight is None:
            return []
        columns, size = math.prod(layer.weight[1:]), _size(shape[1]) or 1
        fits = columns % size == 0 if settings["block_share"] else columns == shape[0] * size
        if settings["block_share"] and shape[0] != 1:
            fits = False
        if not fits:
            return [
                f"its {shape[0]} blocks of {size} do not turn the {columns} columns of the base "
                f"model's weight {list(layer.weight)}"
            ]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        weight, settings = values.weight, layer.settings
        skew = _skew(values.tensors[TRIANGLES].double())
        if settings.get("coft"):
            limit = float(settings.get("eps", 6e-5)) / math.sqrt(len(skew))
            norm = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
            skew = skew * (limit / norm.clamp_min(limit))
        if settings["use_cayley_neumann"]:
            rotations = _neumann(skew, settings.get("num_cayley_neumann_terms", 5))
        else:
            rotations = _cayley(skew)
        columns = weight.flatten(1).reshape(weight.shape[0], -1, skew.shape[-1])
        blocks = rotations.expand(columns.shape[1], -1, -1)
        turned = torch.einsum("okj,kij->oki", columns, blocks).reshape(weight.shape)
        return Dense((turned - weight).float()), 0.0


class PeftBoft(Form):
    """The form of PEFT's BOFT; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "boft"
    parts = (BLOCKS, ROWS)
    needs = Need.WEIGHT
    peft = MappingProxyType({"BOFT": None})

    def problems(self, layer: Header) -> list[str]:
        absent = missing(self.parts, layer.shapes)
        if absent:
            return absent
        shape = layer.shapes[BLOCKS]
        if len(shape) != 4 or shape[2] != shape[3] or 0 in shape or shape[0] > 32:
            return [f"boft_R {list(shape)} is not (stages, blocks, size, size)"]
        stages, blocks, size, _ = shape
        if stages > 1 and (size % 2 or blocks % 2 ** (stages - 1)):
            return [f"boft_R {list(shape)}: its stages do not fit its blocks"]
        if layer.weight is None:
            return []
        columns = math.prod(layer.weight[1:])
        if columns != blocks * size or math.prod(layer.shapes[ROWS]) != layer.weight[0]:
            return [
                f"boft_R {list(shape)} and boft_s {list(layer.shapes[ROWS])} do not fit the base "
                f"model's weight {list(layer.weight)}"
            ]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        weight, stages = values.weight, values.tensors[BLOCKS].double()
        rotations = _cayley(0.5 * (stages - stages.transpose(-1, -2)))
        blocks, size = stages.shape[1:3]
        turned = weight.flatten(1).T
        for stage, rotation in enumerate(rotations):
            order = _shuffle(blocks * size, size, stage)
            mixed = turned[order.argsort()].view(blocks, size, -1)
            turned = (rotation @ mixed).flatten(0, 1)[order]
        rows = values.tensors[ROWS].double().reshape(-1, 1)
        return Dense(((turned.T * rows).reshape(weight.shape) - weight).float()), 0.0


def _size(triangle: int) -> int | None:
    """Return the size of a square matrix whose upper triangle has this many numbers."""
    side = (1 + math.isqrt(1 + 8 * triangle)) // 2
    return side if side * (side - 1) // 2 == triangle else None


def _is_small(value: object) -> bool:
    return type(value) in (int, float) and 0.0 < float(str(value)) < 1e6


def _skew(triangles: torch.Tensor) -> torch.Tensor:
    """Return Q of each block from its upper triangle, row by row."""
    size = _size(triangles.shape[1]) or 1
    skew = torch.zeros(len(triangles), size, size, dtype=triangles.dtype)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = triangles
    return skew - skew.transpose(-1, -2)


def _cayley(skew: torch.Tensor) -> torch.Tensor:
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    result: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    return result


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """Return I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), PEFT's series; its Q has the other sign."""
    result = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(len(skew), 1, 1)
    if terms < 2:
        return result
    result = result + 2.0 * skew
    if terms == 2:
        return result
    power = skew @ skew
    result = result + 2.0 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        result = result + 2.0 * power
    return result + power @ skew


def _shuffle(rows: int, size: int, stage: int) -> torch.Tensor:
    """Return the order of rows in a stage: even halves of each group of 2^stage blocks first."""
    if stage == 0:
        return torch.arange(rows)
    halves = torch.arange(rows).view(-1, 2**stage, 2, size // 2)
    return halves.transpose(1, 2).flatten()
