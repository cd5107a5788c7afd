"""Both modes on types of device that are not here: a CPU plays them (`support.other_device`)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.golden_fusion import golden_fusion
from support.other_device import OtherDevice
from support.small_pipe import Pipe, a_fusion, a_net, assert_same, two_steps

from klora_compile.export.settings import ExportSettings
from klora_compile.export.writing import export_static
from klora_compile.storing.compress import compress
from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.fusion import Entry
from klora_runtime.devices.device_types import TYPES

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["mps:0", "hpu:0"])
def other(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OtherDevice:
    """Apple's GPU, and one of a type that nothing is known of; neither has float64."""
    monkeypatch.setattr(TYPES["mps"], "count", lambda: 1)
    monkeypatch.setattr(TYPES["mps"], "free_memory", lambda device: 1e9)
    return OtherDevice(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["merge", "branch", "auto"])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_fusion_acts_there_as_on_the_cpu(
    mode: str,
    dtype: torch.dtype,
    grouped: bool,
    other: OtherDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And says the same of itself: float64 is computed on the host."""
    monkeypatch.setattr(TYPES["mps"], "grouped", grouped)
    here, there = Pipe(a_net(dtype)), Pipe(a_net(dtype))
    handle = apply_fusion(here, a_fusion(), mode)
    expected, report = list(two_steps(here, CPU)), handle.report()
    handle.set(style=0.5)
    weaker = list(two_steps(here, CPU))
    with other:
        there.unet.to(other.device)
        bare = copy.deepcopy({name: p.cpu() for name, p in there.unet.named_parameters()})
        moved = apply_fusion(there, a_fusion(), mode)
        assert_same(list(two_steps(there, other.device)), expected)
        found = moved.report()
        assert found.mode == report.mode
        assert found.why == report.why
        assert found.rounding == pytest.approx(report.rounding, rel=1e-9)
        moved.set(style=0.5)
        assert_same(list(two_steps(there, other.device)), weaker)
        moved.swap(a_fusion())
        moved.enabled = False
        moved.enabled = True
        assert_same(list(two_steps(there, other.device)), weaker)
        moved.remove()
        for name, parameter in there.unet.named_parameters():
            assert torch.equal(parameter.cpu(), bare[name]), name
        assert all(other.holds(parameter) for parameter in there.unet.parameters())


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_factors_of_a_layer_may_lie_in_two_places(mode: str, other: OtherDevice) -> None:
    """A fusion that was loaded there has in host memory what never acted, and another acts."""
    here, there = Pipe(a_net(torch.float32)), Pipe(a_net(torch.float32))
    apply_fusion(here, a_fusion(), mode)
    expected = list(two_steps(here, CPU))
    with other:
        there.unet.to(other.device)
        apply_fusion(there, replace(a_fusion(), entries=tuple(moved_styles(other))), mode)
        assert_same(list(two_steps(there, other.device)), expected)


def moved_styles(other: OtherDevice) -> Iterator[Entry]:
    for entry in a_fusion().entries:
        style = entry.factors["style"]
        moved = replace(style, delta=style.delta.to(other.device))
        yield replace(entry, factors={**entry.factors, "style": moved})


@pytest.mark.parametrize("room", [1e9, 0.0])
def test_copies_stay_where_there_is_room(
    room: float, other: OtherDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a device does not say how much is free, they go to the host."""
    monkeypatch.setattr(TYPES["mps"], "free_memory", lambda device: room)
    pipe = Pipe(a_net(torch.float32))
    expected = Pipe(a_net(torch.float32))
    apply_fusion(expected, a_fusion(), "merge")
    with other:
        pipe.unet.to(other.device)
        handle = apply_fusion(pipe, a_fusion(), "merge")
        copies = [place for place in handle.report().nbytes if place.startswith("base weights")]
        stays = room and other.device.type == "mps"
        assert copies == [f"base weights on {other.device if stays else CPU}"]
        assert_same(list(two_steps(pipe, other.device)), list(two_steps(expected, CPU)))
        handle.remove()


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_a_moved_model_is_followed(mode: str, other: OtherDevice) -> None:
    here, there = Pipe(a_net(torch.bfloat16)), Pipe(a_net(torch.bfloat16))
    apply_fusion(here, a_fusion(), mode)
    with other:
        handle = apply_fusion(there, a_fusion(), mode)
        there.unet.to(other.device)
        handle.set(style=1.0)
        assert_same(list(two_steps(there, other.device)), list(two_steps(here, CPU)))
        handle.report()
        there.unet.to(CPU)
        handle.remove()


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_a_fusion_that_is_kept_there(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.klora.safetensors"
    golden = golden_fusion()
    save_fusion(replace(golden, entries=a_fusion().entries), path)
    monkeypatch.setattr(TYPES["mps"], "count", lambda: 1)
    monkeypatch.setattr(TYPES["mps"], "free_memory", lambda device: 1e9)
    here, there = Pipe(a_net(torch.float16)), Pipe(a_net(torch.float16))
    report = apply_fusion(here, load_fusion(path), mode).report()
    with OtherDevice("mps:0") as other:
        fusion = load_fusion(path, device="mps", check="full")
        factors = [s.delta for entry in fusion.entries for s in entry.factors.values()]
        assert all(other.holds(tensor) for delta in factors for tensor in delta.tensors)
        there.unet.to(other.device)
        handle = apply_fusion(there, fusion, mode)
        assert handle.report().rounding == pytest.approx(report.rounding, rel=1e-9)
        assert_same(list(two_steps(there, other.device)), list(two_steps(here, CPU)))
        assert save_fusion(fusion, tmp_path / "b.klora.safetensors") == path.stat().st_size
    assert (tmp_path / "b.klora.safetensors").read_bytes() == path.read_bytes()


def test_a_fusion_that_is_kept_there_is_compressed_and_exported_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TYPES["mps"], "count", lambda: 1)
    fusion, path = replace(golden_fusion(), entries=a_fusion().entries), tmp_path / "a"
    save_fusion(fusion, path)
    here, settings = compress(fusion, 0.05), ExportSettings(keys="peft")
    export_static(fusion, tmp_path / "here.safetensors", settings)
    with OtherDevice("mps:0"):
        kept = load_fusion(path, device="mps")
        there = compress(kept, 0.05)
        export_static(kept, tmp_path / "there.safetensors", settings)
    save_fusion(here, tmp_path / "b")
    save_fusion(there, tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    files = [tmp_path / f"{name}.safetensors" for name in ("here", "there")]
    assert files[0].read_bytes() == files[1].read_bytes()
