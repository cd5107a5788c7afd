"""Switches of many layers together, as on a GPU, and tensors that travel together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import sampling
from support.applying import live_of
from support.generation import TOLERANCE, Case, LoraPair, build, generate, progress
from support.handmade import State, fusion_for
from support.lora_files import GOLDEN
from tiny_pipeline import Family, relative_difference, tiny_pipeline
from torch import nn

from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.delta import Dense, Stored
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.tensor_file import TensorFile
from klora_runtime.devices.device_types import TYPES
from klora_runtime.errors import ConfigError, FileFormatError
from klora_runtime.layers import groups
from klora_runtime.layers.merge import Merge
from klora_runtime.layers.shipping import shipped

CASE = Case(7, "DDIM", "batched", "sd1", "s*")


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, on the CPU."""
    monkeypatch.setattr(TYPES["cpu"], "grouped", True)


def written_alone(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the layers that are not written with others."""
    shapes: list[torch.Size] = []
    original = Merge._write_alone

    def spy(self: Merge, write: groups.Write) -> None:
        shapes.append(write.live.shape)
        original(self, write)

    monkeypatch.setattr(Merge, "_write_alone", spy)
    return shapes


@pytest.mark.parametrize("batch_bytes", [1, 2**14, groups.BATCH_BYTES])
def test_latents_equal_the_reference(
    batch_bytes: int,
    grouped: None,
    lora_pairs: dict[Family, LoraPair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(groups, "BATCH_BYTES", batch_bytes)
    alone = written_alone(monkeypatch)
    loras = lora_pairs[CASE.family]
    pipe = build(CASE)
    with sampling(pipe, loras.reference(CASE), progress(CASE)):
        expected = generate(pipe, CASE)

    pipe = build(CASE)
    before = State.of(pipe).bits
    handle = apply_fusion(pipe, loras.fusion(CASE), mode="merge")
    assert relative_difference(generate(pipe, CASE), expected) <= TOLERANCE
    handle.swap(loras.fusion(CASE))
    assert relative_difference(generate(pipe, CASE), expected) <= TOLERANCE

    acting = sum(entry.acts for entry in loras.fusion(CASE).entries)
    assert 0 < len(alone) < acting
    handle.remove()
    assert State.of(pipe).bits == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_those_of_layers_written_alone(
    dtype: torch.dtype, grouped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline("sd1")
    pipe.to(dtype)
    convolutions = [module for module in pipe.unet.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions[:4]:
        module.to(memory_format=torch.channels_last)
    layers = [
        f"unet.{name}"
        for name, module in pipe.unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    fusion = fusion_for(pipe, layers)
    handle = apply_fusion(pipe, fusion, mode="merge", weights={"style": 0.3})
    assert len(live_of(handle).mode._groups) > 3  # type: ignore[attr-defined]
    together = {name: value.clone() for name, value in pipe.unet.named_parameters()}
    handle.remove()

    monkeypatch.setattr(TYPES["cpu"], "grouped", False)
    with apply_fusion(pipe, fusion, mode="merge", weights={"style": 0.3}):
        for name, value in pipe.unet.named_parameters():
            torch.testing.assert_close(value, together[name], msg=name)


def test_a_converted_model_is_followed(grouped: None) -> None:
    pipe = tiny_pipeline("sd1")
    fusion = fusion_for(pipe, _attention(pipe))
    handle = apply_fusion(pipe, fusion, mode="merge")
    pipe.to(torch.bfloat16)
    handle.set(content=0.5)
    there = {name: value.clone() for name, value in pipe.unet.named_parameters()}
    handle.remove()
    with apply_fusion(pipe, fusion, mode="merge", weights={"content": 0.5}):
        for name, value in pipe.unet.named_parameters():
            torch.testing.assert_close(value, there[name], msg=name)


def test_factors_are_kept_once(grouped: None) -> None:
    pipe = tiny_pipeline("sd1")
    fusion = fusion_for(pipe, _attention(pipe))
    handle = apply_fusion(pipe, fusion, mode="merge")
    assert handle.report().nbytes["factors on cpu"] == fusion.nbytes
    for group, members in live_of(handle).mode._groups:  # type: ignore[attr-defined]
        stacked = {group._up.data_ptr(), group._down.data_ptr()}
        terms = [t for index in members for t in live_of(handle).mode._layers[index].terms]  # type: ignore[attr-defined]
        tensors = [tensor for term in terms for tensor in term.delta.tensors]
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == stacked


def _attention(pipe: Any) -> list[str]:
    return [
        f"unet.{name}"
        for name, module in pipe.unet.named_modules()
        if isinstance(module, nn.Linear) and ".attn" in name
    ]


# One block of memory.


def tensors_of(fusion: Fusion) -> list[torch.Tensor]:
    stored = [each for entry in fusion.entries for each in entry.factors.values()]
    return [tensor for each in stored for tensor in each.delta.tensors]


def test_an_artifact_is_one_block_of_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.klora.safetensors"
    path.write_bytes(GOLDEN.read_bytes())
    fusion = load_fusion(path)
    before = [tensor.clone() for tensor in tensors_of(fusion)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors_of(fusion)}) == 1

    path.write_bytes(b"\0" * path.stat().st_size)  # in place: what was read stays
    assert all(map(torch.equal, tensors_of(fusion), before))
    save_fusion(fusion, tmp_path / "again.klora.safetensors")
    assert (tmp_path / "again.klora.safetensors").read_bytes() == GOLDEN.read_bytes()


def test_a_file_that_shrank_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOLDEN.read_bytes())
    with TensorFile(path, "artifact") as file:
        path.write_bytes(GOLDEN.read_bytes()[:-64])
        with pytest.raises(FileFormatError, match=r"artifact .*its data cannot be read: "):
            file.block(torch.device("cpu"))


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "meta"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ConfigError, match=f"^device {device}: "):
        load_fusion(GOLDEN, device=device)


def test_tensors_of_one_block_are_moved_in_one_piece() -> None:
    block = torch.arange(24.0)
    parts = [block[18:24].view(2, 3), block[0:12].view(3, 4), block[12:18]]
    other = torch.arange(5, dtype=torch.float16)
    moved = shipped([*parts, other], torch.device("cpu"), torch.bfloat16)
    for one, before in zip(moved, [*parts, other], strict=True):
        assert torch.equal(one, before.to(torch.bfloat16))
        assert one.shape == before.shape
    assert len({one.untyped_storage().data_ptr() for one in moved}) == 2

    same = shipped(parts, torch.device("cpu"), torch.float32)
    assert [one.data_ptr() for one in same] == [part.data_ptr() for part in parts]


def test_tensors_with_memory_of_their_own_are_moved_in_one_piece() -> None:
    """As the factors are that were decoded from few bits."""
    parts = [torch.randn(2, 3), torch.randn(4, 2, 1, 1), torch.randn(3, 2).t(), torch.randn(5)]
    moved = shipped(parts, torch.device("cpu"), torch.bfloat16)
    for one, before in zip(moved, parts, strict=True):
        assert one.shape == before.shape
        assert torch.equal(one, before.bfloat16())
    assert len({one.untyped_storage().data_ptr() for one in moved}) == 1


def test_what_lies_between_is_left_behind() -> None:
    block = torch.zeros(1000, dtype=torch.float16)
    moved = shipped([block[:2], block[-2:]], torch.device("cpu"), torch.float32)
    assert sum(one.untyped_storage().nbytes() for one in moved) == 4 * 4
    turned = block[:6].view(2, 3).t()
    (moved_turned,) = shipped([turned], torch.device("cpu"), torch.float32)
    assert torch.equal(moved_turned, turned.float())


def test_dense_and_low_rank_slots_side_by_side(grouped: None) -> None:
    """A layer with a dense slot is written by itself, its neighbours of one shape together."""
    pipe = tiny_pipeline("sd1")
    fusion = fusion_for(pipe, _attention(pipe))
    entries = list(fusion.entries)
    content = entries[0].factors["content"]
    dense = Stored(content.scale, Dense(content.delta.matrix(torch.float32)))
    changed = _with_factors(entries[0], dense)
    expected = apply_fusion(pipe, fusion, mode="merge")
    wanted = {name: value.clone() for name, value in pipe.unet.named_parameters()}
    expected.remove()
    with apply_fusion(pipe, _with_entries(fusion, [changed, *entries[1:]]), mode="merge"):
        for name, value in pipe.unet.named_parameters():
            torch.testing.assert_close(value, wanted[name], msg=name)


def _with_factors(entry: Any, content: Stored) -> Any:
    return replace(entry, factors={**entry.factors, "content": content})


def _with_entries(fusion: Fusion, entries: list[Any]) -> Fusion:
    return replace(fusion, entries=tuple(entries))


def test_padding_is_counted(grouped: None) -> None:
    pipe = tiny_pipeline("sd1")
    layers = _attention(pipe)
    few, many = fusion_for(pipe, layers[::2], rank=2), fusion_for(pipe, layers[1::2], rank=3)
    entries = sorted([*few.entries, *many.entries], key=lambda entry: entry.layer)
    handle = apply_fusion(pipe, _with_entries(few, entries), mode="merge")
    kept = handle.report().nbytes["factors on cpu"]
    groups_bytes = sum(group.nbytes for group, _ in live_of(handle).mode._groups)  # type: ignore[attr-defined]
    grouped_layers = sum(len(members) for _, members in live_of(handle).mode._groups)  # type: ignore[attr-defined]
    assert grouped_layers == len(entries)
    assert kept == groups_bytes > few.nbytes + many.nbytes
