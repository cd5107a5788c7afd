"""What a switch costs: no memory, no new pointers, no wait for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.applying import Apply, live_of
from support.handmade import ATTENTION, fusion_for, weight_of
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = (
    f"unet.{ATTENTION}.to_q",
    f"unet.{ATTENTION}.to_k",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.0.attentions.0.proj_in",
)
WAITS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")


class Seen(TorchDispatchMode):
    """Records operations that made memory, and those that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.allocated: list[str] = []
        self.waited: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        known = {storage(value) for value in (*args, *(kwargs or {}).values())}
        results = result if isinstance(result, tuple | list) else (result,)
        for value in results:
            if isinstance(value, torch.Tensor) and storage(value) not in known:
                self.allocated.append(str(func))
        if func.name().startswith(WAITS):
            self.waited.append(str(func))
        return result


def storage(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_switch_makes_no_memory_and_does_not_wait(
    memory_format: torch.memory_format, dtype: torch.dtype, apply: Apply, pipe: Any
) -> None:
    pipe.unet.to(dtype, memory_format=memory_format)
    handle = apply(pipe, fusion_for(pipe, LAYERS, size=0.3))
    pipe.scheduler.set_timesteps(8)
    pointers = {layer: weight_of(pipe, layer).data_ptr() for layer in LAYERS}

    with Seen() as seen:
        live_of(handle).move(0.75)

    assert seen.operations >= 3
    assert seen.allocated == []
    assert seen.waited == []
    assert {layer: weight_of(pipe, layer).data_ptr() for layer in LAYERS} == pointers
    with Seen() as seen:
        live_of(handle).move(0.76)
    assert seen.operations == 0
