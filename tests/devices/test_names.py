"""What a user may call a device, and the one error where there is none."""

from __future__ import annotations

from functools import partial
from typing import Any

import click
import pytest
import torch
from support.lora_files import run_python
from support.other_device import OtherDevice

from klora_compile.commands.parameters import Device
from klora_runtime.devices import names
from klora_runtime.devices.device_types import (
    SPELLINGS,
    TYPES,
    DeviceType,
    adds_in_float64,
    type_of,
)
from klora_runtime.devices.names import as_device, indexed
from klora_runtime.errors import ConfigError

CPU = torch.device("cpu")


def seen(monkeypatch: pytest.MonkeyPatch, **counts: int) -> None:
    """Let torch see so many of each type but the host, and make its tensors on the CPU."""
    for name, known in TYPES.items():
        if not known.is_host:
            monkeypatch.setattr(known, "count", partial(counts.get, name, 0))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **kw: empty(*size, **kw))


def test_the_host_is_there() -> None:
    for name in ("cpu", "cpu:0", torch.device("cpu", 0)):
        assert as_device(name) == CPU


@pytest.mark.parametrize(
    ("counts", "best"),
    [
        ({}, "cpu"),
        ({"cuda": 2, "xpu": 1}, "cuda"),
        ({"xpu": 1, "mps": 1}, "xpu"),
        ({"mps": 1}, "mps"),
    ],
)
def test_auto_is_the_first_gpu_that_torch_sees(
    counts: dict[str, int], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen(monkeypatch, **counts)
    monkeypatch.setattr(names, "indexed", torch.device)
    assert as_device("auto") == torch.device(best)


@pytest.mark.parametrize("name", ["xpu:1", torch.device("xpu", 1)])
def test_an_index_names_one_of_several(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, xpu=2)
    assert as_device(name) == torch.device("xpu", 1)
    with pytest.raises(ConfigError, match="device xpu:2: torch sees 2 XPU devices; expected auto"):
        as_device("xpu:2")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpu", "not a device"),
        ("", "not a device"),
        ("cuda:-1", "not a device"),
        ("cuda:99", r"torch sees \d+ CUDA devices"),
        ("cuda:999", r"torch sees \d+ CUDA devices"),  # torch reads this index as -25
        ("meta", "holds no numbers"),
        ("hpu", "No module named"),  # torch imports it when the first tensor is made
        ("vulkan", "Could not run"),
        ("privateuseone", ""),
        (None, "not a device"),
        ("\x1b[2J", r"\\x1b\[2J: not a device"),
    ],
)
def test_another_device_is_refused(name: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=f"^device .*{why}.*; expected auto, cpu, cuda") as error:
        as_device(name)
    assert len(str(error.value)) < 400


def test_a_device_is_named_as_tensors_on_it_name_it() -> None:
    assert indexed("cpu:0") == indexed("cpu") == CPU
    assert indexed("cuda:3") == torch.device("cuda", 3)


def test_the_command_line_takes_every_name() -> None:
    """Torch knows which there are, its plug-ins' too; a command that needs one asks torch."""
    kind = Device()
    for name in (*SPELLINGS, "npu", "hpu", "mtia", "privateuseone"):
        name = name.removesuffix("[:N]")
        assert kind.convert(name, None, None) == name
        assert kind.convert(f"{name}:12", None, None) == f"{name}:12"
    for name in ("", "CUDA", "cuda:", "cuda:x", "cuda:1234", "a b", "/dev/dri"):
        with pytest.raises(click.BadParameter, match=r"is not auto\|cpu\|cuda"):
            kind.convert(name, None, None)
    assert set(TYPES) < {spelling.removesuffix("[:N]") for spelling in SPELLINGS}


def test_a_type_that_is_not_known_is_spared_what_it_may_not_have() -> None:
    device = torch.device("hpu", 0)
    other = type_of(device)
    assert type(other) is DeviceType
    adds_in_float64.cache_clear()
    assert (other.title, other.module, other.count()) == ("HPU", None, None)
    assert not other.has_float64(device)
    assert other.free_memory(device) == 0
    assert not any((other.grouped, other.streams, other.graphs, other.is_host))
    other.synchronise(device)
    assert other.describe(device) == "HPU 0"


def test_what_runs_before_a_command_imports_no_torch() -> None:
    """The names of devices are part of ``--help``."""
    code = "import sys, klora_runtime.devices.device_types; print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


@pytest.mark.parametrize("has", [True, False])
def test_a_type_that_is_not_known_is_asked_for_float64(has: bool) -> None:
    with OtherDevice("hpu:0", float64=has) as other:
        assert type_of(other.device).has_float64(other.device) == has


def test_float64_that_is_computed_in_float32_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add = torch.Tensor.__add__

    def added(one: torch.Tensor, other: float) -> torch.Tensor:
        return add(one.float(), other).double()

    monkeypatch.setattr(torch.Tensor, "__add__", added)
    adds_in_float64.cache_clear()
    assert not adds_in_float64(CPU)
    monkeypatch.undo()
    adds_in_float64.cache_clear()
    assert adds_in_float64(CPU)
