"""Tensors of safetensors files: read and written as the safetensors library reads and writes."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.lora_files import GOLDEN, ROOT, run_python, write_raw

from klora_runtime.artifact.dtypes import DTYPES
from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.artifact.tensor_file import (
    TensorFile,
    bytes_of,
    memory_of,
    name_in_files,
    tensor_digest,
    torch_dtype,
    write_tensors,
)
from klora_runtime.errors import FileFormatError

SHAPES = {"matrix": (2, 3), "empty": (0, 4), "scalar": (), "row": (5,)}


def every_dtype() -> dict[str, torch.Tensor]:
    """Tensors of every dtype and several shapes, their names in no order."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{shape}.{name}": torch.randint(
            0, 2, (*SHAPES[shape], dtype.itemsize), generator=generator, dtype=torch.uint8
        )
        .view(dtype)
        .reshape(SHAPES[shape])
        for name, dtype in reversed([(name, torch_dtype(name)) for name in DTYPES])
        for shape in SHAPES
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the safetensors library with every dtype."""
    save_file(every_dtype(), tmp_path / "a.safetensors", metadata={"made by": 'the "library" ✓'})
    return tmp_path / "a.safetensors"


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(
        tensor.dtype == expected[name].dtype
        and tensor.shape == expected[name].shape
        and bytes_of(tensor) == bytes_of(expected[name])
        for name, tensor in found.items()
    )


def test_every_dtype_is_read(path: Path) -> None:
    with TensorFile(path, "file") as file:
        assert dict(file.metadata) == {"made by": 'the "library" ✓'}
        assert equal({name: file.tensor(name) for name in file.tensors}, every_dtype())
        assert equal(file.block(torch.device("cpu")), every_dtype())


def test_what_is_written_is_what_the_library_writes(path: Path, tmp_path: Path) -> None:
    """Of one metadata key: of several it orders them by chance."""
    written = tmp_path / "b.safetensors"
    metadata = {"a": 'plain "text" with a \\ and a\nline'}
    write_tensors(written, every_dtype(), metadata)
    save_file(every_dtype(), path, metadata=metadata)
    assert written.read_bytes() == path.read_bytes()
    assert equal(load_file(written), every_dtype())


def test_several_metadata_keys_have_one_order(tmp_path: Path) -> None:
    for name, keys in (("a", "xyz"), ("b", "zyx")):
        write_tensors(tmp_path / name, {}, dict.fromkeys(keys, "✓"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with SafetensorsFile(tmp_path / "a", "file") as file:
        assert dict(file.metadata) == dict.fromkeys("xyz", "✓")


def test_any_layout_in_memory_is_written_row_by_row(tmp_path: Path) -> None:
    plain = torch.arange(24.0).reshape(2, 3, 4)
    turned = plain.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    assert not turned.is_contiguous()
    write_tensors(tmp_path / "a", {"a": turned}, {})
    assert torch.equal(load_file(tmp_path / "a")["a"], plain)
    assert tensor_digest(turned) == tensor_digest(plain)


def test_what_was_read_stays(path: Path) -> None:
    with TensorFile(path, "file") as file:
        one, other = file.tensor("matrix.F32"), file.tensor("matrix.F32")
        path.write_bytes(b"\0" * path.stat().st_size)
        other.zero_()
    assert bytes_of(one) == bytes_of(every_dtype()["matrix.F32"]) != bytes_of(other)


def test_a_file_that_is_replaced_while_it_is_open_is_still_read(path: Path) -> None:
    with TensorFile(path, "file") as file:
        path.with_name("new").write_bytes(b"\0" * path.stat().st_size)
        path.with_name("new").replace(path)
        assert equal(file.block(torch.device("cpu")), every_dtype())


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_tensors(path, {"a": torch.zeros(100_000)}, {})
    with TensorFile(path, "LoRA file") as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FileFormatError) as caught:
            file.tensor("a")
    assert str(caught.value) == (
        f"LoRA file {path}: its data cannot be read: the file became shorter. Get it again."
    )


def test_a_file_larger_than_memory(tmp_path: Path) -> None:
    """A sparse file: 8 TB that nobody has."""
    size = 2**43
    info = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    path = write_raw(tmp_path / "a", info)
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        pytest.skip("no file here may be as large")
    with TensorFile(path, "file") as file, pytest.raises(FileFormatError) as caught:
        file.tensor("a")
    assert str(caught.value) == f"file {path}: {size} bytes of it do not fit into memory."


def test_many_threads_read_one_file(tmp_path: Path) -> None:
    tensors = {str(i): torch.full((1000,), i) for i in range(50)}
    write_tensors(tmp_path / "a", tensors, {})
    with TensorFile(tmp_path / "a", "file") as file, ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert equal(dict(zip(tensors, pool.map(file.tensor, tensors), strict=True)), tensors)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="pipe: is not a regular file; name one"):
        SafetensorsFile(tmp_path / "pipe", "file")


def test_the_memory_of_a_tensor_is_its_own() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.int16)
    memory_of(tensor)[2] = 1
    assert tensor.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert bytes(memory_of(torch.empty(0))) == b""


def test_names_of_dtypes_are_torchs() -> None:
    for name in DTYPES:
        dtype = torch_dtype(name)
        assert name_in_files(dtype) == name
        assert dtype.itemsize == DTYPES[name].nbytes
        assert str(dtype) == f"torch.{DTYPES[name].in_torch}"
    assert name_in_files(torch.complex64) is None


def test_there_is_one_table_of_dtypes() -> None:
    """Outside of it no file has a name that every such table needs."""
    rare = re.compile(r"\"BF16\"|F8_E4M3|float8_e[45]m|torch\.bfloat16")
    sources = [*(ROOT / "klora_compile").rglob("*.py"), *(ROOT / "runtime").rglob("*.py")]
    found = {path.name for path in sources if rare.search(path.read_text())}
    assert found == {"dtypes.py"}


def test_artifacts_are_read_and_written_without_numpy(tmp_path: Path) -> None:
    code = (
        "import sys, warnings\n"
        "sys.modules['numpy'] = None\n"
        "warnings.simplefilter('ignore')  # torch's, that numpy is not there\n"
        "from klora_runtime import load_fusion, save_fusion\n"
        "save_fusion(load_fusion(sys.argv[1], check='full'), sys.argv[2])\n"
    )
    result = run_python(code, GOLDEN, tmp_path / "again")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again").read_bytes() == GOLDEN.read_bytes()
