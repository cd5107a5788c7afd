"""Artifacts in few bits, thin ones, and ones with packed JSON, that lie about it."""

from __future__ import annotations

import base64
import copy
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.every_form import fusion_of_every_form
from support.golden_fusion import golden_fusion
from support.lora_files import Artifact, RawTensor, random_pair, read_raw

from klora_compile.storing.compress import compress
from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact.assembly import tensor_name
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.errors import ArtifactError

NAME = "x.klora.safetensors"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("good") / NAME
    save_fusion(fusion_of_every_form(), path)
    assert load_fusion(path, check="full").is_thin
    return Artifact.read(path)


def switching(document: dict[str, Any]) -> dict[str, Any]:
    return next(e for e in document["entries"] if e["fate"] == "switching")["factors"]


def put(slot: str, key: str, value: Any) -> Change:
    return lambda document: switching(document)[slot].__setitem__(key, value)


def drop(slot: str, key: str) -> Change:
    return lambda document: switching(document)[slot].pop(key)


def two_levels(document: dict[str, Any]) -> None:
    index = next(i for i, e in enumerate(document["entries"]) if e["fate"] == "switching")
    document["entries"][index + 1]["factors"]["content"]["levels"] = [7, 7]


def one_size(document: dict[str, Any]) -> None:
    index = next(i for i, e in enumerate(document["entries"]) if e["fate"] == "switching")
    document["entries"][index + 1]["shape"] = [70]
    document["entries"][index + 1]["factors"]["content"]["kind"] = "lowrank"


