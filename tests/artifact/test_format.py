"""The artifact format: golden bytes, round trip, reproducible bytes, and a spec kept true."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden_fusion import GAMMA, golden_fusion, switching_entry
from support.lora_files import GOLDEN, ROOT, Artifact, read_raw, run_python

from klora_compile.planning.fates import BESIDE, FATES, IDLE
from klora_compile.report.fates import MEANINGS
from klora_compile.rules.klora import Klora
from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact import safetensors_file as limits
from klora_runtime.artifact.assembly import tensor_name
from klora_runtime.artifact.checks import MAX_ENTRIES, MAX_SLOTS
from klora_runtime.artifact.delta import LowRank, Stored
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.timeline import MAX_SEGMENTS, Timeline
from klora_runtime.errors import ArtifactError

SPEC = (ROOT / "runtime" / "FORMAT.md").read_text()


def saved(fusion: Fusion, folder: Path, name: str = "a.klora.safetensors") -> bytes:
    save_fusion(fusion, folder / name)
    return (folder / name).read_bytes()


def metadata_text(path: Path) -> str:
    header, _ = read_raw(path)
    text = header["__metadata__"]["klora"]
    assert isinstance(text, str)
    return text


def with_factors(fusion: Fusion, layer: str, factors: dict[str, Stored]) -> Fusion:
    entries = tuple(replace(e, factors=factors) if e.layer == layer else e for e in fusion.entries)
    return replace(fusion, entries=entries)


# --- golden bytes, round trip -----------------------------------------------------------------


def test_golden_file_is_reproduced_to_the_byte(tmp_path: Path) -> None:
    size = save_fusion(golden_fusion(), tmp_path / "new.klora.safetensors")
    assert (tmp_path / "new.klora.safetensors").read_bytes() == GOLDEN.read_bytes()
    assert size == GOLDEN.stat().st_size < 20_000


def test_golden_file_is_read_as_it_was_built() -> None:
    built, read = golden_fusion(), load_fusion(GOLDEN, check="full")
    for name in ("sources", "slots", "rule", "family", "tool", "fingerprint", "components"):
        assert getattr(read, name) == getattr(built, name)
    assert read.rule.derived["gamma"]["unet"] == GAMMA
    assert len(read.entries) == len(built.entries)
    for one, other in zip(read.entries, built.entries, strict=True):
        for name in ("component", "module", "parameter", "shape", "fate", "timeline", "scores"):
            assert getattr(one, name) == getattr(other, name), (one.layer, name)
        assert set(one.factors) == set(other.factors)
        for slot, stored in one.factors.items():
            wanted = other.factors[slot]
            assert stored.scale == wanted.scale
            assert type(stored.delta) is type(wanted.delta)
            for tensor, expected in zip(stored.delta.tensors, wanted.delta.tensors, strict=True):
                assert tensor.dtype == expected.dtype
                assert torch.equal(tensor, expected)


def test_reading_and_writing_again_changes_no_byte(tmp_path: Path) -> None:
    assert saved(load_fusion(GOLDEN), tmp_path) == GOLDEN.read_bytes()


def test_golden_file_has_every_fate_and_dtype() -> None:
    artifact = Artifact.read()
    # Those of biases, of recompiling, and of a third LoRA are elsewhere.
    fates = {*Klora.fates, *FATES} - {"with its weight", IDLE, BESIDE}
    assert {entry["fate"] for entry in artifact.entries.values()} == fates
    assert {tensor.dtype for tensor in artifact.tensors.values()} == {"F32", "F16", "BF16"}
    assert len(golden_fusion().entries) == len(fates)


# --- reproducible bytes -----------------------------------------------------------------------


def test_order_of_insertion_does_not_reach_the_file(tmp_path: Path) -> None:
    fusion = golden_fusion()

    def reversed_dict(value: Any) -> Any:
        return dict(reversed(list(value.items())))

    shuffled = replace(
        fusion,
        sources=reversed_dict(fusion.sources),
        slots=reversed_dict(fusion.slots),
        rule=replace(fusion.rule, parameters=reversed_dict(fusion.rule.parameters)),
        entries=tuple(
            replace(entry, factors=reversed_dict(entry.factors)) for entry in fusion.entries
        ),
    )
    assert list(shuffled.slots) != list(fusion.slots)
    assert saved(shuffled, tmp_path) == GOLDEN.read_bytes()


@pytest.mark.slow
def test_a_process_with_another_hash_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys; from support.golden_fusion import golden_fusion;"
        "from klora_runtime import save_fusion; save_fusion(golden_fusion(), sys.argv[1])"
    )
    path = tmp_path / "a.klora.safetensors"
    result = run_python(code, path, PYTHONHASHSEED="1")
    assert result.returncode == 0, result.stderr
    assert path.read_bytes() == saved(golden_fusion(), tmp_path, "b") == GOLDEN.read_bytes()


def test_layout_in_memory_does_not_reach_the_file(tmp_path: Path) -> None:
    """Views into one larger storage, a transposed one, one that wants a gradient: equal bytes."""
    fusion, entry = golden_fusion(), switching_entry()
    content, style = entry.factors["content"].delta, entry.factors["style"].delta
    one_storage = torch.cat([torch.zeros(3), content.down.flatten(), content.up.flatten()])
    down, up = one_storage[3:7].view(1, 4), one_storage[7:10].view(3, 1)
    views = {
        "content": LowRank(down, up),
        "style": LowRank(style.down.clone().requires_grad_(), style.up.T.contiguous().T),
    }
    assert not views["style"].up.is_contiguous()
    factors = {slot: replace(entry.factors[slot], delta=delta) for slot, delta in views.items()}
    assert saved(with_factors(fusion, entry.layer, factors), tmp_path) == GOLDEN.read_bytes()


def test_two_shapes_of_one_memory_are_two_tensors(tmp_path: Path) -> None:
    values = torch.ones(4)
    factors = {"content": Stored(1.0, LowRank(values.view(1, 4), values.view(4, 1)))}
    row = Timeline.constant({"content": 1.0, "style": 0.0})
    entry = replace(switching_entry(), shape=(4, 4), factors=factors, timeline=row)
    saved(replace(golden_fusion(), entries=(entry,)), tmp_path)
    artifact = Artifact.read(tmp_path / "a.klora.safetensors")
    assert sorted(tensor.shape for tensor in artifact.tensors.values()) == [[1, 4], [4, 1]]


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    """Equal bytes, dtype and shape are one tensor; another dtype or shape is another one."""
    fusion, layer = golden_fusion(), switching_entry().layer
    down, up = torch.ones(1, 4), torch.ones(3, 1)
    equal = {s: Stored(1.0, LowRank(down.clone(), up.clone())) for s in ("content", "style")}
    entry = next(e for e in fusion.entries if e.layer == layer)
    fusion = replace(fusion, entries=(replace(entry, factors=equal),))
    saved(fusion, tmp_path)
    artifact = Artifact.read(tmp_path / "a.klora.safetensors")
    assert sorted(t.shape for t in artifact.tensors.values()) == [[1, 4], [3, 1]]
    names = {tensor_name(t) for t in (down, down.view(4, 1), down.half(), down.int().float())}
    assert len(names) == 3


# --- the spec ---------------------------------------------------------------------------------


def keys_of(value: Any, provenance: bool = False) -> set[str]:
    """Every key of the JSON, but for names that a user or a rule gave."""
    if isinstance(value, list):
        return set().union(*(keys_of(item) for item in value)) if value else set()
    if not isinstance(value, dict):
        return set()
    found: set[str] = set()
    for key, inner in value.items():
        named = key in ("sources", "slots", "factors")
        inside = list(inner.values()) if named and isinstance(inner, dict) else [inner]
        found |= {key}
        if key not in ("scores", "parameters", "derived"):
            found |= set().union(*(keys_of(item) for item in inside))
    return found


def test_every_key_of_the_spec_is_in_the_golden_file_and_the_reverse() -> None:
    required = set(re.findall(r"\*\*`([a-z_0-9]+)`\*\*", SPEC))
    found = keys_of(json.loads(metadata_text(GOLDEN)))
    # of kind dense, encoding q, kind reference: test_dense, test_hostile_compressed, test_thin
    elsewhere = {"delta", "packed", "step", "levels", "error", "source", "rows"}
    assert found - {"content", "style"} == required - elsewhere
    assert {"from", "timeline", "encoding", "sha256"} <= required  # the pattern finds something


def test_every_word_that_the_spec_reserves_is_absent_from_the_golden_file() -> None:
    reserved = SPEC.partition("These names are reserved:")[2].partition("##")[0]
    words = re.findall(r"`([a-z0-9.]+)`", reserved)
    assert set(words) >= {"content.1", "rows", "q8", "f8"}
    text = metadata_text(GOLDEN)
    for word in set(words) - {"derived", "scores", "klora"}:
        assert f'"{word}"' not in text


def test_limits_of_the_spec_are_those_of_the_code() -> None:
    table = dict(re.findall(r"^\| ([a-z; ]+?) \| (\d+)(?: bytes)? \|$", SPEC, re.MULTILINE))
    assert {name: int(value) for name, value in table.items()} == {
        "header": limits.MAX_HEADER_BYTES,
        "tensors in the header": limits.MAX_TENSORS,
        "dimensions of a tensor": limits.MAX_DIMENSIONS,
        "entries": MAX_ENTRIES,
        "segments of a timeline": MAX_SEGMENTS,
        "slots; sources": MAX_SLOTS,
    }


def test_the_spec_lists_the_fates_of_all_rules() -> None:
    (row,) = re.findall(r"^\| \*\*`fate`\*\* °(.*)$", SPEC, re.MULTILINE)
    assert set(re.findall(r"`([a-z -]+)`", row)) == set(MEANINGS)


def test_example_of_the_spec_is_a_real_artifact(tmp_path: Path) -> None:
    example = re.search(r"```json\n(.*?)```", SPEC, re.DOTALL)
    assert example is not None
    saved(replace(golden_fusion(), entries=(switching_entry(),)), tmp_path)
    assert json.loads(example[1]) == json.loads(metadata_text(tmp_path / "a.klora.safetensors"))


def test_digests_are_what_the_spec_says() -> None:
    """Computed from the file's bytes alone, as a second reader would."""
    text = metadata_text(GOLDEN)
    assert json.loads(text)["digest"] == hashlib.sha256(text[86:-1].encode()).hexdigest()
    words = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    places = []
    for name, tensor in Artifact.read().tensors.items():
        digest = hashlib.sha256(tensor.payload).hexdigest()
        line = f"{words[tensor.dtype]} {tensor.shape} {digest}"
        assert name == hashlib.sha256(line.encode()).hexdigest()[:32]
        places.append((["F32", "BF16", "F16"].index(tensor.dtype), name))
    assert places == sorted(places)
    assert text.isascii()
    assert "\\u2713" in text


