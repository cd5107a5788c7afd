"""What mode branch writes (biases, norms) where something loads parameters before each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import group_offloading
from support.generation import TWO_STEPS, generate
from support.handmade import ATTENTION, hand_entry, hand_fusion
from support.other_device import OtherDevice
from tiny_pipeline import relative_difference, tiny_pipeline

from klora_runtime import apply_fusion
from klora_runtime.artifact.delta import Dense, Stored
from klora_runtime.artifact.fusion import Entry, Fusion
from klora_runtime.errors import IncompatibleModelError

CPU = torch.device("cpu")


def dense(layer: str, parameter: str, size: int) -> Entry:
    """Another dense delta per slot; content until progress 0.5, then style."""
    values = torch.Generator().manual_seed(len(layer) + len(parameter))
    factors = {
        slot: Stored(0.05, Dense(torch.randn(size, generator=values)))
        for slot in ("content", "style")
    }
    entry = hand_entry(layer, (size, size))
    return replace(entry, parameter=parameter, shape=(size,), factors=factors)


NORM = dense("unet.conv_norm_out", "weight", 32)
FUSION = hand_fusion(
    hand_entry(f"unet.{ATTENTION}.to_q", (32, 32)),
    dense(f"unet.{ATTENTION}.to_out.0", "bias", 32),
    NORM,
)


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline("sd1")


def sequential(pipe: Any) -> None:
    accelerate.cpu_offload(pipe.unet, CPU)


def moving(kind: str) -> Callable[[Any], None]:
    def offload(pipe: Any) -> None:
        pipe.unet.enable_group_offload(CPU, offload_type=kind, num_blocks_per_group=1)

    return offload


def expected(pipe: Any, fusion: Fusion) -> torch.Tensor:
    with apply_fusion(pipe, fusion, mode="branch"):
        return generate(pipe, TWO_STEPS)


@pytest.mark.parametrize(
    "offload",
    [
        sequential,
        moving("leaf_level"),
        pytest.param(moving("block_level"), marks=pytest.mark.slow),
    ],
    ids=["sequential", "group-leaves", "group-blocks"],
)
def test_the_rest_is_written_where_it_is_loaded_from(
    offload: Callable[[Any], None], pipe: Any
) -> None:
    fused, small, bare = expected(pipe, FUSION), hand_fusion(NORM), generate(pipe, TWO_STEPS)
    gains = expected(pipe, small)
    assert relative_difference(gains, bare) > 1e-4
    assert relative_difference(gains, fused) > 1e-4
    offload(pipe)

    handle = apply_fusion(pipe, FUSION)

    assert handle.report().mode == "branch"
    assert torch.equal(generate(pipe, TWO_STEPS), fused)
    handle.swap(small)
    assert torch.equal(generate(pipe, TWO_STEPS), gains)
    handle.swap(FUSION)
    handle.enabled = False
    assert torch.equal(generate(pipe, TWO_STEPS), bare)
    handle.enabled = True
    assert torch.equal(generate(pipe, TWO_STEPS), fused)
    handle.remove()
    assert torch.equal(generate(pipe, TWO_STEPS), bare)
    with apply_fusion(pipe, small, mode="merge"):
        assert torch.equal(generate(pipe, TWO_STEPS), gains)
    assert torch.equal(generate(pipe, TWO_STEPS), bare)


def test_offloading_may_end_while_the_rest_is_written(pipe: Any) -> None:
    fused, bare = expected(pipe, FUSION), generate(pipe, TWO_STEPS)
    sequential(pipe)
    handle = apply_fusion(pipe, FUSION)
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(generate(pipe, TWO_STEPS), fused)
    handle.remove()
    assert torch.equal(generate(pipe, TWO_STEPS), bare)


def test_parameters_that_share_what_they_are_loaded_from(pipe: Any) -> None:
    to_q, to_k = (pipe.unet.get_submodule(f"{ATTENTION}.{name}") for name in ("to_q", "to_k"))
    to_q.bias = torch.nn.Parameter(torch.zeros(32), requires_grad=False)
    to_k.bias = torch.nn.Parameter(to_q.bias.data, requires_grad=False)
    sequential(pipe)
    with pytest.raises(IncompatibleModelError, match="shares its bias's memory"):
        apply_fusion(pipe, hand_fusion(dense(f"unet.{ATTENTION}.to_q", "bias", 32)), mode="branch")


class Stream:
    """A stream without a device: transfers are done when they return."""

    waits = 0

    def synchronize(self) -> None:
        Stream.waits += 1


class Backend:
    """What diffusers asks torch's module of a device for."""

    Stream = Stream

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stream(self, stream: Stream) -> Any:
        return nullcontext()

    def current_stream(self) -> Stream:
        return Stream()


