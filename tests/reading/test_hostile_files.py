"""Files that lie about themselves, given to both readers: an executable threat model.

Only a KloraError may come out, it says what is wrong, and no control character reaches it. What
concerns the JSON inside an artifact is in `test_hostile_artifacts`.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.lora_files import (
    GOLDEN,
    RawTensor,
    peft_keys,
    random_pair,
    read_raw,
    write_raw,
    write_tensors,
)

from klora_compile.reading.adapter import Adapter, read_adapter
from klora_runtime.artifact import safetensors_file
from klora_runtime.artifact.file import load_fusion, save_fusion
from klora_runtime.artifact.safetensors_file import MAX_HEADER_BYTES
from klora_runtime.artifact.tensor_file import TensorFile
from klora_runtime.errors import ArtifactError, FileFormatError, LoraError

READERS: dict[str, tuple[Callable[[Path], Any], type[FileFormatError]]] = {
    "artifact": (load_fusion, ArtifactError),
    "LoRA file": (read_adapter, LoraError),
}
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
#: A name that would clear a terminal, ring and forge a line of output.
EVIL = "\x1b[2J\x07\r\nall is well\u202e"


@pytest.fixture(params=READERS)
def refused(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Path], str]:
    """Reads a file that must be refused; returns the message."""
    read, kind = READERS[request.param]

    def message(path: Path) -> str:
        with pytest.raises(kind) as caught:
            read(path)
        text = str(caught.value)
        assert text.startswith(f"{request.param} ") or request.param in text
        assert all(c.isprintable() or c == "\n" for c in text), text
        assert "all is well" not in text.splitlines()
        return text

    return message


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header_text(inner: str) -> bytes:
    return f'{{"a":{inner}}}'.encode()


PLAIN = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'

#: Header (bytes as they are, or a value), and the characteristic part of the error.
HEADERS: dict[str, tuple[Any, str]] = {
    "no JSON": (b"hello world", r"its header is not valid JSON: Expecting value"),
    "half JSON": (b'{"a":', r"its header is not valid JSON: Expecting value"),
    "zero bytes": (b"\0" * 64, r"its header is not valid JSON"),
    "no bytes": (b"", r"its header is not valid JSON: Expecting value"),
    "not UTF-8": (b'{"\xff":' + PLAIN.encode() + b"}", r"not valid JSON: 'utf-8' codec can't"),
    "UTF-16": (
        json.dumps({"a": tensor()}).encode("utf-16"),
        r"not valid JSON: 'utf-8' codec can't",
    ),
    "half a character": (
        b'{"\\ud800":' + PLAIN.encode() + b"}",
        r"its header is not valid JSON: 'utf-8' codec can't encode",
    ),
    "half a character in the metadata": (
        b'{"__metadata__":{"k":"\\uDFFF"},"a":' + PLAIN.encode() + b"}",
        r"its header is not valid JSON: 'utf-8' codec can't encode",
    ),
    "space before": (b' {"a":' + PLAIN.encode() + b"}", r"its header does not begin with \{"),
    "a list": ([1, 2], r"its header is not a JSON object"),
    "a number": (7, r"its header is not a JSON object"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, r"not valid JSON: maximum recursion depth"),
    "deep objects": (b'{"a":' * 100_000, r"not valid JSON: maximum recursion depth"),
    "a key twice": (
        f'{{"a":{PLAIN},"a":{PLAIN}}}'.encode(),
        r"not valid JSON: the key a appears twice",
    ),
    "a field twice": (
        header_text('{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}'),
        r"not valid JSON: the key dtype appears twice",
    ),
    "a metadata key twice": (
        f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{PLAIN}}}'.encode(),
        r"not valid JSON: the key k appears twice",
    ),
    "NaN": (header_text('{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}'), r"NaN is not a"),
    "Infinity": (header_text('{"dtype":"F32","shape":[-Infinity]}'), r"-Infinity is not a JSON"),
    "1e400": (
        header_text('{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}'),
        r"tensor a has the invalid shape \[inf\]",
    ),
    "giant number": (
        header_text('{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}'),
        r"not valid JSON: Exceeds the limit",
    ),
    "large number": ({"a": tensor(shape=[10**30])}, r"tensor a has the invalid shape \[1000"),
    "overflowing shape": (
        {"a": tensor(shape=[2**40, 2**40])},
        rf"tensor a needs {4 * 2**80} bytes, its data_offsets span 8",
    ),
    "metadata no object": ({"__metadata__": [], "a": tensor()}, r"`__metadata__` must be an obj"),
    "metadata of numbers": (
        {"__metadata__": {"klora": 1}, "a": tensor()},
        r"`__metadata__` must be an object of strings",
    ),
    "no fields": ({"a": {}}, r"tensor a needs exactly dtype, shape and data_offsets"),
    "a field more": (
        {"a": {**tensor(), "stride": [1]}},
        r"tensor a needs exactly dtype, shape and data_offsets",
    ),
    "not an object": ({"a": "F32"}, r"tensor a needs exactly dtype, shape and data_offsets"),
    "unknown dtype": ({"a": tensor("F31")}, r"tensor a has the unknown dtype F31"),
    "dtype no string": ({"a": tensor(["F32"])}, r"tensor a has the unknown dtype \['F32'\]"),
    "evil dtype": ({"a": tensor(EVIL)}, r"unknown dtype \\x1b\[2J\\x07\\r\\nall is well\\u202e"),
    "evil name": ({EVIL: tensor("F31")}, r"tensor \\x1b\[2J\\x07\\r\\nall is well\\u202e has the"),
    "shape no list": ({"a": tensor(shape=2)}, r"tensor a has the invalid shape 2"),
    "negative shape": ({"a": tensor(shape=[-2])}, r"tensor a has the invalid shape \[-2\]"),
    "shape of booleans": ({"a": tensor(shape=[True, 2])}, r"invalid shape \[True, 2\]"),
    "nine dimensions": ({"a": tensor(shape=[1] * 8 + [2])}, r"tensor a has the invalid shape"),
    "three offsets": ({"a": tensor(offsets=[0, 4, 8])}, r"tensor a has invalid data_offsets"),
    "negative offsets": ({"a": tensor(offsets=[-8, 0])}, r"tensor a has invalid data_offsets"),
    "falling offsets": ({"a": tensor(offsets=[8, 0])}, r"needs 8 bytes, its data_offsets span -8"),
    "shape and offsets differ": (
        {"a": tensor(shape=[3])},
        r"tensor a needs 12 bytes, its data_offsets span 8",
    ),
    "offsets beyond the shape": (
        {"a": tensor(shape=[1])},
        r"tensor a needs 4 bytes, its data_offsets span 8",
    ),
    "overlap": (
        {"a": tensor(), "b": tensor(shape=[1], offsets=[4, 8])},
        r"tensor b starts at byte 4 of the data, expected 8 \(tensors may not overlap or leave",
    ),
    "gap in front": (
        {"a": tensor(shape=[1], offsets=[4, 8])},
        r"tensor a starts at byte 4 of the data, expected 0",
    ),
    "past the end": (
        {"a": tensor(shape=[4], offsets=[0, 16])},
        r"truncated or extended: its tensors take 16 bytes, the file holds 8",
    ),
    "before the end": (
        {"a": tensor(shape=[1], offsets=[0, 4])},
        r"truncated or extended: its tensors take 4 bytes, the file holds 8",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_header_is_refused(case: str, refused: Callable[[Path], str], tmp_path: Path) -> None:
    header, message = HEADERS[case]
    assert re.search(message, refused(write_raw(tmp_path / "x.safetensors", header, bytes(8))))


def test_header_beyond_the_limit_is_refused(refused: Callable[[Path], str], tmp_path: Path) -> None:
    """90 MB of header, which the safetensors library itself would parse."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((90_000_000).to_bytes(8, "little"))
        file.truncate(90_000_100)  # sparse: takes no disk
    expected = f"its header takes 90000000 bytes, more than the {MAX_HEADER_BYTES} allowed"
    assert expected in refused(path)


