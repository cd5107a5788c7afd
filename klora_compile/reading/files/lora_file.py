"""LoRA files: safetensors files, adapter folders, and files of torch.save.

A file's content, not its name, decides how it is read. Pickles are loaded with ``weights_only``,
and only after a check that their zip declares no larger sizes than the file can hold.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from klora_compile.reading.files.whole_models import IP_ADAPTER, full_model
from klora_runtime.artifact.digests import file_digest
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.artifact.tensor_file import DTYPE_NAMES, TensorFile
from klora_runtime.errors import FileFormatError, LoraError, shown

#: Files of an adapter folder of PEFT or diffusers.
PEFT_CONFIG, README = "adapter_config.json", "README.md"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

#: Names of a file of diffusers' research script of LoRA, and of the configuration beside it.
_RESEARCH, _RESEARCH_CONFIG = re.compile(r"[0-9]+_lora\.pt"), "_config.json"

_MAX_TEXT_BYTES = 2**20
#: Factor and slack by which declared sizes may exceed the file's bytes.
_GROWTH, _SLACK = 4, 2**20
_LISTED = 8

#: Keys under which training scripts nest the tensors in a ``torch.save``.
_NESTING = ("state_dict", "lora", "module", "model", "network", "weights")

_PROMPT = re.compile(r"^instance_prompt:[ \t]*(.+?)[ \t]*$", re.MULTILINE)


class _Tensors(Protocol):
    """An open file of tensors."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class LoraFile:
    """An open LoRA: its tensors, and the files beside it."""

    path: Path
    """Path of the weights file."""
    size: int
    """Size in bytes."""
    metadata: Mapping[str, str]
    """Metadata of a safetensors file; empty for others."""
    config: tuple[str, str] | None
    """Text and name of its PEFT configuration, if there is one."""
    prompt: str | None
    """``instance_prompt`` in the README.md of the given folder."""
    _source: _Tensors

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name -> dtype (safetensors' name) and shape, in the file's order."""
        return self._source.tensors

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the file's dtype and new memory."""
        return self._source.tensor(name)

    @cached_property
    def sha256(self) -> str:
        """Digest of the weights file, 64 hexadecimal digits."""
        return file_digest(self.path)


@contextmanager
def open_lora(path: Path) -> Iterator[LoraFile]:
    """Open a LoRA.

    Args:
        path: a file of safetensors or ``torch.save``, or a folder that PEFT or diffusers saved.

    Raises:
        LoraError: there is no readable LoRA; also for errors while it is open.
    """
    try:
        weights = _weights(path) if path.is_dir() else path
        config = _config(weights, whole_folder=path.is_dir())
        prompt = _prompt(path) if path.is_dir() else None
        if _is_zip(weights):
            pickled = _TorchFile(weights)
            _refuse_models(weights, pickled)
            size = weights.stat().st_size
            yield LoraFile(weights, size, MappingProxyType({}), config, prompt, pickled)
            return
        with TensorFile(weights, "LoRA file") as file:
            _refuse_models(weights, file)
            yield LoraFile(weights, file.size, file.metadata, config, prompt, file)
    except LoraError:
        raise
    except FileFormatError as error:
        raise LoraError(str(error)) from error


class _TorchFile:
    """The tensors of a ``torch.save``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        size = path.stat().st_size
        _check_zip(path, size)
        try:
            with path.open("rb") as file:  # an open file: torch would decide by a path's suffix
                content = torch.load(file, map_location="cpu", weights_only=True)
        except _LOADING_ERRORS as error:
            raise _error(path, f"is not only tensors{_named_global(error)}. {_CONVERT}") from error
        self._values = _flat(path, content)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(_infos(path, self._values, size))

    def tensor(self, name: str) -> torch.Tensor:
        return self._values[name].detach().clone(memory_format=torch.contiguous_format)


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

_CONVERT = "Convert it to safetensors with the trainer that wrote it"


def named(path: Path) -> str:
    """Return how errors name a file."""
    return f"LoRA file {shown(path)}"


def _error(path: Path, problem: str, issues: list[str] | None = None) -> LoraError:
    return LoraError(f"{named(path)}: {problem}.", issues or ())


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror or error}") from error
    # No accepted safetensors file has a header of this length. Older pickles, which begin like some
    # safetensors files, are reported by the reader of those.
    return start == b"PK\x03\x04"


def _check_zip(path: Path, size: int) -> None:
    """Refuse a file that is not a zip of ``torch.save``, before loading anything."""
    try:
        whole = zipfile.is_zipfile(path)
    except _ZIP_ERRORS as error:
        raise _error(path, "is a damaged zip. Download it again") from error
    if not whole:
        raise _error(path, "is a truncated zip. Download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except _ZIP_ERRORS as error:
        raise _error(path, "is a damaged zip. Download it again") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _error(path, "is a compressed zip, which torch.save never writes; unpack it first")
    declared = sum(member.file_size for member in members)
    if declared > _GROWTH * size + _SLACK:
        raise _error(path, f"declares {declared} bytes and holds {size}; it is not loaded")


def _named_global(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f": it asks for {shown(found[1])}" if found else ""


def _flat(path: Path, content: object) -> dict[str, torch.Tensor]:
    """Return the tensors by name, without the usual level of nesting."""
    if not isinstance(content, dict):
        raise _error(path, f"holds a {type(content).__name__}, expected names and tensors")
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
        raise _error(path, f"holds values that are not tensors. {_CONVERT}", issues)
    return values


def _infos(path: Path, values: Mapping[str, torch.Tensor], size: int) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    issues = []
    position = 0
    for name, value in values.items():
        if value.layout != torch.strided or value.device.type != "cpu":
            issues.append(f"{shown(name)}: is not a dense tensor")
        elif value.dtype not in DTYPE_NAMES:
            issues.append(f"{shown(name)}: has the dtype {value.dtype}, which is not supported")
        else:
            stop = position + value.numel() * value.element_size()
            infos[name] = TensorInfo(DTYPE_NAMES[value.dtype], tuple(value.shape), position, stop)
            position = stop
    if issues:
        raise _error(path, f"has tensors that cannot be read. {_CONVERT}", issues)
    if position > _GROWTH * size + _SLACK:
        raise _error(path, f"its tensors take {position} bytes, and it holds {size}")
    return infos


def _refuse_models(path: Path, file: _Tensors) -> None:
    words = full_model(file.tensors)
    if words is not None:
        raise _error(path, f"is {words}, not a LoRA. Name the LoRA; a base model goes with --base")


def _weights(folder: Path) -> Path:
    """Return the only weights file in an adapter folder."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise _error(folder, f"cannot be read: {error.strerror or error}") from error
    known = [name for name in (*PEFT_WEIGHTS, *DIFFUSERS_WEIGHTS) if name in names]
    if len({Path(name).stem for name in known}) != 1:  # a .bin of the same name is the same file
        known = known or [name for name in names if name.endswith(".safetensors")]
        if len(known) != 1:
            found = ", ".join(shown(name) for name in names[:_LISTED]) or "nothing"
            if len(names) > _LISTED:
                found += f" and {len(names) - _LISTED} more"
            raise _error(
                folder,
                f"is a folder with {found}; expected {PEFT_WEIGHTS[0]}, {DIFFUSERS_WEIGHTS[0]} or "
                "exactly one .safetensors file. Name the file itself",
            )
    return folder / known[0]


def _config(weights: Path, *, whole_folder: bool) -> tuple[str, str] | None:
    """Return the configuration of a folder, or of a file whose name implies one."""
    if whole_folder or weights.name in PEFT_WEIGHTS:
        beside = weights.with_name(PEFT_CONFIG)
    elif _RESEARCH.fullmatch(weights.name):
        beside = weights.with_name(weights.stem + _RESEARCH_CONFIG)
    else:
        return None
    return (_text(weights, beside), beside.name) if beside.is_file() else None


def _prompt(folder: Path) -> str | None:
    readme = folder / README
    if not readme.is_file():
        return None
    try:
        text = _text(folder, readme)
    except LoraError:
        return None  # it is only a hint
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = _PROMPT.search(front)
    return None if found is None else found[1].strip("\"'") or None


def _text(path: Path, beside: Path) -> str:
    """Return the text of a small file beside a LoRA."""
    try:
        with beside.open("rb") as file:
            raw = file.read(_MAX_TEXT_BYTES + 1)
        if len(raw) > _MAX_TEXT_BYTES:
            raise _error(path, f"{beside.name} takes more than the {_MAX_TEXT_BYTES} bytes allowed")
        return raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _error(path, f"{beside.name} cannot be read: {shown(error)}") from error
