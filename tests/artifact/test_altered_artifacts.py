"""Artifacts whose tensors or metadata were exchanged, damaged or added to; and other loaders."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.lora_files import GOLDEN, Artifact, RawTensor, canonical, write_tensors
from tiny_pipeline import parameters, tiny_pipeline

from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact.assembly import tensor_name
from klora_runtime.artifact.whole_document import load_whole_document
from klora_runtime.errors import ArtifactError

NAME = "x.klora.safetensors"
EVIL = "\x1b[2J\x07\r\nall is well\u202e"


def issues(path: Path, check: Any = "structure") -> tuple[str, ...]:
    with pytest.raises(ArtifactError) as caught:
        load_fusion(path, check=check)
    assert all(c.isprintable() or c == "\n" for c in str(caught.value))
    if check == "full":  # the check without torch says the same
        with pytest.raises(ArtifactError, match=re.escape(str(caught.value))):
            load_whole_document(path)
    return caught.value.issues


def twins(artifact: Artifact) -> tuple[str, str]:
    """Two tensors that no check of sizes and shapes can tell apart."""
    entries = artifact.entries.values()
    pairs = [f["down"] for e in entries for f in e["factors"].values()]
    alike = [n for n in dict.fromkeys(pairs) if artifact.tensors[n].shape == [2, 4]]
    assert len(alike) == 2
    return alike[0], alike[1]


def test_exchanged_payloads_are_noticed_by_the_full_check(tmp_path: Path) -> None:
    artifact = Artifact.read()
    one, other = (artifact.tensors[name] for name in twins(artifact))
    assert one.payload != other.payload
    one.payload, other.payload = other.payload, one.payload
    path = artifact.write(tmp_path / NAME)
    load_fusion(path)  # the structure is that of a good file
    assert sorted(issues(path, "full")) == sorted(
        f"tensor {name}: its bytes do not match its digest" for name in twins(artifact)
    )


def test_exchanged_names_are_noticed_by_the_full_check(tmp_path: Path) -> None:
    artifact = Artifact.read()
    one, other = twins(artifact)
    names = {one: other, other: one}
    artifact.tensors = {names.get(name, name): t for name, t in artifact.tensors.items()}
    path = artifact.write(tmp_path / NAME)
    load_fusion(path)
    assert len(issues(path, "full")) == 2


def test_one_flipped_bit_is_noticed_in_every_tensor(tmp_path: Path) -> None:
    whole = GOLDEN.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    damaged = []
    for place in range(start, len(whole)):
        path = tmp_path / NAME
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        (issue,) = issues(path, "full")
        damaged.append(issue.split()[1].rstrip(":"))
    assert list(dict.fromkeys(damaged)) == list(Artifact.read().tensors)


def replaced(old: str, tensor: torch.Tensor, name: str | None = None) -> Artifact:
    """The golden artifact with another tensor for ``old``, under its right name or ``name``."""
    artifact = Artifact.read()
    new = tensor_name(tensor) if name is None else name
    artifact.document = json.loads(canonical(artifact.document).replace(old, json.dumps(new)[1:-1]))
    artifact.tensors = {
        (new if n == old else n): (RawTensor.of(tensor) if n == old else t)
        for n, t in artifact.tensors.items()
    }
    return artifact


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_that_is_not_finite_is_noticed_by_the_full_check(
    value: float, tmp_path: Path
) -> None:
    old, _ = twins(Artifact.read())
    tensor = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, value]], dtype=torch.float16)
    path = replaced(old, tensor).write(tmp_path / NAME)
    assert issues(path, "full") == (f"tensor {tensor_name(tensor)}: holds NaN or infinity",)


@pytest.mark.parametrize(("dtype", "word"), [(torch.float64, "F64"), (torch.int32, "I32")])
def test_other_dtypes_are_refused(dtype: torch.dtype, word: str, tmp_path: Path) -> None:
    old, _ = twins(Artifact.read())
    path = replaced(old, torch.ones(2, 4, dtype=dtype)).write(tmp_path / NAME)
    assert any(f"dtype {word}, expected" in issue for issue in issues(path))


@pytest.mark.parametrize("name", ["unet.conv_in.lora_A.weight", "0" * 31, "A" * 32, EVIL])
def test_a_tensor_name_that_is_no_digest_is_refused(name: str, tmp_path: Path) -> None:
    old, _ = twins(Artifact.read())
    path = replaced(old, torch.ones(2, 4), name).write(tmp_path / NAME)
    assert any("its name is not a digest of 32 hex digits" in issue for issue in issues(path))


def test_a_tensor_of_no_entry_is_refused(tmp_path: Path) -> None:
    artifact = Artifact.read()
    artifact.tensors["0" * 32] = RawTensor.of(torch.ones(1))
    expected = f"tensors: 1 belong to no entry (first: {'0' * 32})"
    assert issues(artifact.write(tmp_path / NAME)) == (expected,)


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    artifact = Artifact.read()
    gone, _ = twins(artifact)
    del artifact.tensors[gone]
    found = issues(artifact.write(tmp_path / NAME))
    assert found
    assert all(f"no tensor {gone} in the file" in issue for issue in found)


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        (None, "found none"),
        ({"format": "pt"}, "found format"),
        ({"klora": "", "format": "pt"}, "found klora, format"),
        ({EVIL: ""}, r"found \x1b[2J\x07\r\nall is well\u202e"),
    ],
)
def test_other_metadata_keys_are_refused(
    metadata: dict[str, str] | None, found: str, tmp_path: Path
) -> None:
    path = write_tensors(tmp_path / NAME, Artifact.read().tensors, metadata)
    with pytest.raises(ArtifactError, match="is not a klora artifact: expected exactly") as caught:
        load_fusion(path)
    assert found in str(caught.value)
    assert "klora compile CONTENT STYLE" in str(caught.value)


# --- any part of the document, replaced by anything -------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every part of a JSON value."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


DOCUMENT = Artifact.read().document
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "content", "style", "weight", "lowrank", "0" * 32, EVIL, "\ud800"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "content", "x", EVIL]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.sampled_from(list(places(DOCUMENT))), value=VALUES)
def test_any_value_at_any_place_gives_an_error_or_a_fusion(
    place: tuple[Any, ...], value: Any, tmp_path: Path
) -> None:
    artifact = Artifact.read()
    artifact.document = copy.deepcopy(DOCUMENT)
    target: Any = artifact.document
    for step in place[:-1]:
        target = target[step]
    target[place[-1]] = value
    path = artifact.write(tmp_path / NAME)
    try:
        fusion = load_fusion(path)
    except ArtifactError as error:
        message = str(error)
    else:  # what can be read can be written, and is the same again
        save_fusion(fusion, tmp_path / "again", overwrite=True)
        once = (tmp_path / "again").read_bytes()
        save_fusion(load_fusion(tmp_path / "again"), tmp_path / "again", overwrite=True)
        assert (tmp_path / "again").read_bytes() == once
        message = ""
    assert all(c.isprintable() or c == "\n" for c in message)


# --- other loaders ----------------------------------------------------------------------------


def test_the_lora_loader_of_diffusers_refuses_an_artifact_and_leaves_the_model_alone() -> None:
    pipe = tiny_pipeline("sd1")
    before = parameters(pipe)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights(str(GOLDEN.parent), weight_name=GOLDEN.name)
    after = parameters(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert pipe.get_list_adapters() == {}
