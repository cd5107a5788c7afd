"""The LoRAs of a fusion, read together: headers first, then each number once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support import form_files
from support.form_files import Source, norm
from support.lora_files import random_pair

from klora_compile import compile_fusion, read_adapter
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.files.lora_file import LoraFile
from klora_compile.rules.lookup import RULES
from klora_runtime import save_fusion
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.errors import LoraError, PairingError

MODULES = [f"unet.down_blocks.0.attentions.{i}.proj_in" for i in range(4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def tensors(seed: int, rank: int = 3, width: int = 8) -> dict[str, torch.Tensor]:
    """A pair of each dtype, and a norm."""
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
    """File and key of each tensor that was read, by torch or as bytes."""
    seen: list[tuple[str, str]] = []
    tensor, stored = LoraFile.tensor, LoraFile.stored

    def by_torch(file: LoraFile, key: str) -> torch.Tensor:
        seen.append((file.path.stem, key))
        return tensor(file, key)

    def as_bytes(file: LoraFile, key: str) -> FileTensor | None:
        found = stored(file, key)
        if found is not None:
            seen.append((file.path.stem, key))
        return found

    monkeypatch.setattr(LoraFile, "tensor", by_torch)
    monkeypatch.setattr(LoraFile, "stored", as_bytes)
    return seen


def saved(path: Path, *loras: Path | Adapter, rule: str, cache: Path | None = None) -> bytes:
    fusion = compile_fusion(*loras, RULES[rule](), device="cpu", cache=cache)
    save_fusion(fusion, path, overwrite=True)
    return path.read_bytes()


@pytest.mark.parametrize("rule", ["klora", "est", "np+klora"])
def test_files_and_loras_that_were_read_give_one_artifact(
    rule: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "a.klora.safetensors"
    expected = saved(out, *map(read_adapter, pair), rule=rule)
    assert saved(out, *pair, rule=rule) == expected
    assert saved(out, pair[0], read_adapter(pair[1]), rule=rule) == expected
    for _ in range(2):  # measured, looked up
        assert saved(out, *pair, rule=rule, cache=tmp_path / "statistics") == expected


def test_the_header_tells_all_of_a_layer_but_its_numbers(pair: tuple[Path, Path]) -> None:
    adapter = read_adapter(pair[0])
    assert [facts.name for facts in adapter.survey.layers] == list(adapter.layers)
    for facts, layer in zip(adapter.survey.layers, adapter.layers.values(), strict=True):
        for field in ("component", "module", "parameter", "form", "alpha", "alpha_source", "shape"):
            assert getattr(facts, field) == getattr(layer, field)
        assert facts.rank in (layer.rank, None)


def test_each_number_is_read_once(pair: tuple[Path, Path], reads: list[tuple[str, str]]) -> None:
    compile_fusion(*pair, device="cpu")
    assert sorted(reads) == sorted((path.stem, key) for path in pair for key in tensors(1))


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


def test_an_error_lists_what_is_wrong_with_all_numbers_of_a_file(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    broken = tensors(50)
    for place in (0, 2):
        broken[f"{MODULES[place]}.lora_B.weight"][0, 0] = float("nan")
    style = write(tmp_path / "broken.safetensors", broken)
    with pytest.raises(LoraError, match=r"broken\.safetensors.*for 2 reasons") as caught:
        compile_fusion(pair[0], style, device="cpu")
    assert caught.value.issues == tuple(
        f"{MODULES[place]}: holds NaN or infinity" for place in (0, 2)
    )
