"""The files of a store: arrays of numbers with a JSON beside them, and a digest over both.

They are safetensors files, written in one step and read without torch. Every reader sees a whole
file or none, so several processes may write to one store.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora_runtime.artifact.canonical import canonical_json, parse_json
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.artifact.replacing import replacing
from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.artifact.tensor_file import write_tensors
from klora_runtime.errors import FileFormatError

#: The one metadata key.
_KEY = "klora_profile"

#: Code in struct of a dtype in files.
_CODES = {"F64": "d", "I64": "q"}


@dataclass(frozen=True)
class Rows:
    """A matrix of float64 or int64 as rows."""

    dtype: str
    """``F64`` or ``I64``."""
    rows: Sequence[Sequence[float]]
    """All of one length."""


def write_numbers(path: Path, facts: object, arrays: Mapping[str, Rows]) -> None:
    """Write a file, completely or not at all.

    Raises:
        KloraError: it cannot be written.
    """
    tensors = {}
    for name, array in arrays.items():
        width = len(array.rows[0]) if array.rows else 0
        flat = [value for row in array.rows for value in row]
        data = bytearray(struct.pack(f"<{len(flat)}{_CODES[array.dtype]}", *flat))
        tensors[name] = FileTensor(array.dtype, (len(array.rows), width), data)
    inner = canonical_json(facts)
    digest = _digest(inner, {name: tensor.data for name, tensor in tensors.items()})
    text = canonical_json({"digest": digest, "facts": inner})
    with replacing(path, overwrite=True) as new:
        write_tensors(new, tensors, {_KEY: text})


def read_numbers(path: Path) -> tuple[Any, dict[str, list[Sequence[Any]]]]:
    """Return the JSON of a file and its matrices as rows.

    Raises:
        FileNotFoundError: there is no file.
        FileFormatError: it is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    with SafetensorsFile(path, "profile") as file:
        try:
            outer = parse_json(file.metadata[_KEY])
            inner, stated = outer["facts"], outer["digest"]
            data = {name: file.data(name) for name in file.tensors}
            if stated != _digest(inner, data):
                raise ValueError("its digest differs")
            found: dict[str, list[Sequence[Any]]] = {}
            for name, info in file.tensors.items():
                count, width = info.shape
                values = struct.unpack(f"<{count * width}{_CODES[info.dtype]}", data[name])
                found[name] = [values[row * width : (row + 1) * width] for row in range(count)]
            return parse_json(inner), found
        except (KeyError, ValueError, TypeError, RecursionError, struct.error) as error:
            raise FileFormatError(f"{path} is damaged: {error}.") from error


def _digest(inner: str, data: Mapping[str, bytes | bytearray]) -> str:
    found = hashlib.sha256(inner.encode())
    for name in sorted(data):
        found.update(f"\n{name}\n".encode())
        found.update(data[name])
    return found.hexdigest()
