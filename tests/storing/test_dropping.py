"""Slots that a schedule never uses: kept by default, and dropped on request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.compiling import compiled, rescheduled
from support.lora_files import peft_keys, random_pair, write_lora
from support.other_device import OtherDevice
from support.shipped import klora

from klora_compile import Fusion, compress, drop_unused, thin, verify_fusion
from klora_compile.sources import by_source
from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact.document import load_document
from klora_runtime.devices.device_types import TYPES
from klora_runtime.errors import ArtifactError

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    found = []
    for seed, name in enumerate(("content", "style")):
        pairs = {
            f"{ATTENTION}.to_{letter}": random_pair(48, 32, 4, seed=10 * place + seed)
            for place, letter in enumerate("qkv")
        }
        found.append(write_lora(folder / f"{name}.safetensors", peft_keys(pairs)))
    return found[0], found[1]


@pytest.fixture(scope="module")
def whole(pair: tuple[Path, Path]) -> Fusion:
    """The content acts in every layer, and the style in none."""
    fusion = compiled(*pair, gamma=1e-9)
    assert all(list(entry.acting) == ["content"] for entry in fusion.entries)
    return fusion


def saved(fusion: Fusion, folder: Path) -> Path:
    path = folder / "x.klora.safetensors"
    save_fusion(fusion, path, overwrite=True)
    return path


def test_what_never_acts_is_kept_or_dropped(whole: Fusion) -> None:
    lean = drop_unused(whole)
    assert all(set(entry.factors) == {"content", "style"} for entry in whole.entries)
    assert all(set(entry.factors) == {"content"} for entry in lean.entries)
    assert 2 * lean.nbytes == whole.nbytes
    for one, other in zip(lean.entries, whole.entries, strict=True):
        assert replace(one, factors={}) == replace(other, factors={})


def test_a_layer_where_nothing_acts_changes_its_fate(pair: tuple[Path, Path]) -> None:
    content, style = pair
    alone = write_lora(
        style.with_name("more.safetensors"),
        peft_keys(
            {f"{ATTENTION}.to_{name}": random_pair(48, 32, 4, seed=3) for name in ("q", "out.0")}
        ),
    )
    silent = compiled(content, alone, unpaired="drop")
    fates = [
        {entry.module.rpartition("to_")[2]: entry.fate for entry in each.entries}
        for each in (silent, drop_unused(silent), rescheduled(drop_unused(silent)))
    ]
    assert [[own[name] for name in ("k", "v", "out.0")] for own in fates] == [
        ["idle"] * 3, ["dropped"] * 3, ["dropped"] * 3
    ]  # fmt: skip


def test_verification_knows_what_was_dropped(
    whole: Fusion, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    referring = thin(whole, by_source(*pair))
    for fusion in (drop_unused(whole), referring, drop_unused(referring)):
        assert verify_fusion(load_fusion(saved(fusion, tmp_path)), by_source(*pair)) == []
    entry, *rest = whole.entries
    less = replace(entry, factors={"style": entry.factors["style"]})
    (found,) = verify_fusion(replace(whole, entries=(less, *rest)), by_source(*pair))
    assert found == f"{entry.path}: set of stored slots differs"


def test_commands_drop_on_request(whole: Fusion, pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "lean.klora.safetensors"
    wanted = saved(drop_unused(whole), tmp_path).read_bytes()
    assert klora("compile", *pair, "-o", path, "--gamma", 1e-9, "--drop-unused").exit_code == 0
    assert path.read_bytes() == wanted
    again = ("recompile", saved(whole, tmp_path), "-o", path, "--drop-unused", "--force")
    assert klora(*again).exit_code == 0
    assert path.read_bytes() == wanted


def test_compressed_factors_that_never_act_are_decoded_when_needed(
    whole: Fusion, tmp_path: Path
) -> None:
    small = compress(whole, 0.01)
    assert all(each.quantised for entry in small.entries for each in entry.factors.values())
    read = load_fusion(saved(small, tmp_path))
    packed = read.nbytes
    assert packed < 0.8 * small.nbytes  # the bytes of the style, and the numbers of the content
    for one, other in zip(read.entries, small.entries, strict=True):
        for slot, stored in other.factors.items():
            pairs = zip(one.factors[slot].delta.tensors, stored.delta.tensors, strict=True)
            assert all(torch.equal(*tensors) for tensors in pairs)
    assert read.nbytes == small.nbytes
    assert saved(read, tmp_path).read_bytes() == saved(small, tmp_path).read_bytes()
    again = rescheduled(load_fusion(saved(small, tmp_path)), "direct")
    wanted = saved(rescheduled(small, "direct"), tmp_path).read_bytes()
    assert saved(again, tmp_path).read_bytes() == wanted


def test_damage_in_what_never_acts_is_found_when_it_is_needed(
    whole: Fusion, tmp_path: Path
) -> None:
    path = saved(compress(whole, 0.01), tmp_path)
    name = load_document(path).entries[0].factors["style"].tensors["packed"].name
    raw = bytearray(path.read_bytes())
    header = int.from_bytes(raw[:8], "little")
    start = json.loads(raw[8 : 8 + header])[name]["data_offsets"][0]
    raw[8 + header + start + 4] ^= 0xFF
    path.write_bytes(raw)
    damaged = load_fusion(path).entries[0].factors["style"]
    for _ in range(2):
        with pytest.raises(
            ArtifactError, match=f"tensor {name} is damaged: .*Get the artifact again"
        ):
            damaged.delta  # noqa: B018  # decodes it
    with pytest.raises(ArtifactError, match=f"{name}: its bytes do not match its digest"):
        load_fusion(path, check="full")
    other = tmp_path / "other.klora.safetensors"  # would state the digest of the damage
    refused = klora("recompile", path, "-o", other)
    assert f"{name}: its bytes do not match its digest" in refused.stderr
    assert not other.exists()


def test_a_device_gets_what_acts(
    whole: Fusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TYPES["mps"], "count", lambda: 1)
    path = saved(whole, tmp_path)
    with OtherDevice() as device:
        for entry in load_fusion(path, device=device.device).entries:
            places = {s: {t.device for t in f.delta.tensors} for s, f in entry.factors.items()}
            assert places == {"content": {device.device}, "style": {torch.device("cpu")}}
            for slot, stored in entry.factors.items():
                (same,) = (e for e in whole.entries if e.path == entry.path)
                for one, other in zip(
                    stored.delta.tensors, same.factors[slot].delta.tensors, strict=True
                ):
                    assert torch.equal(one.to("cpu"), other)


def test_equal_deltas_of_which_one_never_acts_are_packed_together(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """A tensor is named by its bytes, so two packs of equal bytes would be one tensor."""
    twin = write_lora(tmp_path / "twin.safetensors", load_file(str(pair[0])))
    small = compress(compiled(pair[0], twin, gamma=1e-9), 0.01)
    assert all(list(entry.acting) == ["content"] for entry in small.entries)
    read = load_fusion(saved(small, tmp_path), check="full")
    for one, other in zip(read.entries, small.entries, strict=True):
        for slot, stored in other.factors.items():
            pairs = zip(one.factors[slot].delta.tensors, stored.delta.tensors, strict=True)
            assert all(torch.equal(*tensors) for tensors in pairs)
