"""LoRA files and artifacts written by hand: valid ones, and ones that no library would write."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tiny.klora.safetensors"
SHARED_DATA = Path(os.environ.get("KLORA_SHARED_DATA") or ROOT.parent / "shared" / "data")
#: Key lists of real files: key -> shape.
FORMATS = SHARED_DATA / "formats"

METADATA = "__metadata__"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint8: "U8",
}

needs_real_loras = pytest.mark.skipif(
    not (SHARED_DATA / "loras").is_dir(),
    reason="the real LoRA files are not here (shared/data, or KLORA_SHARED_DATA)",
)
needs_decisions = pytest.mark.skipif(
    not (SHARED_DATA / "decisions").is_dir(),
    reason="the reference decisions are not here (shared/data, or KLORA_SHARED_DATA)",
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device here"
)


def real_lora(name: str) -> Path:
    """A real LoRA file, such as ``sd2_character.peft``."""
    return SHARED_DATA / "loras" / f"{name}.safetensors"


def random_pair(
    out: int,
    width: int,
    rank: int,
    *,
    seed: int = 0,
    kernel: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Down and up with random values; ``kernel`` makes them a convolution's."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, *kernel, generator=generator)
    up = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
    return down.to(dtype), up.to(dtype)


def peft_keys(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Layer name -> (down, up), as the tensors of a file in diffusers/PEFT keys."""
    tensors = {}
    for name, (down, up) in pairs.items():
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = up
    return tensors


def write_lora(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write tensors under any names; ``metadata`` becomes ``lora_adapter_metadata``."""
    extra = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(dict(tensors), str(path), metadata=extra)
    return path


@dataclass
class RawTensor:
    """One tensor as it lies in a file."""

    dtype: str
    shape: list[int]
    payload: bytes

    @classmethod
    def of(cls, tensor: torch.Tensor) -> RawTensor:
        plain = tensor.contiguous().reshape(-1).view(torch.uint8)
        return cls(DTYPES[tensor.dtype], list(tensor.shape), plain.numpy().tobytes())


def write_raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header: bytes as they are, anything else as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(raw) if length is None else length
    path.write_bytes(stated.to_bytes(8, "little") + raw + data)
    return path


def write_tensors(
    path: Path, tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """A valid safetensors file around any tensors, in the order given."""
    header: dict[str, Any] = {} if metadata is None else {METADATA: dict(metadata)}
    data = b""
    for name, tensor in tensors.items():
        place = [len(data), len(data) + len(tensor.payload)]
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
        data += tensor.payload
    return write_raw(path, header, data)


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


@dataclass
class Artifact:
    """An artifact taken apart, to be changed and put together again as a consistent file."""

    document: dict[str, Any]
    """The JSON under ``fusion``."""
    tensors: dict[str, RawTensor]

    @classmethod
    def read(cls, path: Path = GOLDEN) -> Artifact:
        header, data = read_raw(path)
        outer = json.loads(inflated(header.pop(METADATA)["klora"]))
        tensors = {
            name: RawTensor(info["dtype"], info["shape"], data[slice(*info["data_offsets"])])
            for name, info in header.items()
        }
        return cls(outer["fusion"], tensors)

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """Layer name -> entry."""
        return {f"{e['component']}.{e['module']}": e for e in self.document["entries"]}

    def text(self) -> str:
        """The metadata value, its digest right again."""
        inner = canonical(self.document)
        digest = hashlib.sha256(inner.encode()).hexdigest()
        return f'{{"digest":"{digest}","fusion":{inner}}}'

    def write(self, path: Path, text: str | None = None) -> Path:
        """The file, with a right digest unless ``text`` replaces the JSON."""
        value = self.text() if text is None else text
        return write_tensors(path, self.tensors, {"klora": value})


def inflated(text: str) -> str:
    """A metadata value as JSON, whether it is compressed or not."""
    kind, colon, packed = text.partition("deflate:")
    return zlib.decompress(base64.b64decode(packed)).decode() if colon and not kind else text


def canonical(value: object) -> str:
    """Canonical JSON as FORMAT.md defines it; NaN passes, for tests of the reader."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def run_python(code: str, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new process that sees the packages and this folder."""
    paths = [ROOT, ROOT / "runtime", ROOT / "tests", ROOT / "examples"]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def smaller(shape: list[int]) -> list[int]:
    """A sixteenth of widths and ranks, kernels as they are."""
    return [max(1, size // 16) if size > 3 else size for size in shape]
