"""Tensors on their way to a device: pinned and on a second stream where it has streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.lora_files import peft_keys, random_pair, write_lora
from support.other_device import OtherDevice

from klora_compile import compile_fusion
from klora_compile.measuring.batches import measure_batches
from klora_compile.measuring.courier import Courier
from klora_compile.measuring.measure import measure
from klora_compile.reading.layers import Layer
from klora_runtime.devices.device_types import TYPES, DeviceType
from klora_runtime.errors import ConfigError

CPU = torch.device("cpu")


class Streams:
    """A module of torch that has streams, and tells what is done with them in ``events``."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.inside = 0

    def Stream(self, device: torch.device) -> str:
        self.events.append(f"second stream on {device}")
        return "second"

    @contextmanager
    def stream(self, which: str) -> Iterator[None]:
        self.inside += 1
        self.events.append(f"on {which}")
        yield
        self.inside -= 1

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.events.append(f"waits for {other}"))

    def Event(self) -> Any:
        return SimpleNamespace(
            record=lambda stream: self.events.append("record"),
            synchronize=lambda: self.events.append("wait"),
        )


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """The CPU as a device with streams; memory is asked to be pinned and is not."""
    found, known = Streams(), TYPES["cpu"]
    monkeypatch.setattr(known, "streams", True)
    monkeypatch.setattr(type(known), "module", found)
    empty = torch.empty

    def unpinned(*size: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if pin_memory:
            found.events.append("pinned")
        return empty(*size, **kwargs)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: found.events.append("kept for"))
    return found


def test_the_way_there_is_on_a_second_stream(streams: Streams) -> None:
    courier, rows = Courier(CPU), torch.randn(2, 3)
    there = courier.bring([rows, 2 * rows])
    assert torch.equal(there, torch.stack([rows, 2 * rows]))
    assert streams.events == [
        "second stream on cpu", "pinned", "on second", "waits for second", "kept for",
    ]  # fmt: skip


def test_the_way_back_is_waited_for_when_it_is_opened(streams: Streams) -> None:
    found = torch.randn(4)
    parcel = Courier(CPU).take(found)
    assert streams.events[1:] == ["pinned", "record"]
    assert torch.equal(parcel.opened(), found)
    assert streams.events[-1] == "wait"


def test_a_device_without_streams_is_waited_for() -> None:
    with OtherDevice("mps:0") as other:
        courier = Courier(other.device)
        there = courier.bring([torch.ones(2), torch.zeros(2)])
        assert there.device == other.device
        parcel = courier.take(there)
        assert parcel.numbers.device == CPU
        assert parcel.opened().tolist() == [[1, 1], [0, 0]]


def layers() -> list[Layer]:
    torch.manual_seed(0)
    return [
        Layer.lora("unet", f"{i}", torch.randn(3, 20), torch.randn(30, 3), 3.0, "rank")
        for i in range(5)
    ]


def test_layers_are_measured_on_a_device_that_has_float64() -> None:
    """One of a type that is not known, so that it has no streams."""
    some = layers()
    ks = {layer.name: (1, 9) for layer in some}
    expected = measure(some, ks, device=CPU)
    with OtherDevice("hpu:0", float64=True) as other:
        tasks = [(layer.delta, (1, 9)) for layer in some]
        found = [statistics for _, statistics in sorted(measure_batches(tasks, other.device))]
    for layer, statistics in zip(some, found, strict=True):
        assert statistics.l1 == pytest.approx(expected[layer.name].l1, rel=1e-6)
        assert statistics.top_k == pytest.approx(expected[layer.name].top_k, rel=1e-6)
    assert {"bmm", "topk"} <= other.seen


def test_a_lack_of_an_operation_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("Could not run 'aten::topk' with arguments from the backend.")

    monkeypatch.setattr(torch.Tensor, "topk", missing)
    with (
        OtherDevice("hpu:0", float64=True) as other,
        pytest.raises(
            ConfigError, match=r"^device hpu:0: torch cannot measure there: Could not run"
        ),
    ):
        measure(layers(), {"unet.0": (1,)}, device=other.device)


@pytest.mark.parametrize("float64", [True, False])
def test_a_pair_is_compiled_there(float64: bool, tmp_path: Path) -> None:
    """On the device itself where it has float64."""
    files = []
    for seed in range(2):
        pairs = {f"unet.{i}": random_pair(24, 20, 3, seed=10 * seed + i) for i in range(3)}
        files.append(write_lora(tmp_path / f"{seed}.safetensors", peft_keys(pairs)))
    here = compile_fusion(*files, device="cpu")
    with OtherDevice("hpu:0", float64=float64) as other:
        there = compile_fusion(*files, device="hpu:0")
    assert ("bmm" in other.seen) == float64
    for one, same in zip(there.entries, here.entries, strict=True):
        assert one.timeline == same.timeline or float64
        assert all(one.timeline.at(t / 100) == same.timeline.at(t / 100) for t in range(100))


def test_layers_are_measured_on_the_cpu_for_a_device_without_float64() -> None:
    some = layers()
    ks = {layer.name: (1, 9) for layer in some}
    expected = measure(some, ks, device=CPU)
    with OtherDevice("mps:0") as other:
        assert measure(some, ks, device=other.device) == expected
    assert not other.seen


@pytest.mark.parametrize("has", [True, False])
def test_a_gpu_of_intel_says_whether_it_has_float64(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = TYPES["xpu"]
    told = SimpleNamespace(get_device_capability=lambda device: {"has_fp64": has})
    monkeypatch.setattr(DeviceType, "module", told)
    assert known.has_float64(torch.device("xpu", 0)) == has