def test_an_empty_tensor_beside_another_is_no_overlap(tmp_path: Path) -> None:
    header = {"full": tensor(), "empty": tensor(shape=[0], offsets=[0, 0])}
    path = write_raw(tmp_path / "x.safetensors", header, bytes(8))
    with TensorFile(path, "file") as file:
        assert set(file.tensors) == {"full", "empty"}
        assert file.tensor("full").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("length", [3, 11, 2**31, 2**40, 2**63, 2**64 - 1])
def test_header_longer_than_the_file_is_refused(
    length: int, refused: Callable[[Path], str], tmp_path: Path
) -> None:
    path = write_raw(tmp_path / "x.safetensors", b"{}", length=length)
    expected = f"is truncated or not safetensors: the header should take {length} bytes"
    assert expected in refused(path)


def test_more_tensors_than_allowed_are_refused(
    refused: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "MAX_TENSORS", 3)
    header = {str(i): tensor(shape=[0], offsets=[0, 0]) for i in range(4)}
    path = write_raw(tmp_path / "x.safetensors", header)
    assert "it lists 4 tensors, more than 3" in refused(path)


def checkpoint() -> bytes:
    with io.BytesIO() as buffer:
        torch.save({"a": torch.zeros(2)}, buffer)
        return buffer.getvalue()


