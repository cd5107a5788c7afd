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
    code: str = ""
    """Code of a number in struct, which may have more bytes; empty if struct has none."""
    exponent: int = 0
    """Bits of a float's exponent; 0 if the dtype has no infinity, or no artifact has it."""


#: Name in a file -> dtype, in the order of tensors in a file.
DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        dtype.name: dtype
        for dtype in (
            Dtype("I64", "int64", 8, "<q"),
            Dtype("F64", "float64", 8, "<d", 0x7FF0 << 48),
            Dtype("F32", "float32", 4, "<f", 0x7F80 << 16),
            Dtype("I32", "int32", 4, "<i"),
            Dtype("BF16", "bfloat16", 2, "<f", 0x7F80),
            Dtype("F16", "float16", 2, "<e", 0x7C00),
            Dtype("I16", "int16", 2, "<h"),
            Dtype("F8_E4M3", "float8_e4m3fn", 1),
            Dtype("F8_E5M2", "float8_e5m2", 1, "<e"),
            Dtype("I8", "int8", 1, "<b"),
            Dtype("U8", "uint8", 1, "<B"),
            Dtype("BOOL", "bool", 1, "<?"),
        )
    }
)

#: Dtypes of factors in artifacts, and of products.
REAL = ("F32", "F16", "BF16")

#: Dtypes that are read as float16, which holds all their values exactly.
FLOAT8 = ("F8_E4M3", "F8_E5M2")
