"""The border to the file system: a safetensors file, its header checked before anything is used.

The safetensors library checks offsets, but accepts duplicate keys and headers of 100 MB, and
its errors do not say what to do. LoRA files and artifacts come from strangers, so both are
opened here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from klora_runtime.errors import FileFormatError, shown

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
_INFO_KEYS = frozenset({"dtype", "shape", "data_offsets"})

#: safetensors dtype names -> bytes per element; other names are refused.
DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
        "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    }
)  # fmt: skip

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
        "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor."""

    dtype: str
    """safetensors dtype name, a key of :data:`DTYPE_BYTES`."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    stop: int
    """One past the last byte."""


class SafetensorsFile:
    """An open safetensors file whose header has been checked. Use it as a context manager.

    Args:
        path: the file.
        what: how to name the file in errors, such as ``"LoRA file"``.

    Attributes:
        path: the file.
        size: bytes of the whole file.
        metadata: the header's ``__metadata__``, empty where the file has none.
        tensors: name -> :class:`TensorInfo`, in the header's order.

    Raises:
        FileFormatError: the file is missing, a folder, truncated, not safetensors, or its
            header breaks a limit or the format.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = f"{what} {shown(path)}"
        self.size, raw = self._read_header()
        header = self._parse(raw)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._error("`__metadata__` must be an object of strings")
        self.metadata: Mapping[str, str] = MappingProxyType(metadata)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            self._tensor_infos(header, data_bytes=self.size - 8 - len(raw))
        )
        try:
            self._file: Any = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._error(f"safetensors refuses it: {shown(error)}") from error

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called ``name``, on the CPU, in the dtype of the file, in memory of its own:
        whatever happens to the file afterwards, it stays what was read."""
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._error(f"tensor {shown(name)}: {shown(error)}") from error
        return tensor.clone()

    def block(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Every tensor by name, as views of one block of memory on a device.

        The file is mapped and its data are copied, or sent to the device, in one piece; afterwards
        the file is not needed any more.
        """
        begin = self.size - max((info.stop for info in self.tensors.values()), default=0)
        try:
            mapped = torch.from_file(
                str(self.path), shared=False, size=self.size, dtype=torch.uint8, device="cpu"
            )
            data = mapped[begin:].to(device, copy=True)
        except (RuntimeError, OSError) as error:
            raise self._error(f"its data cannot be read: {shown(error)}") from error
        return _views(data, self.tensors)

    def _error(self, problem: str) -> FileFormatError:
        return FileFormatError(f"{self._what}: {problem}.")

    def _read_header(self) -> tuple[int, bytes]:
        """Bytes of the file, and of its header."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                start = file.read(8)
                length = int.from_bytes(start, "little")
                if size < 8 or length > max(size, MAX_HEADER_BYTES):
                    raise self._error(_foreign(start, size))
                if length > size - 8:
                    raise self._error(_truncated(length, size))
                if length > MAX_HEADER_BYTES:
                    raise self._error(
                        f"its header takes {length} bytes, more than the {MAX_HEADER_BYTES} allowed"
                    )
                raw = file.read(length)
        except IsADirectoryError as error:
            raise self._error("is a folder; name the .safetensors file inside it") from error
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror or error}") from error
        return size, raw

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = parse_json(raw)
        except (ValueError, RecursionError) as error:
            raise self._error(f"its header is not valid JSON: {shown(error)}") from error
        if not isinstance(header, dict):
            raise self._error("its header is not a JSON object")
        if len(header) > MAX_TENSORS:
            raise self._error(f"it lists {len(header)} tensors, more than {MAX_TENSORS}")
        return header

    def _tensor_infos(self, header: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
        infos = {name: self._tensor_info(name, entry) for name, entry in header.items()}
        position = 0
        for name, info in _by_place(infos):
            if info.start != position:
                raise self._error(
                    f"tensor {shown(name)} starts at byte {info.start} of the data, "
                    f"expected {position} (tensors may not overlap or leave gaps)"
                )
            position = info.stop
        if position != data_bytes:
            raise self._error(
                f"truncated or extended: its tensors take {position} bytes, "
                f"the file holds {data_bytes}. Download it again"
            )
        return infos

    def _tensor_info(self, name: str, entry: Any) -> TensorInfo:
        if not isinstance(entry, dict) or entry.keys() != _INFO_KEYS:
            raise self._tensor_error(name, "needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise self._tensor_error(name, f"has the unknown dtype {shown(dtype)}")
        if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._tensor_error(name, f"has the invalid shape {shown(shape)}")
        if not _are_counts(offsets) or len(offsets) != 2:
            raise self._tensor_error(name, f"has invalid data_offsets {shown(offsets)}")
        start, stop = offsets
        needed = math.prod(shape) * DTYPE_BYTES[dtype]
        if stop - start != needed:
            raise self._tensor_error(
                name, f"needs {needed} bytes, its data_offsets span {stop - start}"
            )
        return TensorInfo(dtype, tuple(shape), start, stop)

    def _tensor_error(self, name: str, problem: str) -> FileFormatError:
        return self._error(f"tensor {shown(name)} {problem}")


def _by_place(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    return sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))


def _views(data: torch.Tensor, tensors: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """The tensors in a file's data, neighbours of one dtype at once; copies of those that begin at
    an address that their dtype cannot have."""
    found: dict[str, torch.Tensor] = {}
    for dtype, same in groupby(_by_place(tensors), key=lambda item: item[1].dtype):
        names, infos = zip(*same, strict=True)
        size = DTYPE_BYTES[dtype]
        part = data[infos[0].start : infos[-1].stop]
        if infos[0].start % size:
            part = part.clone()
        sizes = [(info.stop - info.start) // size for info in infos]
        values = torch.split_with_sizes(part.view(_DTYPES[dtype]), sizes)
        shaped = (value.view(info.shape) for value, info in zip(values, infos, strict=True))
        found.update(zip(names, shaped, strict=True))
    return found


def parse_json(raw: bytes | str, *, canonical: bool = False) -> Any:
    """JSON without what the standard parser lets pass: duplicate keys, NaN and Infinity.

    Args:
        canonical: duplicate keys pass, for the caller compares the text with what
            :func:`canonical_json` makes of the result, which has each key once.

    Raises:
        ValueError: also for the cases above and for bytes that are not UTF-8.
        RecursionError: nested too deeply.
    """
    text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
    hook = None if canonical else _unique
    return json.loads(text, object_pairs_hook=hook, parse_constant=_no_constant)


def canonical_json(value: object) -> str:
    """The one way to write ``value``: sorted keys, no spaces, ASCII, shortest round-trip floats."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the tensor's bytes in row-major order, as 64 hexadecimal digits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(double)} appears twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _are_counts(values: object) -> bool:
    if not isinstance(values, list) or not {*map(type, values)} <= {int}:
        return False
    return not values or (min(values) >= 0 and max(values) < 2**48)


def _foreign(start: bytes, size: int) -> str:
    if size == 0:
        return "is empty. Download it again"
    if start[:1] == b"<":
        return "is a web page, not a safetensors file. Download the file itself"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "is a pickle checkpoint, which can run code when loaded. Convert it to safetensors"
    if start == b"version ":
        return "is a Git LFS pointer, not the file itself. Fetch it with git lfs pull"
    if size < 8:
        return f"is truncated or not safetensors: only {size} bytes. Download it again"
    return _truncated(int.from_bytes(start, "little"), size)


def _truncated(length: int, size: int) -> str:
    return (
        f"is truncated or not safetensors: the header should take {length} bytes, "
        f"the file has {size - 8} after the first 8. Download it again"
    )
