"""LoRA files: safetensors files, adapter folders, and files of torch.save.

A file's content, not its name, decides how it is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from klora_compile.reading.files.refusals import refused
from klora_compile.reading.files.torch_file import TorchFile
from klora_compile.reading.files.whole_models import full_model
from klora_runtime.artifact.digests import file_digest
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.artifact.tensor_file import TensorFile
from klora_runtime.errors import FileFormatError, LoraError, shown
from klora_runtime.lazy_torch import torch

#: Files of an adapter folder of PEFT or diffusers.
PEFT_CONFIG, README = "adapter_config.json", "README.md"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")

#: Names of a file of diffusers' research script of LoRA, and of the configuration beside it.
_RESEARCH, _RESEARCH_CONFIG = re.compile(r"[0-9]+_lora\.pt"), "_config.json"

_MAX_TEXT_BYTES = 2**20
_LISTED = 8

_PROMPT = re.compile(r"^instance_prompt:[ \t]*(.+?)[ \t]*$", re.MULTILINE)


class _Tensors(Protocol):
    """An open file of tensors."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def number(self, name: str) -> float: ...

    def stored(self, name: str) -> FileTensor | None: ...

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

    def number(self, name: str) -> float:
        """Return the value of a tensor of one number; this needs no torch for safetensors."""
        return self._source.number(name)

    def stored(self, name: str) -> FileTensor | None:
        """Return one tensor as its bytes; None if torch has read it."""
        return self._source.stored(name)

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
            pickled = TorchFile(weights)
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


def _is_zip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise refused(path, f"cannot be read: {error.strerror or error}") from error
    # No accepted safetensors file has a header of this length. Older pickles, which begin like some
    # safetensors files, are reported by the reader of those.
    return start == b"PK\x03\x04"


def _refuse_models(path: Path, file: _Tensors) -> None:
    words = full_model(file.tensors)
    if words is not None:
        raise refused(path, f"is {words}, not a LoRA. Name the LoRA; a base model goes with --base")


def _weights(folder: Path) -> Path:
    """Return the only weights file in an adapter folder."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise refused(folder, f"cannot be read: {error.strerror or error}") from error
    known = [name for name in (*PEFT_WEIGHTS, *DIFFUSERS_WEIGHTS) if name in names]
    if len({Path(name).stem for name in known}) != 1:  # a .bin of the same name is the same file
        known = known or [name for name in names if name.endswith(".safetensors")]
        if len(known) != 1:
            found = ", ".join(shown(name) for name in names[:_LISTED]) or "nothing"
            if len(names) > _LISTED:
                found += f" and {len(names) - _LISTED} more"
            raise refused(
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
            raise refused(
                path, f"{beside.name} takes more than the {_MAX_TEXT_BYTES} bytes allowed"
            )
        return raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise refused(path, f"{beside.name} cannot be read: {shown(error)}") from error
