"""Safetensors files whose header is checked before anything is used.

The safetensors library checks offsets, but it accepts duplicate keys and headers of 100 MB, and its
errors do not say what to do. LoRA files and artifacts come from strangers, so only this module
opens them. Nothing here needs torch; `tensor_file` turns the bytes into tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from threading import Lock
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

from klora_runtime.artifact.canonical import parse_json
from klora_runtime.artifact.dtypes import DTYPES
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.artifact.numbers import number
from klora_runtime.errors import FileFormatError, shown

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
_MAX_COUNT = 2**48
_INFO_KEYS = frozenset({"dtype", "shape", "data_offsets"})


class TensorInfo(NamedTuple):
    """One tensor as the header describes it."""

    dtype: str
    """A key of :data:`~klora_runtime.artifact.dtypes.DTYPES`."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    stop: int
    """One past the last byte."""

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class SafetensorsFile:
    """An open safetensors file with a checked header, as a context manager; threads may share it.

    Args:
        path: the file.
        what: what errors call the file, such as ``"LoRA file"``.

    Attributes:
        path: the file.
        size: size of the whole file in bytes.
        metadata: the header's ``__metadata__``; empty if the file has none.
        tensors: name -> :class:`TensorInfo`, in the header's order.

    Raises:
        FileFormatError: the file is missing, a folder, truncated or not safetensors, or its header
            breaks the format or a limit.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = f"{what} {shown(path)}"
        self._lock = Lock()
        with ExitStack() as stack:
            self._file = stack.enter_context(self._opened())
            self.size, raw = self._read_header()
            header = self._parse(raw)
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(
                isinstance(value, str) for value in metadata.values()
            ):
                raise self.error("`__metadata__` must be an object of strings")
            self.metadata: Mapping[str, str] = MappingProxyType(metadata)
            self._head = len(raw).to_bytes(8, "little") + raw
            self._begin = len(self._head)
            self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
                self._tensor_infos(header, data_bytes=self.size - self._begin)
            )
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def read_into(self, memory: memoryview, start: int) -> None:
        """Fill ``memory`` with the bytes of the data from ``start`` on.

        Raises:
            FileFormatError: the bytes cannot be read, or the file became shorter.
        """
        try:
            with self._lock:
                self._file.seek(self._begin + start)
                while memory and (count := self._file.readinto(memory)):
                    memory = memory[count:]
        except (OSError, ValueError) as error:
            raise self.error(f"its data cannot be read: {shown(error)}") from error
        if memory:
            raise self.error("its data cannot be read: the file became shorter. Get it again")

    def read_at(self, memory: memoryview, start: int) -> None:
        """Do the same by ``pread``, which processes that share the open file do not disturb.

        Raises:
            FileFormatError: see :meth:`read_into`.
        """
        place = self._begin + start
        try:
            while memory and (count := os.preadv(self._file.fileno(), [memory], place)):
                memory, place = memory[count:], place + count
        except (OSError, ValueError) as error:
            raise self.error(f"its data cannot be read: {shown(error)}") from error
        if memory:
            raise self.error("its data cannot be read: the file became shorter. Get it again")

    def fileno(self) -> int:
        """Return the number of the open file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._open.close()

    def data(self, name: str) -> bytearray:
        """Return the bytes of a tensor.

        Raises:
            FileFormatError: see :meth:`read_into`; or they do not fit into memory.
        """
        info = self.tensors[name]
        try:
            found = bytearray(info.nbytes)
        except MemoryError as error:
            raise self.error(f"{info.nbytes} bytes of it do not fit into memory") from error
        self.read_into(memoryview(found), info.start)
        return found

    def stored(self, name: str) -> FileTensor:
        """Return a tensor as its bytes."""
        info = self.tensors[name]
        return FileTensor(info.dtype, info.shape, self.data(name))

    def begun_digest(self) -> hashlib._Hash:
        """Return the SHA-256 of all before the data, as it was read; the data is to follow."""
        return hashlib.sha256(self._head)

    def require_digest(self, sha256: str, found: hashlib._Hash) -> None:
        """Compare the digest of the bytes that were read with the file's known one.

        Raises:
            FileFormatError: they differ.
        """
        if found.hexdigest() != sha256:
            raise self.error("it changed while it was read. Read it again")

    def number(self, name: str) -> float:
        """Return the value of a tensor of one number."""
        return number(self.tensors[name].dtype, bytes(self.data(name)))

    def error(self, problem: str) -> FileFormatError:
        """Return an error about this file."""
        return FileFormatError(f"{self._what}: {problem}.")

    def _opened(self) -> FileIO:
        try:
            kind = os.stat(self.path).st_mode
            if stat.S_ISDIR(kind):
                raise self.error("is a folder; name the .safetensors file inside it")
            if not stat.S_ISREG(kind):
                raise self.error("is not a regular file; name one")
            return FileIO(self.path)  # unbuffered: a buffer could hold bytes that the file lost
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror or error}") from error

    def _read_header(self) -> tuple[int, bytes]:
        """Return the size of the file in bytes, and the header."""
        try:
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(0)
            start = self._file.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or length > max(size, MAX_HEADER_BYTES):
                raise self.error(_foreign(start, size))
            if length > size - 8:
                raise self.error(_truncated(length, size))
            if length > MAX_HEADER_BYTES:
                raise self.error(
                    f"its header takes {length} bytes, more than the {MAX_HEADER_BYTES} allowed"
                )
            return size, self._file.read(length)
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror or error}") from error

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = parse_json(raw)
            if b"\\ud" in raw or b"\\uD" in raw:
                json.dumps(header, ensure_ascii=False).encode()  # refuses half a surrogate pair
        except (ValueError, RecursionError) as error:
            raise self.error(f"its header is not valid JSON: {shown(error)}") from error
        if not isinstance(header, dict):
            raise self.error("its header is not a JSON object")
        if not raw.startswith(b"{"):
            raise self.error("its header does not begin with {")
        if len(header) > MAX_TENSORS:
            raise self.error(f"it lists {len(header)} tensors, more than {MAX_TENSORS}")
        return header

    def _tensor_infos(self, header: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
        infos = {name: self._tensor_info(name, entry) for name, entry in header.items()}
        position = 0
        by_place = sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop))
        for name, info in by_place:
            if info.start != position:
                raise self.error(
                    f"tensor {shown(name)} starts at byte {info.start} of the data, "
                    f"expected {position} (tensors may not overlap or leave gaps)"
                )
            position = info.stop
        if position != data_bytes:
            raise self.error(
                f"truncated or extended: its tensors take {position} bytes, "
                f"the file holds {data_bytes}. Download it again"
            )
        return infos

    def _tensor_info(self, name: str, entry: Any) -> TensorInfo:
        if not isinstance(entry, dict) or entry.keys() != _INFO_KEYS:
            raise self._tensor_error(name, "needs exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if type(dtype) is not str or dtype not in DTYPES:
            raise self._tensor_error(name, f"has the unknown dtype {shown(dtype)}")
        if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._tensor_error(name, f"has the invalid shape {shown(shape)}")
        if not _are_counts(offsets) or len(offsets) != 2:
            raise self._tensor_error(name, f"has invalid data_offsets {shown(offsets)}")
        start, stop = offsets
        needed = math.prod(shape) * DTYPES[dtype].nbytes
        if stop - start != needed:
            raise self._tensor_error(
                name, f"needs {needed} bytes, its data_offsets span {stop - start}"
            )
        return TensorInfo(dtype, tuple(shape), start, stop)

    def _tensor_error(self, name: str, problem: str) -> FileFormatError:
        return self.error(f"tensor {shown(name)} {problem}")


def _are_counts(values: object) -> bool:
    if type(values) is not list:
        return False
    for value in values:  # noqa: SIM110  # they are few, so a loop is faster than a generator
        if type(value) is not int or not 0 <= value < _MAX_COUNT:
            return False
    return True


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
