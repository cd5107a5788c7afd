"""What the program does to a leaf decides where and how it computes, before what the leaf shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from klora_runtime.layers.execution import compute_dtype, execution_device

META = torch.device("meta")


def target(module: nn.Module, *, casting: Any = None, device: Any = None) -> Any:
    host = SimpleNamespace(device=lambda lineage: device, casting=lambda each: casting)
    return SimpleNamespace(
        host=host, lineage=(), module=module, model=module, parameter=module.weight
    )


def test_a_dtype_that_a_layer_is_cast_to_is_the_one_it_computes_in() -> None:
    layer = nn.Linear(2, 2, dtype=torch.float16)
    assert compute_dtype(target(layer)) == torch.float16
    casting = SimpleNamespace(dtype=torch.bfloat16)
    assert compute_dtype(target(layer, casting=casting)) == torch.bfloat16


def test_a_device_that_a_layer_is_brought_to_is_the_one_it_computes_on() -> None:
    layer = nn.Linear(2, 2)
    assert execution_device(target(layer)).type == "cpu"
    elsewhere = torch.device("cuda", 1)
    assert execution_device(target(layer, device=elsewhere)) == elsewhere
    assert execution_device(target(layer, device=META)).type == "cpu"
