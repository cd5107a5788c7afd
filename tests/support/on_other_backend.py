"""Compile, load and apply on the device ``other``, in a process of its own."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.golden_fusion import golden_fusion
from support.lora_files import peft_keys, random_pair, write_lora
from support.other_backend import Other, install
from support.small_pipe import Pipe, a_fusion, a_net, assert_same, two_steps

from klora_compile import compile_fusion
from klora_compile.cli import main as klora
from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.devices.device_types import DeviceType, adds_in_float64
from klora_runtime.devices.names import HOST, as_device

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def places_are_told_apart() -> None:
    """Or nothing else here would show anything."""
    device = as_device("other")
    assert str(device) == "other:0"
    with pytest.raises(RuntimeError, match=r"same device, but found .* other:0 and cpu"):
        torch.ones(2, device=device) + torch.ones(2)


def compiling(other: Other, loras: tuple[Path, Path], *, float64: bool) -> None:
    """On the device where it has float64, else on the host; the decisions are the same."""
    adds_in_float64.cache_clear()
    here = compile_fusion(*loras, device="cpu")
    before = other.computed()
    there = compile_fusion(*loras, device="other")
    assert (other.computed() - before > 20) == float64, other.computed() - before
    assert decisions(there) == decisions(here)


def decisions(fusion: Fusion) -> list[object]:
    return [
        entry.timeline.at((step + 0.5) / steps)
        for entry in fusion.entries
        for steps in (1, 4, 20, 50)
        for step in range(steps)
    ]


def commands(loras: tuple[Path, Path], folder: Path) -> None:
    output = folder / "a.klora.safetensors"
    names = [str(path) for path in loras]
    options = ["-o", str(output), "--no-cache", "--device", "other:0"]
    made = CliRunner().invoke(klora, ["compile", *names, *options])
    assert made.exit_code == 0, made.output
    again = ["--against", *names, "--device", "other"]
    verified = CliRunner().invoke(klora, ["verify", str(output), *again])
    assert verified.exit_code == 0, verified.output
    refused = CliRunner().invoke(
        klora, ["compile", *names, "-o", str(folder / "b"), "--device", "other:3"]
    )
    assert refused.exit_code == 2, refused.output
    assert "other:3: torch sees 1 OTHER devices" in refused.output


def loading(folder: Path) -> None:
    path = folder / "loaded.klora.safetensors"
    save_fusion(replace(golden_fusion(), entries=a_fusion().entries), path, overwrite=True)
    fusion = load_fusion(path, device="other", check="full")
    stored = [each.delta for entry in fusion.entries for each in entry.factors.values()]
    assert {str(tensor.device) for delta in stored for tensor in delta.tensors} == {"other:0"}
    save_fusion(fusion, folder / "again.klora.safetensors", overwrite=True)
    assert (folder / "again.klora.safetensors").read_bytes() == path.read_bytes()


def acting(mode: str, dtype: torch.dtype) -> None:
    """As on the CPU, in all that a handle does; and every bit back."""
    device = as_device("other")
    here, there = Pipe(a_net(dtype)), Pipe(a_net(dtype))
    handle = apply_fusion(here, a_fusion(), mode)
    there.unet.to(device)
    bare = {name: value.cpu() for name, value in there.unet.named_parameters()}
    moved = apply_fusion(there, a_fusion(), mode)
    assert (moved.report().mode, moved.report().why) == (handle.report().mode, handle.report().why)
    assert moved.report().rounding == pytest.approx(handle.report().rounding, rel=1e-9)
    assert_same(list(two_steps(there, device)), list(two_steps(here, HOST)))
    for each in (handle, moved):
        each.set(style=0.5)
        each.swap(a_fusion())
        each.enabled = False
        each.enabled = True
    assert_same(list(two_steps(there, device)), list(two_steps(here, HOST)))
    there.unet.to("cpu")
    assert_same(list(two_steps(there, HOST)), list(two_steps(here, HOST)))
    there.unet.to(device)
    moved.remove()
    assert all(value.device == device for value in there.unet.parameters())
    assert all(
        torch.equal(value.cpu(), bare[name]) for name, value in there.unet.named_parameters()
    )


def main(library: Path, folder: Path) -> None:
    other = install(library)
    places_are_told_apart()
    pairs = [
        {f"unet.{name}": random_pair(24, 24, 4, seed=seed) for name in ("first", "second")}
        for seed in (0, 7)
    ]
    first, second = (
        write_lora(folder / f"{seed}.safetensors", peft_keys(pair))
        for seed, pair in enumerate(pairs)
    )
    loras = first, second
    commands(loras, folder)
    for float64 in (True, False):
        if not float64:
            os.environ["KLORA_TEST_NO_FLOAT64"] = "1"
        compiling(other, loras, float64=float64)
        loading(folder)
        for grouped in (False, True):
            DeviceType.grouped = grouped
            for mode in ("merge", "branch", "auto"):
                for dtype in DTYPES:
                    acting(mode, dtype)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
