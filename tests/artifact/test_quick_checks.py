"""What the checks of every image and every load must still see, although they look at little."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Names
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from support.applying import Apply
from support.generation import TWO_STEPS, generate
from support.handmade import ATTENTION, fusion_for
from support.lora_files import RawTensor, write_tensors

from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.tensor_file import TensorFile
from klora_runtime.errors import IncompatibleModelError, InUseError
from klora_runtime.layers.execution import execution_device, has_memory
from klora_runtime.layers.targets import Target
from klora_runtime.pipeline.host import PipelineHost

CPU = torch.device("cpu")
FREEZING = {"freezing": True}
ONLOADED = Names(onload_device="cpu")


def freeze_a_leaf(pipe: Any) -> None:
    pipe.unet.get_submodule(ATTENTION).to_q.compile(options=FREEZING)


def freeze_the_forward_of_a_leaf(pipe: Any) -> None:
    leaf = pipe.unet.get_submodule(ATTENTION).to_q
    leaf.forward = torch.compile(leaf.forward, options=FREEZING)


def wrap_a_frozen_leaf(pipe: Any) -> None:
    attention = pipe.unet.get_submodule(ATTENTION)
    attention.to_q = torch.compile(attention.to_q, options=FREEZING)


@pytest.mark.parametrize(
    "freeze", [freeze_a_leaf, freeze_the_forward_of_a_leaf, wrap_a_frozen_leaf]
)
def test_one_layer_frozen_between_two_images(
    freeze: Callable[[Any], None], apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    apply(pipe, fusion)
    generate(pipe, TWO_STEPS)
    freeze(pipe)
    with pytest.raises(IncompatibleModelError, match="option freezing folds the weights"):
        generate(pipe, TWO_STEPS)


@pytest.mark.parametrize("path", [ATTENTION, f"{ATTENTION}.to_q", ATTENTION.rpartition(".")[0]])
def test_a_module_replaced_between_two_images(
    path: str, apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    apply(pipe, fusion)
    image = generate(pipe, TWO_STEPS)
    place, _, name = path.rpartition(".")
    parent = pipe.unet.get_submodule(place)
    before = parent._modules[name]
    parent._modules[name] = copy.deepcopy(before)
    with pytest.raises(InUseError, match="was replaced or wrapped") as caught:
        generate(pipe, TWO_STEPS)
    assert any(f"unet.{ATTENTION}.to_q: " in issue for issue in caught.value.issues)
    parent._modules[name] = before
    assert torch.equal(generate(pipe, TWO_STEPS), image)


def test_a_block_offloaded_between_two_images(pipe: Any, fusion: Fusion) -> None:
    apply_fusion(pipe, fusion, mode="merge")
    generate(pipe, TWO_STEPS)
    block = pipe.unet.get_submodule(ATTENTION)
    apply_group_offloading(block, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    with pytest.raises(InUseError, match="to_q: group offloading keeps its own copy"):
        generate(pipe, TWO_STEPS)


@pytest.mark.parametrize(
    "hook",
    [
        {"_hf_hook": Names(execution_device="cpu")},
        {"_diffusers_hook": Names(hooks={"group_offloading": Names(group=ONLOADED)})},
    ],
)
@pytest.mark.parametrize("depth", [0, 1])
def test_what_loads_a_weight_that_is_nowhere(
    hook: dict[str, Any], depth: int, fusion: Fusion
) -> None:
    leaf = torch.nn.Linear(2, 2, device="meta")
    target = Target(
        fusion.entries[0], leaf, "unet.0.weight", (torch.nn.Sequential(leaf), leaf), PipelineHost()
    )
    assert not has_memory(target)
    vars(target.lineage[depth]).update(hook)
    assert has_memory(target)
    assert execution_device(target) == CPU


def test_one_module_under_two_names(pipe: Any) -> None:
    attention = pipe.unet.get_submodule(ATTENTION)
    attention.another_name = attention.to_q
    fusion = fusion_for(pipe, [f"unet.{ATTENTION}.to_q"])
    with pytest.raises(IncompatibleModelError, match="shares its weight's memory with another"):
        apply_fusion(pipe, fusion, mode="merge")


def test_tensors_of_any_dtype_order_and_place(tmp_path: Path) -> None:
    """The first is of odd length, so that all the others begin where their dtypes cannot."""
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "matrix": torch.randn(2, 3),
        "empty": torch.empty(0, 4),
        "half": torch.randn(5, 1, 2).half(),
        "matrix again": torch.randn(4),
        "last": torch.randn(3, 3).bfloat16(),
    }
    raw = {name: RawTensor.of(tensor) for name, tensor in tensors.items()}
    with TensorFile(write_tensors(tmp_path / "x", raw), "file") as file:
        found = file.block(CPU)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
