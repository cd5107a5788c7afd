"""Timesteps that loops pass: their place in the arguments, and their index in the scheduler's list.

Nothing here waits for a GPU, except :func:`differ` if it is allowed to, and :func:`is_clean`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: Names of the argument in schedulers and denoisers; the first one that a function has is used.
_NAMES = ("timestep", "timesteps", "t")

Reader = Callable[[Sequence[Any], Mapping[str, Any]], Any]


#: Schedulers of diffusers whose last timestep is where the last step ends; loops leave it out.
_LIST_THE_END = frozenset(
    ("DDPMWuerstchenScheduler", "LTXEulerAncestralRFScheduler", "SCMScheduler")
)


def timestep_reader(
    function: Callable[..., Any], *, skip: int = 0, otherwise: int | None = None
) -> Reader:
    """Return a function that reads the timestep from the arguments of another function.

    Args:
        function: the function whose arguments are read; without a timestep, the reader gives None.
        skip: number of leading parameters that are not among the arguments.
        otherwise: position in the arguments to use if no parameter has a name of a timestep.
    """
    parameters = list(inspect.signature(function).parameters)
    name = next((name for name in _NAMES if name in parameters), None)
    place = otherwise if name is None else parameters.index(name) - skip

    def read(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if place is not None and 0 <= place < len(args):
            return args[place]
        return None if name is None else kwargs.get(name)

    return read


def index_by_view(timesteps: Any, timestep: Any) -> int | None:
    """Return the index of ``timestep`` if it is a view into ``timesteps``, else None.

    A view that was expanded to a batch counts as well.
    """
    if not isinstance(timesteps, torch.Tensor) or not isinstance(timestep, torch.Tensor):
        return None
    if timesteps.dim() != 1 or timestep.dtype != timesteps.dtype or not _is_one(timestep):
        return None
    if timestep.device != timesteps.device or not _share_memory(timestep, timesteps):
        return None
    index = (timestep.storage_offset() - timesteps.storage_offset()) // max(1, timesteps.stride(0))
    return index if 0 <= index < len(timesteps) else None


def index_by_value(timesteps: Any, timestep: Any, counted: int) -> int | None:
    """Return the first index at or after ``counted`` with the timestep's value, else None.

    Values on a GPU are not looked up, because that would wait for it. A value may occur twice in a
    row (PNDM, Heun), hence the counted index.
    """
    if isinstance(timestep, torch.Tensor):
        if timestep.numel() != 1 or timestep.device.type != "cpu":
            return None
        timestep = timestep.item()
    if not isinstance(timesteps, torch.Tensor) or timesteps.device.type != "cpu":
        return None
    matches = (timesteps == timestep).nonzero().flatten().tolist()
    return next((index for index in matches if index >= counted), None)


def differ(one: Any, other: Any, *, wait: bool) -> bool:
    """Return whether two timesteps are known to be different.

    Args:
        wait: whether to wait for a GPU; if not, values that only the GPU knows count as equal.
    """
    if one is other:
        return False
    tensors = [each for each in (one, other) if isinstance(each, torch.Tensor)]
    if not wait and any(tensor.device.type != "cpu" for tensor in tensors):
        views = len(tensors) == 2 and all(map(_is_one, tensors)) and _share_memory(*tensors)
        return views and tensors[0].storage_offset() != tensors[1].storage_offset()
    first, second = (torch.as_tensor(each).flatten().tolist() for each in (one, other))
    if len(first) != len(second):  # batches of different sizes
        return set(first) != set(second)
    return bool(first != second)


def is_clean(timestep: Any) -> bool:
    """Return whether a denoiser's timestep says that all of its input is free of noise: 0."""
    return timestep is not None and not torch.as_tensor(timestep).any()


def _is_one(timestep: torch.Tensor) -> bool:
    """Return whether all elements are the same element in memory."""
    sides = zip(timestep.shape, timestep.stride(), strict=True)
    return timestep.numel() > 0 and all(size == 1 or stride == 0 for size, stride in sides)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def evaluations_of(scheduler: Any) -> int:
    """How many of a scheduler's timesteps a loop evaluates the denoiser at.

    It is all of them but for schedulers that list the end of the last step too.
    """
    if scheduler.timesteps is None:
        return 0
    listed = len(scheduler.timesteps)
    if not any(kind.__name__ in _LIST_THE_END for kind in type(scheduler).__mro__):
        return listed
    steps = getattr(scheduler, "num_inference_steps", None)
    return listed - 1 if steps is None else min(int(steps), listed)
