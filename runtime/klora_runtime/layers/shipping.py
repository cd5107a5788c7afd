"""Transfer of many tensors to a device: tensors in one block of memory move in one piece."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

#: A block is moved whole if the requested tensors are at least 1/_DENSITY of it.
_DENSITY = 2


def shipped(
    tensors: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Return the tensors on a device in a dtype, in the same order.

    A loaded fusion's factors are views of one block, so they need one transfer and one conversion
    per dtype of the file. Tensors with separate memory, such as decoded ones, are first gathered
    into a block. Tensors that need no change keep their memory.
    """
    blocks: defaultdict[tuple[int, torch.dtype, torch.device], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.device == device and tensor.dtype == dtype:
            continue
        blocks[tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.device].append(index)
    shared = [indices for indices in blocks.values() if len(indices) > 1]
    alone: defaultdict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
    for (_, own_dtype, own_device), indices in blocks.items():
        if len(indices) == 1:
            alone[own_dtype, own_device] += indices
    moved: list[torch.Tensor] = list(tensors)
    for move, places in ((_moved, shared), (_gathered, list(alone.values()))):
        for indices in places:
            parts = [tensors[index] for index in indices]
            for index, part in zip(indices, move(parts, device, dtype), strict=True):
                moved[index] = part
    return moved


def _moved(
    parts: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Move tensors of one block and one dtype."""
    first = min(part.storage_offset() for part in parts)
    size = max(part.storage_offset() + part.numel() for part in parts) - first
    wanted = sum(part.numel() for part in parts)
    if size > _DENSITY * wanted or not all(part.is_contiguous() for part in parts):
        return [part.to(device, dtype) for part in parts]
    block = parts[0].as_strided((size,), (1,), first).to(device, dtype)
    begins = (part.storage_offset() - first for part in parts)
    return [
        block[begin : begin + part.numel()].view(part.shape)
        for begin, part in zip(begins, parts, strict=True)
    ]


def _gathered(
    parts: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Move tensors of one dtype and device that have separate memory."""
    if len(parts) == 1:
        return [parts[0].to(device, dtype)]
    block = torch.cat([part.reshape(-1) for part in parts]).to(device, dtype)
    own = torch.split_with_sizes(block, [part.numel() for part in parts])
    return [each.view(part.shape) for each, part in zip(own, parts, strict=True)]
