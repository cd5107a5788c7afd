"""Numbers that are read while others are measured: the same artifact, errors, and an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import form_files
from support.form_files import Source, norm
from support.lora_files import random_pair

from klora_compile import Config, compile_fusion, read_adapter
from klora_compile.measuring import measure as measuring
from klora_compile.reading.adapter import Adapter, open_adapter
from klora_compile.reading.ahead import ReadAhead
from klora_compile.reading.arriving import known
from klora_compile.reading.deltas import Dense
from klora_compile.reading.files.lora_file import LoraFile
from klora_compile.reading.layers import Layer
from klora_runtime import save_fusion
from klora_runtime.errors import LoraError, PairingError

#: Sorted by name, which is the order of reading and of measuring.
MODULES = [f"unet.down_blocks.0.attentions.{i}.proj_in" for i in range(4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def tensors(seed: int, rank: int = 3, width: int = 8) -> dict[str, torch.Tensor]:
    """A pair of each dtype, and a norm, as they lie in a file."""
    found = {}
    for i, (module, dtype) in enumerate(zip(MODULES, DTYPES, strict=True)):
        down, up = random_pair(10, width, rank, seed=seed + i)
        found[f"{module}.lora_A.weight"] = down.to(dtype)
        found[f"{module}.lora_B.weight"] = up.to(dtype)
    for ending, tensor in norm(Source(seed), 6, 0).tensors.items():
        found[f"unet.conv_norm_out{ending}"] = tensor
    return found


def write(path: Path, found: Mapping[str, torch.Tensor]) -> Path:
    form_files.save_file(dict(found), str(path))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return (
        write(tmp_path / "content.safetensors", tensors(1)),
        write(tmp_path / "style.safetensors", tensors(50, rank=2)),
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """File and key of each tensor that was read."""
    seen: list[tuple[str, str]] = []
    on_reading(monkeypatch, lambda file, key: seen.append((file.path.stem, key)))
    return seen


def on_reading(monkeypatch: pytest.MonkeyPatch, act: Callable[[LoraFile, str], object]) -> None:
    tensor = LoraFile.tensor
    monkeypatch.setattr(LoraFile, "tensor", lambda f, key: (act(f, key), tensor(f, key))[1])


def saved(path: Path, *loras: Path | Adapter, rule: str = "klora", **rest: Any) -> bytes:
    save_fusion(
        compile_fusion(*loras, Config.named(rule), device="cpu", **rest), path, overwrite=True
    )
    return path.read_bytes()


def readers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("klora-read")]


# --- the same result ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["klora", "est", "np+klora"])
def test_the_artifact_is_that_of_loras_read_beforehand(
    rule: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "a.klora.safetensors"
    expected = saved(out, *map(read_adapter, pair), rule=rule)
    assert saved(out, *pair, rule=rule) == expected
    for _ in range(2):  # measured, looked up
        assert saved(out, *pair, rule=rule, cache=tmp_path / "statistics") == expected
    assert readers() == []


@pytest.mark.parametrize("form", ["loha", "lokr", "tucker", "full"])
def test_what_is_computed_is_read_whole_beforehand(
    form: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    module = "unet.conv_in" if form == "tucker" else "unet.time_embedding.linear_1"
    more = getattr(form_files, form)(Source(7), 8, 12).tensors
    style = write(
        tmp_path / "style.safetensors",
        tensors(50) | {f"{module}{ending}": tensor for ending, tensor in more.items()},
    )
    with open_adapter(style) as opened, open_adapter(pair[0]) as plain:
        assert (opened.lies_as_it_is, plain.lies_as_it_is) == (False, True)
    out = tmp_path / "a.klora.safetensors"
    assert saved(out, pair[0], style) == saved(out, *map(read_adapter, (pair[0], style)))


def test_headers_tell_all_but_the_numbers(pair: tuple[Path, Path]) -> None:
    wanted = read_adapter(pair[0])
    with open_adapter(pair[0]) as opened, ReadAhead() as ahead:
        layers = ahead.adapter(opened).layers
        assert list(layers) == list(wanted.layers)
        for outline, layer in zip(known(layers).values(), wanted.layers.values(), strict=True):
            assert replace(outline, delta=layer.delta) == layer
            for one, other in zip(parts(outline), parts(layer), strict=True):
                assert (one.shape, one.dtype, one.device.type) == (other.shape, other.dtype, "meta")
        assert not any(future.done() for future in layers.coming.values())


def parts(layer: Layer) -> tuple[torch.Tensor, ...]:
    delta = layer.delta
    return (delta.values,) if isinstance(delta, Dense) else (delta.down, delta.up)


def test_each_number_is_read_once_and_in_the_order_of_measuring(
    pair: tuple[Path, Path], reads: list[tuple[str, str]]
) -> None:
    compile_fusion(*pair, device="cpu")
    assert [each for each in reads if ".lora" in each[1]] == [
        (path.stem, f"{module}.lora_{matrix}.weight")
        for path in pair
        for module in MODULES
        for matrix in "AB"
    ]


def test_layers_are_measured_while_others_are_read(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, measure_layer = threading.Event(), measuring.measure_layer
    in_time = []

    def spy(*args: Any) -> Any:
        first.set()
        return measure_layer(*args)

    def last(file: LoraFile, key: str) -> None:
        if key == f"{MODULES[-1]}.lora_B.weight":
            in_time.append(first.wait(20))

    monkeypatch.setattr(measuring, "measure_layer", spy)
    on_reading(monkeypatch, last)
    compile_fusion(*pair, device="cpu")
    assert in_time == [True, True]


# --- errors -------------------------------------------------------------------------------------


def test_all_headers_are_checked_before_a_number_is_read(
    pair: tuple[Path, Path], tmp_path: Path, reads: list[tuple[str, str]]
) -> None:
    wide = write(tmp_path / "wide.safetensors", tensors(1, width=9))
    half = tensors(1)
    del half[f"{MODULES[0]}.lora_A.weight"]
    torn = write(tmp_path / "torn.safetensors", half)
    with pytest.raises(PairingError, match="4 layers have two shapes"):
        compile_fusion(pair[0], wide, device="cpu")
    with pytest.raises(LoraError, match=r"torn\.safetensors.*cannot be used as it is"):
        compile_fusion(pair[0], torn, device="cpu")
    assert reads == []
    assert readers() == []


def test_an_error_in_the_thread_is_the_one_of_reading_beforehand(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all reasons; the first layer that is done after it is the last one."""
    broken = tensors(50)
    for place in (0, 2):
        broken[f"{MODULES[place]}.lora_B.weight"][0, 0] = float("nan")
    style = write(tmp_path / "broken.safetensors", broken)
    with pytest.raises(LoraError) as wanted:
        read_adapter(style)
    reported: list[str] = []
    over, read_layers = threading.Event(), ReadAhead._read_layers
    measure_layer = measuring.measure_layer

    def read(self: ReadAhead) -> None:
        try:
            read_layers(self)
        finally:
            over.set()

    def slow(*args: Any) -> Any:
        over.wait(20)
        time.sleep(0.01)  # until the error is known
        return measure_layer(*args)

    monkeypatch.setattr(ReadAhead, "_read_layers", read)
    monkeypatch.setattr(measuring, "measure_layer", slow)
    with pytest.raises(LoraError) as caught:
        compile_fusion(pair[0], style, device="cpu", on_layer=lambda *a: reported.append(a[0]))
    assert (str(caught.value), caught.value.issues) == (str(wanted.value), wanted.value.issues)
    assert len(wanted.value.issues) == 2
    assert reported == []
    assert readers() == []


