"""Tensors of safetensors files: read one by one or all at once, written, and digested.

The bytes are read into memory that torch allocated, not mapped: later changes of the file do not
change a tensor.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Collection, Mapping
from itertools import groupby
from pathlib import Path

from klora_runtime.artifact import numbers
from klora_runtime.artifact.canonical import canonical_json
from klora_runtime.artifact.dtypes import DTYPES, FLOAT8
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.artifact.memory import empty
from klora_runtime.artifact.safetensors_file import SafetensorsFile, TensorInfo
from klora_runtime.lazy_torch import torch

_ALIGNMENT = 8
_ORDER = {name: place for place, name in enumerate(DTYPES)}

#: Name of a dtype in torch -> in a file.
_IN_FILES = {dtype.in_torch: name for name, dtype in DTYPES.items()}
_FLOAT8 = frozenset(DTYPES[name].in_torch for name in FLOAT8)


class TensorFile(SafetensorsFile):
    """An open safetensors file that gives its tensors."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor called ``name``, on the CPU, in the dtype of the file."""
        info = self.tensors[name]
        data = self._data(info.start, info.stop)
        return data.view(torch_dtype(info.dtype)).view(info.shape)

    def block(
        self,
        device: torch.device,
        there: Collection[str] | None = None,
        sha256: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return all tensors by name, as views of one block of memory on a device.

        Args:
            there: names of the tensors that the device needs; the others are views of a block in
                host memory. None for all of them.
            sha256: the digest that the bytes of the whole file must have; None for any.

        Raises:
            FileFormatError: the bytes cannot be read, or their digest is another one.
        """
        from klora_runtime.devices.names import HOST  # it imports torch

        end = max((info.stop for info in self.tensors.values()), default=0)
        data = self._data(0, end)
        if sha256 is not None:
            digest = self.begun_digest()
            digest.update(memory_of(data))
            self.require_digest(sha256, digest)
        if device.type == HOST.type or there is None or all(name in there for name in self.tensors):
            return _views(data.to(device), self.tensors)
        found: dict[str, torch.Tensor] = {}
        for place, wanted in ((device, True), (HOST, False)):
            infos = {n: info for n, info in self.tensors.items() if (n in there) is wanted}
            found |= _views(*_joined(data, infos, place))
        return found

    def _data(self, start: int, stop: int) -> torch.Tensor:
        """Return a range of the data as (bytes,) uint8."""
        try:
            data = empty(stop - start, torch.uint8)
        except RuntimeError as error:  # torch's error for lack of memory
            raise self.error(f"{stop - start} bytes of it do not fit into memory") from error
        self.read_into(memory_of(data), start)
        return data


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for its name in files."""
    found: torch.dtype = getattr(torch, DTYPES[name].in_torch)
    return found


def name_in_files(dtype: torch.dtype) -> str | None:
    """Return the name of a dtype in files; None if files cannot hold it."""
    return _IN_FILES.get(_in_torch(dtype))


def dtype_of(tensor: torch.Tensor | FileTensor) -> str:
    """Return the name of a tensor's dtype in files.

    Raises:
        ValueError: files cannot hold it.
    """
    if isinstance(tensor, FileTensor):
        return tensor.dtype
    name = name_in_files(tensor.dtype)
    if name is None:
        raise ValueError(f"a tensor is {tensor.dtype}, which files cannot hold")
    return name


def identity(tensor: torch.Tensor | FileTensor) -> str:
    """Return what makes a tensor; see :func:`klora_runtime.artifact.numbers.identity`.

    Raises:
        ValueError: files cannot hold its dtype.
    """
    digest = tensor.digest if isinstance(tensor, FileTensor) else tensor_digest(tensor)
    return numbers.identity(dtype_of(tensor), tuple(tensor.shape), digest)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor | FileTensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors over an existing file; equal contents give equal bytes.

    The safetensors library needs numpy to write, orders several metadata keys by chance, and
    promises no order of tensors. Here the header's keys are sorted, and it is ASCII and padded to 8
    bytes. Tensors are sorted by dtype in the order of
    :data:`~klora_runtime.artifact.dtypes.DTYPES`, which aligns each of them, then by name.

    Raises:
        OSError: the file cannot be written.
        ValueError: files cannot hold the dtype of a tensor.
    """
    dtypes = {name: dtype_of(tensor) for name, tensor in tensors.items()}
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER[dtypes[item[0]]], item[0]))
    facts, position = [f'"__metadata__":{canonical_json(dict(metadata))}'], 0
    for name, tensor in ordered:
        stop = position + tensor.nbytes
        shape = canonical_json(list(tensor.shape))
        facts.append(
            f'{canonical_json(name)}:{{"dtype":"{dtypes[name]}","shape":{shape},'
            f'"data_offsets":[{position},{stop}]}}'
        )
        position = stop
    header = f"{{{','.join(facts)}}}".encode("ascii")
    header += b" " * (-len(header) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, tensor in ordered:
            if isinstance(tensor, FileTensor):
                file.write(tensor.data)
            else:
                data = flat_bytes(tensor)
                file.write(memory_of(data))


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order, 64 hexadecimal digits."""
    data = flat_bytes(tensor)
    return hashlib.sha256(memory_of(data)).hexdigest()


def without_float8(tensor: torch.Tensor) -> torch.Tensor:
    """Return a float8 tensor in float16, which holds all its values, and any other unchanged."""
    return tensor.half() if _in_torch(tensor.dtype) in _FLOAT8 else tensor


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return a copy of a tensor's bytes in row-major order."""
    data = flat_bytes(tensor)
    return bytes(memory_of(data))


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, without numpy and without a copy.

    It is valid only while the caller holds the tensor.
    """
    if not tensor.nbytes:
        return memoryview(bytearray())
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _in_torch(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes as a tensor on the CPU, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _joined(
    data: torch.Tensor, infos: Mapping[str, TensorInfo], device: torch.device
) -> tuple[torch.Tensor, dict[str, TensorInfo]]:
    """Return the bytes of some tensors, one after another on a device, and their new places."""
    moved, parts, position = {}, [], 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        parts.append(data[info.start : info.stop])
        moved[name] = info._replace(start=position, stop=position + info.nbytes)
        position += info.nbytes
    block = torch.cat(parts) if parts else data.new_empty(0)
    return block.to(device), moved


def _views(data: torch.Tensor, tensors: Mapping[str, TensorInfo]) -> dict[str, torch.Tensor]:
    """Return views of a file's data, and copies of misaligned tensors.

    Neighbours of one dtype are converted together.
    """
    found: dict[str, torch.Tensor] = {}
    by_place = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    for dtype, same in groupby(by_place, key=lambda item: item[1].dtype):
        names, infos = zip(*same, strict=True)
        size = DTYPES[dtype].nbytes
        part = data[infos[0].start : infos[-1].stop]
        if infos[0].start % size:
            part = part.clone()
        sizes = [info.nbytes // size for info in infos]
        values = torch.split_with_sizes(part.view(torch_dtype(dtype)), sizes)
        shaped = (value.view(info.shape) for value, info in zip(values, infos, strict=True))
        found.update(zip(names, shaped, strict=True))
    return found