def test_fingerprint_is_what_the_spec_says() -> None:
    document = Artifact.read().document
    lines = sorted(
        "{component}.{module}.{parameter} ".format(**e) + "x".join(map(str, e["shape"]))
        for e in document["entries"]
    )
    expected = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert document["fits"]["fingerprint"] == expected


def test_no_time_and_no_path_is_in_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "a folder of its own"
    folder.mkdir()
    assert b"folder of its own" not in saved(golden_fusion(), folder)
    header, _ = read_raw(folder / "a.klora.safetensors")
    assert list(header["__metadata__"]) == ["klora"]


# --- a writer that the reader would refuse ----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "issue"),
    [
        ({"slots": {}}, "slots: expected an object of 1 to 64 slots"),
        ({"entries": ()}, "entries: expected a list of 1 to 20000 entries"),
        ({"tool": "x" * 2**25}, "its header takes"),
    ],
)
def test_a_fusion_that_breaks_the_format_is_not_written(
    change: dict[str, Any], issue: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.klora.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ArtifactError, match="was not written, because it could not be read") as e:
        save_fusion(replace(golden_fusion(), **change), path, overwrite=True)
    assert issue in str(e.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_a_value_that_json_cannot_hold_is_an_error(value: object, tmp_path: Path) -> None:
    entry = replace(switching_entry(), scores={"klora": {"ratio": value}})
    with pytest.raises(ArtifactError, match="the fusion cannot be written: "):
        save_fusion(replace(golden_fusion(), entries=(entry,)), tmp_path / "a.klora.safetensors")
    assert list(tmp_path.iterdir()) == []
