"""A safetensors file whose bytes follow from its contents.

The safetensors library writes metadata of several keys in the order of a hash map, another one in
each process; tools look for several keys. So the header is written here: metadata and tensors by
name, the tensors of wider dtypes first so that each is aligned, the header padded to 8 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from klora_runtime.artifact.safetensors_file import canonical_json

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


def write_plain_file(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> int:
    """Write tensors of float32, float16 or bfloat16 over an existing file.

    Returns:
        Bytes written.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    infos, position = [], 0
    for name, tensor in ordered:
        stop = position + tensor.nbytes
        facts = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        infos.append(f"{canonical_json(name)}:{canonical_json(facts)}")
        position = stop
    text = ",".join([f'"__metadata__":{canonical_json(dict(metadata))}', *infos])
    header = f"{{{text}}}".encode("ascii")
    header += b" " * (-len(header) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, tensor in ordered:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return 8 + len(header) + position