#: What is done to the document, and the one issue it gives.
CASES: dict[str, tuple[Change, str]] = {
    "unknown encoding": (put("content", "encoding", "q8"), "content: unknown encoding q8; update"),
    "encoding of a reference": (put("style", "encoding", "q"), "style: unknown encoding q; update"),
    "encoding no string": (put("content", "encoding", []), "content: unknown encoding []; update"),
    "levels missing": (drop("content", "levels"), "content: lacks levels"),
    "step missing": (drop("content", "step"), "content: lacks step"),
    "key unknown": (put("content", "down", "x"), "content: has unknown keys down; update klora"),
    "levels empty": (put("content", "levels", []), ".levels: not levels of 0 to 255, descending: "),
    "level -1": (put("content", "levels", [8, -1]), ".levels: not levels of 0 to 255, descending"),
    "level 256": (put("content", "levels", [256]), ".levels: not levels of 0 to 255, descending:"),
    "level true": (put("content", "levels", [True]), ".levels: not levels of 0 to 255, descending"),
    "levels ascend": (put("content", "levels", [7, 8, 8]), ".levels: not levels of 0 to 255, desc"),
    "levels no list": (put("content", "levels", 8), ".levels: not levels of 0 to 255, descending"),
    "level too high": (
        put("content", "levels", [81]), "content.levels: 81 is too high for rows of 70 numbers",
    ),
    "two dense levels": (two_levels, ".levels: a dense delta has one, found 2"),
    "step 0": (put("content", "step", 0.0), "content.step: not a number of 1e-28 to 1e28: 0.0"),
    "step negative": (put("content", "step", -1.0), "content.step: not a number of 1e-28 to 1e28"),
    "step too large": (put("content", "step", 1.01e28), "content.step: not a number of 1e-28 to 1"),
    "step too small": (put("content", "step", 9.9e-29), "content.step: not a number of 1e-28 to 1"),
    "factors of one size": (one_size, "content: factors do not make [70]"),
    "step a word": (put("content", "step", "1"), "content.step: not a number of 1e-28 to 1e28: 1"),
    "numbers without end": (
        put("content", "levels", [9] * 1999), " bytes cannot hold the ",
    ),
    "error negative": (put("content", "error", -0.1), "content.error: not a share of 0 to 1: -0.1"),
    "error above 1": (put("content", "error", 1.5), "content.error: not a share of 0 to 1: 1.5"),
    "error true": (put("content", "error", True), "content.error: not a share of 0 to 1: True"),
    "no tensor": (put("content", "packed", "0" * 32), "content.packed: no tensor 000"),
    "source unknown": (put("style", "source", "x"), "source: is not a source of the slot: x"),
    "source of another slot": (put("style", "source", "content"), "is not a source of the slot: c"),
    "source a list": (put("style", "source", []), "style.source: is not a source of the slot: []"),
    "key no string": (put("style", "down", 3), "style.down: not a key of a file: 3"),
    "rows too few": (put("style", "rows", [[0, 69]]), "style.rows: not [first, end] of 70 rows"),
    "rows empty": (put("style", "rows", [[0, 0], [0, 70]]), "style.rows: not [first, end] of 70"),
    "rows backwards": (put("style", "rows", [[70, 0]]), "style.rows: not [first, end] of 70 rows"),
    "rows negative": (put("style", "rows", [[-70, 0]]), "style.rows: not [first, end] of 70 rows"),
    "rows no pairs": (put("style", "rows", [70]), "style.rows: not [first, end] of 70 rows in all"),
    "rows true": (put("style", "rows", [[False, 70]]), "style.rows: not [first, end] of 70 rows"),
    "reference with a tensor": (put("style", "packed", "x"), "style: has unknown keys packed; upd"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_lie_is_refused_by_name(good: Artifact, name: str, tmp_path: Path) -> None:
    change, expected = CASES[name]
    artifact = copy.deepcopy(good)
    change(artifact.document)
    with pytest.raises(ArtifactError) as caught:
        load_fusion(artifact.write(tmp_path / NAME))
    (issue,) = [i for i in caught.value.issues if "belong to no entry" not in i]
    assert expected in issue


def packed_replaced(good: Artifact, tensor: torch.Tensor) -> Artifact:
    """Another tensor for all that is packed, under its right name."""
    artifact = copy.deepcopy(good)
    del artifact.tensors[switching(artifact.document)["content"]["packed"]]
    artifact.tensors[tensor_name(tensor)] = RawTensor.of(tensor)
    for entry in artifact.document["entries"]:
        for factors in entry["factors"].values():
            if "packed" in factors:
                factors["packed"] = tensor_name(tensor)
    return artifact


def packed_of(good: Artifact) -> torch.Tensor:
    content = switching(good.document)["content"]
    return torch.tensor(list(good.tensors[content["packed"]].payload), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("wrong", "issue"),
    [
        (
            lambda packed: packed.reshape(1, -1),
            r"content.packed: shape \[1, \d+\], expected one size",
        ),
        (lambda packed: packed.half(), r"content.packed: dtype F16, expected \('U8',\)"),
        (lambda packed: packed[:9], r"9 bytes cannot hold the \d+ numbers of its slots"),
    ],
)
def test_a_packed_tensor_of_another_kind_is_refused(
    good: Artifact, wrong: Callable[[torch.Tensor], torch.Tensor], issue: str, tmp_path: Path
) -> None:
    artifact = packed_replaced(good, wrong(packed_of(good)))
    with pytest.raises(ArtifactError) as caught:
        load_fusion(artifact.write(tmp_path / NAME))
    assert [each for each in caught.value.issues if re.search(issue, each)]


def test_damaged_numbers_are_refused_at_any_check(good: Artifact, tmp_path: Path) -> None:
    packed = packed_of(good)[:-1]
    path = packed_replaced(good, packed).write(tmp_path / NAME)
    with pytest.raises(ArtifactError) as caught:
        load_fusion(path)
    assert str(caught.value) == (
        f"artifact {path}: tensor {tensor_name(packed)} is damaged: it has {len(packed)} bytes, "
        f"its numbers need {len(packed) + 1}. Get the file again."
    )


def test_the_highest_class_is_no_lie(good: Artifact, tmp_path: Path) -> None:
    """Of rows of 70 numbers it is level 80; what fails is that the bytes are others."""
    artifact = copy.deepcopy(good)
    put("content", "levels", [80])(artifact.document)
    with pytest.raises(ArtifactError, match=r"tensor \w+ is damaged: "):
        load_fusion(artifact.write(tmp_path / NAME))


def test_slots_are_packed_by_their_names(tmp_path: Path) -> None:
    """In whichever order the fusion has them."""
    plain = fusion_of_every_form()
    index = next(i for i, e in enumerate(plain.entries) if e.module.endswith(".x"))
    one, other = (up @ down for down, up in (random_pair(70, 90, 3, seed=s) for s in (1, 2)))
    slots = {"style": Stored(1.0, Dense(one)), "content": Stored(1.0, Dense(other))}
    (entry,) = compress(
        replace(plain, entries=(replace(plain.entries[index], factors=slots),)), 0.01
    ).entries
    assert list(entry.factors) == ["style", "content"]
    save_fusion(replace(plain, entries=(entry,)), tmp_path / NAME)
    (read,) = load_fusion(tmp_path / NAME).entries
    for slot, stored in entry.factors.items():
        assert torch.equal(read.factors[slot].delta.values, stored.delta.values)


@pytest.mark.parametrize(
    "change",
    [
        lambda down, up: (down, 1.01 * up),
        lambda down, up: (2**17 * down, 2**17 * up),  # on the grids, and beyond the format
        lambda down, up: (down[:2], up[:, :2]),
        lambda down, up: (down, up[:50]),
        lambda down, up: (down.half(), up.half()),
    ],
    ids=["between the points", "too large", "another rank", "another shape", "another dtype"],
)
def test_changed_factors_are_not_written(
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    tmp_path: Path,
) -> None:
    plain = fusion_of_every_form()
    index = next(i for i, e in enumerate(plain.entries) if e.fate == "switching")
    pair = plain.entries[index].factors["content"]
    delta = LowRank(*change(pair.delta.down, pair.delta.up))
    changed = replace(plain.entries[index], factors={"content": replace(pair, delta=delta)})
    entries = (*plain.entries[:index], changed, *plain.entries[index + 1 :])
    with pytest.raises(ArtifactError) as caught:
        save_fusion(replace(plain, entries=entries), tmp_path / NAME)
    assert str(caught.value) == (
        "the fusion cannot be written: compressed factors were changed; compress them again."
    )
    assert not list(tmp_path.iterdir())


def test_plain_factors_may_not_be_bytes(good: Artifact, tmp_path: Path) -> None:
    artifact = Artifact.read()
    content = switching(artifact.document)["content"]
    tensor = torch.zeros(1, 4, dtype=torch.uint8)
    del artifact.tensors[content["down"]]
    content["down"] = tensor_name(tensor)
    artifact.tensors[content["down"]] = RawTensor.of(tensor)
    with pytest.raises(ArtifactError, match=re.escape("dtype U8, expected ('F32', 'F16', 'BF16')")):
        load_fusion(artifact.write(tmp_path / NAME))


# --- packed JSON --------------------------------------------------------------------------------


def deflated(text: bytes) -> str:
    return "deflate:" + base64.b64encode(zlib.compress(text, 9)).decode()


def test_packed_json_is_that_of_the_spec(good: Artifact, tmp_path: Path) -> None:
    path = tmp_path / NAME
    save_fusion(fusion_of_every_form(), path)
    assert read_raw(path)[0]["__metadata__"] == {"klora": deflated(good.text().encode())}


def test_a_reader_takes_either(tmp_path: Path) -> None:
    golden = Artifact.read()
    packed = golden.write(tmp_path / NAME, deflated(golden.text().encode()))
    assert load_fusion(packed).fingerprint == golden_fusion().fingerprint


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("deflate:", "its compressed text is cut, or longer than 33554432 bytes"),
        ("deflate:*", "its compressed text is damaged: "),
        ("deflate:" + base64.b64encode(b"no zlib").decode(), "its compressed text is damaged: "),
        (deflated(b"{}")[:-4], "its compressed text is "),
        ("deflate:" + base64.b64encode(zlib.compress(b"{}") + b"x").decode(), "is cut, or longer"),
        (deflated(bytes(2**26)), "its compressed text is cut, or longer than 33554432 bytes"),
        (deflated("{é}".encode()), "cannot be read: 'ascii' codec"),
        (deflated(deflated(b"{}").encode()), "its JSON cannot be read: "),
    ],
)  # fmt: skip
def test_damaged_packed_json_is_refused(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        load_fusion(Artifact.read().write(tmp_path / NAME, text))
    assert why in str(caught.value)