def test_who_waits_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a layer that cannot be used, of all that come after it, of a file that is gone."""
    broken = tensors(50)
    broken[f"{MODULES[0]}.lora_B.weight"][0, 0] = float("inf")
    content, style = pair[0], write(tmp_path / "broken.safetensors", broken)
    with open_adapter(style) as first, open_adapter(content) as second, ReadAhead() as ahead:
        adapters = [ahead.adapter(each) for each in (first, second)]
        content.unlink()
        for adapter, module in ((adapters[0], MODULES[0]), (adapters[1], MODULES[3])):
            with pytest.raises(LoraError, match="holds NaN or infinity"):
                adapter.layers[module]
        assert len(adapters[0].sha256) == 64
        with pytest.raises(FileNotFoundError):
            assert adapters[1].sha256


def test_an_error_elsewhere_ends_the_reading(
    pair: tuple[Path, Path], reads: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is being read comes to its end, nothing after it begins."""
    ended, leave = threading.Event(), ReadAhead.__exit__

    def spy(self: ReadAhead, *args: Any) -> None:
        self._stop.set()
        ended.set()
        leave(self, *args)

    monkeypatch.setattr(ReadAhead, "__exit__", spy)
    second = f"{MODULES[1]}.lora_A.weight"
    on_reading(monkeypatch, lambda _, key: key == second and ended.wait(20))
    arriving: list[Mapping[str, Layer]] = []

    def fail() -> None:
        with ExitStack() as stack:
            opened = [stack.enter_context(open_adapter(path)) for path in pair]
            ahead = stack.enter_context(ReadAhead())
            arriving.extend(ahead.adapter(each).layers for each in opened)
            assert arriving[0][MODULES[0]].rank == 3
            raise LoraError("as planned")

    with pytest.raises(LoraError, match="as planned"):
        fail()
    read = {(file, key.split(".lora")[0]) for file, key in reads if ".lora" in key}
    assert read == {("content", module) for module in MODULES[:2]}
    with pytest.raises(CancelledError):
        arriving[1][MODULES[0]]
    assert readers() == []
