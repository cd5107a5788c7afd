"""A CPU that plays another type of device: for what must hold where no such device is.

It is known of every memory whether it is there. ``tensor.device`` says so, an operation on tensors
of both places is refused, and so is float64 there, with the errors that torch raises on Apple's
mps. What is moved is copied, so that nothing leaks between the places.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from klora_runtime.devices.device_types import adds_in_float64

_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
#: May read from one place and write to the other.
_COPIES = ("copy_", "_foreach_copy_")
#: Make a tensor where they are told, or else where the first argument is.
_MOVES = ("to", "cpu", "new_zeros", "new_empty", "new_full", "new_tensor")
#: Compare two tensors and give none.
_QUESTIONS = ("_has_compatible_shallow_copy_type",)


class OtherDevice(TorchFunctionMode):
    """While it is on, ``device`` exists.

    Args:
        device: what it is called.
        float64: whether it has that.
    """

    def __init__(self, device: str = "mps:0", *, float64: bool = False) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.float64 = float64
        self._memories: dict[int, torch.UntypedStorage] = {}  # kept, so that no number comes again
        self.seen: set[str] = set()
        """Names of the operations that ran there."""

    def __enter__(self) -> OtherDevice:
        adds_in_float64.cache_clear()  # another device of the name may have been asked
        return super().__enter__()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is there."""
        return tensor.untyped_storage()._cdata in self._memories

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """One operation of torch, or one property of a tensor."""
        kwargs = dict(kwargs or {})
        tensors = [each for each in _leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        there = [tensor for tensor in tensors if self.holds(tensor)]
        if func == _DEVICE:
            return self.device if there else func(*args)
        if func == _SET_DATA:
            return func(*args)
        name = func.__name__
        wanted, args, kwargs = self._destination(name, args, kwargs)
        elsewhere = bool(there) if wanted is None else wanted
        large = [tensor for tensor in tensors if tensor.dim()]
        if name in _QUESTIONS and len(there) == 1:
            return False
        if name not in (*_COPIES, *_MOVES) and len({self.holds(each) for each in large}) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{self.device} and cpu! ({resolve_name(func)})"
            )
        if there and torch.float64 in _leaves((args, kwargs)):
            self._require_float64()  # even on the way elsewhere
        result = func(*args, **kwargs)
        if name in _COPIES:
            return result
        if there and name != "__get__":
            self.seen.add(name)
        return self._placed(result, tensors, elsewhere)

    def _destination(self, name: str, args: Any, kwargs: Any) -> tuple[bool | None, Any, Any]:
        """Where a result is told to be; and the arguments with the CPU in that one's place."""
        told = None
        given: list[Any] = []
        for each in args if name in _MOVES else ():
            if isinstance(each, torch.device | str):
                told = torch.device(each)
                each = torch.device("cpu")
            given.append(each)
        if isinstance(kwargs.get("device"), torch.device | str):
            told = torch.device(kwargs["device"])
            kwargs = kwargs | {"device": torch.device("cpu")}
        if name == "cpu":
            told = torch.device("cpu")
        elif name == "to" and isinstance(given[-1], torch.Tensor) and len(given) > 1:
            told = self.device if self.holds(given[-1]) else torch.device("cpu")
        wanted = None if told is None else told.type == self.device.type
        return wanted, tuple(given) if given else args, kwargs

    def _placed(self, result: Any, inputs: list[torch.Tensor], elsewhere: bool) -> Any:
        if isinstance(result, list | tuple):
            parts = [self._placed(each, inputs, elsewhere) for each in result]
            return type(result)(parts) if type(result) in (list, tuple) else result
        if not isinstance(result, torch.Tensor):
            return result
        if elsewhere and result.dtype == torch.float64:
            self._require_float64()
        if self.holds(result) != elsewhere and any(_same_memory(result, each) for each in inputs):
            result = result.detach().clone()
        if elsewhere:
            memory = result.untyped_storage()
            self._memories[memory._cdata] = memory
        return result

    def _require_float64(self) -> None:
        if not self.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
                "support float64. Please use float32 instead."
            )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
