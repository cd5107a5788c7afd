"""The dtypes of tensors in files: one table for reading and writing. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Dtype:
    """A dtype of safetensors that klora reads or writes; it refuses others."""

    name: str
    """Name in the header of a file."""
    in_torch: str
    """Name in torch."""
    nbytes: int
    """Bytes per number."""


#: Name in a file -> dtype, in the order of tensors in a file.
DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            Dtype("I64", "int64", 8),
            Dtype("F64", "float64", 8),
            Dtype("F32", "float32", 4),
            Dtype("I32", "int32", 4),
            Dtype("BF16", "bfloat16", 2),
            Dtype("F16", "float16", 2),
            Dtype("I16", "int16", 2),
            Dtype("F8_E4M3", "float8_e4m3fn", 1),
            Dtype("F8_E5M2", "float8_e5m2", 1),
            Dtype("I8", "int8", 1),
            Dtype("U8", "uint8", 1),
            Dtype("BOOL", "bool", 1),
        )
    }
)

#: Dtypes of factors in artifacts, and of products.
REAL = ("F32", "F16", "BF16")

#: Dtypes that are read as float16, which holds all their values exactly.
FLOAT8 = ("F8_E4M3", "F8_E5M2")