@contextmanager
def streams() -> Iterator[torch.device]:
    """A device to which diffusers' own group offloading copies parameters with a stream."""
    with pytest.MonkeyPatch.context() as patch, OtherDevice() as other:
        patch.setattr(group_offloading, "TorchDeviceBackend", Backend)
        patch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        patch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
        yield other.device


def first_step(pipe: Any, device: torch.device = CPU) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x, text = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 32)))
    pipe.scheduler.set_timesteps(2)
    time = pipe.scheduler.timesteps[0]
    with torch.no_grad():
        found: torch.Tensor = pipe.unet(x.to(device), time.to(device), text.to(device)).sample
    return found.to(CPU)


@pytest.mark.parametrize(
    "kind", ["leaf_level", pytest.param("block_level", marks=pytest.mark.slow)]
)
def test_the_rest_is_written_into_the_copies_of_a_stream(kind: str, pipe: Any) -> None:
    bare = first_step(pipe)
    found = {}
    for weight in (1.0, 0.5):
        with apply_fusion(pipe, FUSION, mode="branch", weights={"content": weight}):
            found[weight] = first_step(pipe)
    assert relative_difference(found[1.0], found[0.5]) > 1e-3
    with streams() as device:
        pipe.unet.enable_group_offload(
            device, offload_type=kind, num_blocks_per_group=1, use_stream=True
        )
        handle = apply_fusion(pipe, FUSION)
        assert handle.report().mode == "branch"
        for _ in range(2):  # diffusers loads ahead from the second call on
            assert torch.equal(first_step(pipe, device), found[1.0])
        assert "base weights on cpu" in handle.report().nbytes

        bias, waits = pipe.unet.get_submodule(f"{ATTENTION}.to_out.0").bias, Stream.waits
        groups = [diffusers_group(module) for module in pipe.unet.modules()]
        group = next(each for each in groups if each and bias in each.cpu_param_dict)
        group.onload_()
        handle.set(content=0.5)
        assert Stream.waits > waits
        assert bias.device == device
        assert torch.equal(bias.data.to(CPU), group.cpu_param_dict[bias])
        group.offload_()
        assert torch.equal(first_step(pipe, device), found[0.5])
        handle.remove()
        assert torch.equal(first_step(pipe, device), bare)


def diffusers_group(module: torch.nn.Module) -> Any:
    registry: Any = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.hooks["group_offloading"].group


def group_to_disk(pipe: Any, folder: str) -> None:
    pipe.unet.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=folder)


def accelerate_to_disk(pipe: Any, folder: str) -> None:
    accelerate.disk_offload(pipe.unet, folder, CPU)


@pytest.mark.parametrize(
    ("offload", "why"),
    [
        (group_to_disk, r"from a file before each call; offload without offload_to_disk_path"),
        (accelerate_to_disk, r"from a file before each call; load the model without an offload_f"),
    ],
)
def test_the_rest_is_not_written_where_a_file_is_read_at_each_call(
    offload: Callable[[Any, str], None], why: str, pipe: Any, tmp_path: Path
) -> None:
    offload(pipe, str(tmp_path))
    with pytest.raises(IncompatibleModelError, match=rf"conv_norm_out: .*{why}"):
        apply_fusion(pipe, FUSION, mode="branch")
