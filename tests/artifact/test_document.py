"""What an artifact says without its numbers: all that the fusion says, but for these."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from support.every_form import fusion_of_every_form
from support.golden_fusion import golden_fusion, switching_entry
from support.lora_files import GOLDEN, METADATA, read_raw

from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact.document import (
    Document,
    StoredTensor,
    document_text,
    is_artifact,
    load_document,
)
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.tensor_file import name_in_files
from klora_runtime.artifact.timeline import CLOCKS
from klora_runtime.errors import ArtifactError

FUSIONS = {
    "plain": golden_fusion,
    "every form": fusion_of_every_form,
    "clock of the noise": lambda: replace(golden_fusion(), clock="noise"),
}


@pytest.fixture(params=FUSIONS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_fusion(FUSIONS[request.param](), tmp_path / "a.klora.safetensors")
    return tmp_path / "a.klora.safetensors"


def test_it_says_what_the_fusion_says(path: Path) -> None:
    document, fusion = load_document(path), load_fusion(path)
    for field in fields(Fusion):
        if field.name != "entries":
            assert getattr(document, field.name) == getattr(fusion, field.name)
    for name in ("fingerprint", "components", "is_thin"):
        assert getattr(document, name) == getattr(fusion, name)
    for told, entry in zip(document.entries, fusion.entries, strict=True):
        for field in fields(entry):
            if field.name != "factors":
                assert getattr(told, field.name) == getattr(entry, field.name)
        assert (told.layer, told.path, told.acts) == (entry.layer, entry.path, entry.acts)
        assert told.factors.keys() == entry.factors.keys()
        assert told.acting.keys() == entry.acting.keys()


def test_it_says_how_each_slot_is_stored(path: Path) -> None:
    document, fusion = load_document(path), load_fusion(path)
    for told, entry in zip(document.entries, fusion.entries, strict=True):
        for name, slot in told.factors.items():
            stored = entry.factors[name]
            assert (slot.scale, slot.quantised) == (stored.scale, stored.quantised)
            assert slot.kind == type(stored.delta).__name__.lower()
            assert slot.rank == getattr(stored.delta, "rank", None)
            if slot.encoding == "plain":
                found = [(each.dtype, each.shape) for each in slot.tensors.values()]
                tensors = stored.delta.tensors
                assert found == [(name_in_files(t.dtype), tuple(t.shape)) for t in tensors]
            else:
                assert list(slot.tensors) == ["packed"]


def test_records_that_are_made_at_once_have_all_their_fields(path: Path) -> None:
    """And no others: they are those that their classes make."""
    document, fusion = load_document(path), load_fusion(path)
    slots = [slot for entry in document.entries for slot in entry.factors.values()]
    stored = [each for entry in fusion.entries for each in entry.factors.values()]
    timelines = [entry.timeline for entry in document.entries]
    tensors = list(document.tensors.values())
    for made in (document, fusion, *document.entries, *slots, *timelines, *tensors):
        own = {field.name: getattr(made, field.name) for field in fields(made)}
        assert type(made)(**own) == made
        assert own.keys() <= vars(made).keys()
    assert all({"scale", "quantised"} <= vars(each).keys() for each in stored)


def test_a_note_that_holds_itself_is_not_written(tmp_path: Path) -> None:
    fusion = golden_fusion()
    note: dict[str, object] = {}
    note["inner"] = note
    source = replace(fusion.sources["content"], notes={"mine": note})
    with pytest.raises(ArtifactError, match="the fusion cannot be written: "):
        save_fusion(replace(fusion, sources={**fusion.sources, "content": source}), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_its_tensors_are_those_of_the_file(path: Path) -> None:
    document = load_document(path)
    header, data = read_raw(path)
    del header[METADATA]
    assert {name: (t.dtype, list(t.shape)) for name, t in document.tensors.items()} == {
        name: (info["dtype"], info["shape"]) for name, info in header.items()
    }
    for name, tensor in document.tensors.items():
        begin, end = header[name]["data_offsets"]
        assert (tensor.name, tensor.nbytes) == (name, end - begin)
    assert document.nbytes == len(data)


def test_written_again_it_is_the_text_of_the_file(path: Path) -> None:
    header, _ = read_raw(path)
    assert document_text(load_document(path)) == header[METADATA]["klora"]


def test_it_is_shown_as_a_fusion_is() -> None:
    document, fusion = load_document(GOLDEN), load_fusion(GOLDEN)
    assert repr(document) == repr(fusion)
    assert document._repr_html_() == fusion._repr_html_()


def test_the_clock_of_the_steps_is_not_written(tmp_path: Path) -> None:
    texts = {}
    for clock in CLOCKS:
        path = tmp_path / f"{clock}.klora.safetensors"
        save_fusion(replace(golden_fusion(), clock=clock), path)
        assert load_fusion(path).clock == clock
        texts[clock] = read_raw(path)[0][METADATA]["klora"]
    assert '"clock"' not in texts["step"]
    assert '"clock":"noise"' in texts["noise"]
    assert "clock noise" in repr(load_fusion(path))


def test_a_tensor_that_two_slots_use_counts_once() -> None:
    document = load_document(GOLDEN)
    named = [t for e in document.entries for s in e.factors.values() for t in s.tensors.values()]
    assert len(named) > len(document.tensors) == len(set(named_tensors(document)))
    assert document.nbytes == sum(each.nbytes for each in document.tensors.values())


def named_tensors(document: Document) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(t.name, t.dtype, t.shape) for t in document.tensors.values()]


@pytest.mark.parametrize(("dtype", "nbytes"), [("F32", 24), ("F16", 12), ("BF16", 12), ("U8", 6)])
def test_bytes_of_a_tensor(dtype: str, nbytes: int) -> None:
    assert StoredTensor("a", dtype, (2, 3)).nbytes == nbytes


def test_notes_of_a_source_may_not_hide_what_is_stated() -> None:
    document = load_document(GOLDEN)
    source = replace(document.sources["content"], notes={"sha256": "c1" * 32})
    with pytest.raises(ValueError, match=r"notes of source fox\.safetensors may not be called"):
        document_text(replace(document, sources={"content": source}))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"^artifact .*: cannot be read: No such file"):
        load_document(tmp_path / "nowhere")
    assert not is_artifact(tmp_path / "nowhere")
    assert is_artifact(GOLDEN)


def test_a_tensor_of_no_dtype_of_a_file_is_not_written(tmp_path: Path) -> None:
    entry = switching_entry()
    content = entry.factors["content"]
    complex_pair = replace(content.delta, up=content.delta.tensors[1].to(torch.complex64))
    factors = {**entry.factors, "content": replace(content, delta=complex_pair)}
    fusion = replace(golden_fusion(), entries=(replace(entry, factors=factors),))
    with pytest.raises(ArtifactError) as caught:
        save_fusion(fusion, tmp_path / "a")
    assert str(caught.value) == (
        "the fusion cannot be written: a tensor is torch.complex64, which files cannot hold."
    )
    assert list(tmp_path.iterdir()) == []