def old_checkpoint() -> bytes:
    with io.BytesIO() as buffer:
        torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
        return buffer.getvalue()


def archive() -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a", "b")
        return buffer.getvalue()


FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"is empty\. Download it again"),
    "one byte": (b"\x80", r"is a pickle checkpoint, which can run code"),
    "seven bytes": (b"1234567", r"truncated or not safetensors: only 7 bytes"),
    "web page": (b"<!DOCTYPE html><html>Not found</html>", r"is a web page, not a safetensors"),
    "short web page": (b"<html>", r"is a web page, not a safetensors file"),
    "pickle": (pickle.dumps({"a": list(range(99))}), r"is a pickle checkpoint, which can run code"),
    "old pickle": (old_checkpoint(), r"is a pickle checkpoint, which can run code"),
    "torch.save": (checkpoint(), r"is a pickle checkpoint, which can|1 of 1 keys cannot be used"),
    "zip": (archive(), r"is a pickle checkpoint, which can|is not only tensors"),
    "text": (b"not a LoRA at all", r"truncated or not safetensors: the header should take"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        r"is a Git LFS pointer, not the file itself\. Fetch it with git lfs pull",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_another_kind_is_named(
    case: str, refused: Callable[[Path], str], tmp_path: Path
) -> None:
    content, message = FOREIGN[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert re.search(message, refused(path))


def test_a_cut_file_whose_length_looks_like_a_pickle_is_called_truncated(
    refused: Callable[[Path], str], tmp_path: Path
) -> None:
    """A header of 0x0280 bytes begins with the first bytes of a pickle."""
    path = write_raw(tmp_path / "x.safetensors", b'{"a"', length=0x0280)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert "is truncated or not safetensors" in refused(path)


def test_a_folder_and_a_missing_file_are_named(
    refused: Callable[[Path], str], tmp_path: Path
) -> None:
    folder = r"is a folder; name the .safetensors file inside it|is a folder with nothing; expected"
    assert re.search(folder, refused(tmp_path))
    assert "cannot be read: No such file or directory" in refused(tmp_path / "none.safetensors")
    assert r"\x1b[2J" in refused(tmp_path / "\x1b[2J.safetensors")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid LoRA with an alpha."""
    tensors = peft_keys({LAYER: random_pair(6, 4, 2)}) | {f"{LAYER}.alpha": torch.tensor(1.0)}
    raw = {name: RawTensor.of(value) for name, value in tensors.items()}
    path = tmp_path_factory.mktemp("valid") / "lora.safetensors"
    config = json.dumps({"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 1.5}})
    return write_tensors(path, raw, {"lora_adapter_metadata": config, "license": "MIT"})


@pytest.fixture
def valid(request: pytest.FixtureRequest, refused: Callable[[Path], str], lora: Path) -> Path:
    """A valid file of the kind that ``refused`` reads."""
    name = request.node.callspec.params["refused"]
    return GOLDEN if name == "artifact" else lora


def test_a_file_cut_at_any_boundary_is_refused(
    valid: Path, refused: Callable[[Path], str], tmp_path: Path
) -> None:
    whole = valid.read_bytes()
    header, _ = read_raw(valid)
    start = 8 + int.from_bytes(whole[:8], "little")
    stops = [info["data_offsets"][1] for key, info in header.items() if key != "__metadata__"]
    cuts = {0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(whole) - 1}
    cuts |= {start + stop for stop in stops} | {start + stop - 1 for stop in stops}
    path = tmp_path / "cut.safetensors"
    for cut in sorted(cuts - {len(whole)}):
        path.write_bytes(whole[:cut])
        assert re.search("truncated|is empty|is a pickle", refused(path)), cut


@pytest.mark.parametrize("tail", [b"\0", b"\n", b"x" * 4096])
def test_bytes_after_the_end_are_refused(
    tail: bytes, valid: Path, refused: Callable[[Path], str], tmp_path: Path
) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(valid.read_bytes() + tail)
    assert "truncated or extended: its tensors take" in refused(path)


def test_an_artifact_is_no_lora_and_a_lora_no_artifact(lora: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a klora artifact: expected exactly the meta"):
        load_fusion(lora)
    with pytest.raises(LoraError, match="is a klora artifact already"):
        read_adapter(GOLDEN)


def mutated(whole: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """``whole`` with stretches replaced; positions wrap around."""
    data = bytearray(whole)
    for place, length, new in edits:
        begin = place % (len(data) + 1)
        data[begin : begin + length] = new
    return bytes(data)


EDITS = st.lists(
    st.tuples(st.integers(0, 2**20), st.integers(0, 8), st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)
TOKENS = st.sampled_from(
    [b"NaN", b"1e400", b"-1", b"[]", b"{}", b"null", b'""', b"\\u0000", b"\xff", b"9" * 30, b"0.5"]
)
JSON_EDITS = st.lists(
    st.tuples(st.integers(8, 4000), st.integers(0, 8), TOKENS), min_size=1, max_size=2
)
few = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def outcome(read: Callable[[Path], Any], path: Path, content: bytes) -> Any:
    """What ``read`` makes of ``content``, or the error's text; other errors pass through."""
    path.write_bytes(content)
    try:
        return read(path)
    except FileFormatError as error:
        return str(error)


def printable(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


@few
@given(edits=EDITS | JSON_EDITS)
@example(edits=[(0, 0, b"")])
def test_a_mutated_artifact_gives_an_error_or_the_same_fusion(
    edits: list[tuple[int, int, bytes]], tmp_path: Path
) -> None:
    golden = GOLDEN.read_bytes()
    read = partial(load_fusion, check="full")
    result = outcome(read, tmp_path / "x.klora.safetensors", mutated(golden, edits))
    if isinstance(result, str):
        assert printable(result)
        assert "artifact " in result
    else:  # nothing but the padding of the header is without a digest
        save_fusion(result, tmp_path / "again", overwrite=True)
        assert (tmp_path / "again").read_bytes() == golden


@few
@given(edits=EDITS | JSON_EDITS)
@example(edits=[(0, 0, b"")])
def test_a_mutated_lora_gives_an_error_or_a_finite_adapter(
    edits: list[tuple[int, int, bytes]], lora: Path, tmp_path: Path
) -> None:
    result = outcome(read_adapter, tmp_path / "x.safetensors", mutated(lora.read_bytes(), edits))
    if isinstance(result, str):
        assert printable(result)
        assert "LoRA file " in result
    else:
        assert isinstance(result, Adapter)
        for layer in result.layers.values():
            assert layer.up.shape[1] == layer.down.shape[0] == layer.rank > 0
            assert math.isfinite(layer.scaling)
            assert torch.isfinite(layer.down).all()
