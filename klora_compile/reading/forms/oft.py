"""OFT and BOFT in kohya's and LyCORIS' files: small rotations of the rows of a weight.

A weight W becomes R W. R is a rotation of blocks of rows (OFT, arXiv 2306.07280), or a product of
such rotations, each between a shuffle of the rows and its inverse (BOFT, arXiv 2311.06243). A block
is the Cayley transform (I + Q)(I - Q)^-1 of Q = B - B^T with the file's tensor B. ``alpha`` is not
a scale: alpha times the number of rows limits the norm of all Q; 0 means no limit in LyCORIS and no
rotation in kohya's files. ``rescale`` (LyCORIS) then multiplies each row.

Keys of kohya's files begin with ``oft_unet_``. For FLUX they split a fused layer's rows into query,
key, value and the rest, each with its own blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from klora_compile.reading.forms.parts import (
    ALPHA,
    Form,
    Header,
    Need,
    Part,
    Shapes,
    Values,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

BLOCKS = Part("oft_blocks")
SPANS = tuple(Part(f"oft_blocks.{i}") for i in range(4))
RESCALE = Part("rescale")

_KOHYA = "oft_unet_"


class Oft(Form):
    """The form of OFT and BOFT; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "oft"
    parts = (BLOCKS, *SPANS, RESCALE)
    needs = Need.WEIGHT

    def title(self, layer: Header) -> str:
        return "boft" if len(layer.shapes.get(BLOCKS, ())) == 4 else self.name

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        blocks = _blocks(shapes)
        text = shapes_text(self.parts, shapes)
        if not blocks or not all(map(_is_square, blocks)):
            expected = "oft_blocks (blocks, size, size), or (stages, blocks, size, size)"
            return [f"{text or 'nothing'} make no OFT: expected {expected}"]
        if any(len(shape) == 4 for shape in blocks):
            stages, count, size = blocks[0][:3]
            if len(blocks) > 1 or size % 2 or (count * size) % (2 ** (stages - 1) * size):
                return [f"{text} make no BOFT: its stages do not fit its blocks"]
        rows = sum(shape[-3] * shape[-1] for shape in blocks)
        if RESCALE in shapes and math.prod(shapes[RESCALE]) != rows:
            return [f"{text} make no OFT: expected rescale of {rows} rows"]
        if layer.weight is not None and layer.weight[0] != rows:
            return [
                f"its blocks turn {rows} rows, and the base model's weight is {list(layer.weight)}"
            ]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        weight, tensors = values.weight, values.tensors
        limit = float(tensors[ALPHA]) if ALPHA in tensors else 0.0
        limited = limit > 0.0 or layer.spelled.startswith(_KOHYA)
        turned, start = [], 0
        for part in (BLOCKS, *SPANS):
            if part not in tensors:
                continue
            blocks = tensors[part].double()
            rows = blocks.shape[-3] * blocks.shape[-1]
            rotations = _cayley(blocks, limit * rows if limited else math.inf)
            span = weight[start : start + rows].flatten(1)
            turn = _butterfly if blocks.dim() == 4 else _turned
            turned.append(turn(span, rotations))
            start += rows
        result = torch.cat(turned)
        if RESCALE in tensors:
            result = tensors[RESCALE].double().reshape(-1, 1) * result
        return Dense((result.reshape(weight.shape) - weight).float()), 0.0


def _blocks(shapes: Shapes) -> Sequence[tuple[int, ...]]:
    if BLOCKS in shapes:
        return [] if any(part in shapes for part in SPANS) else [shapes[BLOCKS]]
    found = [shapes[part] for part in SPANS if part in shapes]
    return found if list(SPANS[: len(found)]) == [part for part in SPANS if part in shapes] else []


def _is_square(shape: tuple[int, ...]) -> bool:
    return 3 <= len(shape) <= 4 and shape[-1] == shape[-2] and 0 not in shape


def _cayley(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """Return (I + Q)(I - Q)^-1 of each block, with the norm of all Q limited."""
    skew = blocks - blocks.transpose(-1, -2)
    norm = float(torch.linalg.vector_norm(skew))
    if norm > limit:
        skew = skew * (limit / norm)
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    result: torch.Tensor = torch.linalg.solve(identity - skew, identity + skew, left=False)
    return result


def _turned(rows: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Return rows rotated by OFT: each block by its rotation, transposed as in both trainers."""
    blocks, size, _ = rotations.shape
    return torch.einsum("knm,kni->kmi", rotations, rows.view(blocks, size, -1)).flatten(0, 1)


def _butterfly(rows: torch.Tensor, stages: torch.Tensor) -> torch.Tensor:
    """Return rows rotated by BOFT: the blocks of a stage join rows 2^stage half blocks apart.

    Args:
        rows: (blocks * size, columns).
        stages: (stages, blocks, size, size).
    """
    blocks, size = stages.shape[1:3]
    columns = rows.shape[1]
    for stage, block in enumerate(stages):
        apart = 2**stage * (size // 2)
        mixed = rows.reshape(-1, 2, apart, columns).transpose(1, 2).reshape(blocks, size, columns)
        turned = (block @ mixed).reshape(-1, apart, 2, columns)
        rows = turned.transpose(1, 2).reshape(-1, columns)
    return rows
