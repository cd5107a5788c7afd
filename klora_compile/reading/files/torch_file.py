"""Files of torch.save, which are pickles in a zip.

They are loaded with ``weights_only``, and only after a check that their zip declares no larger
sizes than the file can hold.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from klora_compile.reading.files.refusals import refused
from klora_compile.reading.files.whole_models import IP_ADAPTER
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.artifact.tensor_file import name_in_files
from klora_runtime.errors import shown
from klora_runtime.lazy_torch import torch

#: Factor and slack by which declared sizes may exceed the file's bytes.
_GROWTH, _SLACK = 4, 2**20
#: Keys under which training scripts nest the tensors in a ``torch.save``.
_NESTING = ("state_dict", "lora", "module", "model", "network", "weights")

_CONVERT = "Convert it to safetensors with the trainer that wrote it"


#: Errors of zipfile for a damaged or hostile file.
_ZIP_ERRORS = (
    zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError,
    EOFError, KeyError, IndexError,
)  # fmt: skip

#: Errors of torch.load for a damaged or hostile file, besides the refusal itself.
_LOADING_ERRORS = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, AttributeError,
    IndexError, EOFError, OSError, RecursionError, AssertionError, MemoryError, OverflowError,
    struct.error,
)  # fmt: skip


class TorchFile:
    """The tensors of a ``torch.save``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        size = path.stat().st_size
        _check_zip(path, size)
        try:
            with path.open("rb") as file:  # an open file: torch would decide by a path's suffix
                content = torch.load(file, map_location="cpu", weights_only=True)
        except _LOADING_ERRORS as error:
            raise refused(path, f"is not only tensors{_named_global(error)}. {_CONVERT}") from error
        self._values = _flat(path, content)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_infos(path, self._values, size))

    def number(self, name: str) -> float:
        """Return the value of a tensor of one number."""
        return float(self._values[name])

    def stored(self, name: str) -> None:
        """Return None: torch has read the tensors already."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor in new memory."""
        return self._values[name].detach().clone(memory_format=torch.contiguous_format)


def _check_zip(path: Path, size: int) -> None:
    """Refuse a file that is not a zip of ``torch.save``, before loading anything."""
    try:
        whole = zipfile.is_zipfile(path)
    except _ZIP_ERRORS as error:
        raise refused(path, "is a damaged zip. Download it again") from error
    if not whole:
        raise refused(path, "is a truncated zip. Download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except _ZIP_ERRORS as error:
        raise refused(path, "is a damaged zip. Download it again") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise refused(path, "is a compressed zip, which torch.save never writes; unpack it first")
    declared = sum(member.file_size for member in members)
    if declared > _GROWTH * size + _SLACK:
        raise refused(path, f"declares {declared} bytes and holds {size}; it is not loaded")


def _named_global(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f": it asks for {shown(found[1])}" if found else ""


def _flat(path: Path, content: object) -> dict[str, torch.Tensor]:
    """Return the tensors by name, without the usual level of nesting."""
    if not isinstance(content, dict):
        raise refused(path, f"holds a {type(content).__name__}, expected names and tensors")
    if not any(isinstance(value, torch.Tensor) for value in content.values()):
        nested = [v for key in _NESTING if isinstance(v := content.get(key), dict)]
        if len(nested) == 1:
            content = nested[0]
        parts = [(key, v) for key in IP_ADAPTER if isinstance(v := content.get(key), dict)]
        if parts:
            content = {f"{key}.{name}": v for key, part in parts for name, v in part.items()}
    values: dict[str, torch.Tensor] = {}
    issues = []
    named: Mapping[Any, object] = content
    for key, value in named.items():
        if not isinstance(key, str):
            issues.append(f"{shown(key)}: is a {type(key).__name__}, expected a name")
        elif isinstance(value, torch.Tensor):
            values[key] = value
        elif key.endswith(".alpha") and isinstance(value, int | float) and abs(value) < 1e38:
            values[key] = torch.tensor(float(value))
        else:
            issues.append(f"{shown(key)}: is a {type(value).__name__}, expected a tensor")
    if issues:
        raise refused(path, f"holds values that are not tensors. {_CONVERT}", issues)
    return values


def _infos(path: Path, values: Mapping[str, torch.Tensor], size: int) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    issues = []
    position = 0
    for name, value in values.items():
        if value.layout != torch.strided or value.device.type != "cpu":
            issues.append(f"{shown(name)}: is not a dense tensor")
        elif (dtype := name_in_files(value.dtype)) is None:
            issues.append(f"{shown(name)}: has the dtype {value.dtype}, which is not supported")
        else:
            stop = position + value.numel() * value.element_size()
            infos[name] = TensorInfo(dtype, tuple(value.shape), position, stop)
            position = stop
    if issues:
        raise refused(path, f"has tensors that cannot be read. {_CONVERT}", issues)
    if position > _GROWTH * size + _SLACK:
        raise refused(path, f"its tensors take {position} bytes, and it holds {size}")
    return infos
