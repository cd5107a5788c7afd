"""Many tensors to a device at once: what lies in one block of memory is moved in one piece."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

#: A block is moved whole where the tensors asked for are at least one part in this many of it.
_DENSITY = 2


def shipped(
    tensors: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The tensors on a device in a dtype, in their order.

    A loaded fusion's factors are views of one block: they take one transfer and one conversion
    for each dtype of the file, however many they are. So do those that have memory of their own
    each, as decoded ones do: they are put side by side before. Where nothing has to change, they
    are the same memory as before.
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
    """Tensors of one block and one dtype."""
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
    """Tensors of one dtype and device, each with memory of its own."""
    if len(parts) == 1:
        return [parts[0].to(device, dtype)]
    block = torch.cat([part.reshape(-1) for part in parts]).to(device, dtype)
    own = torch.split_with_sizes(block, [part.numel() for part in parts])
    return [each.view(part.shape) for each, part in zip(own, parts, strict=True)]
