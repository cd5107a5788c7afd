"""Numbers as the bytes of a file: what can be told of them without torch."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from klora_runtime.artifact.dtypes import DTYPES
from klora_runtime.errors import ArtifactError, shown

_NAME_DIGITS = 32

#: Bytes that are looked at together; they fit into a processor's nearest cache.
_CHUNK = 2**14


def identity(dtype: str, shape: Sequence[int], digest: str) -> str:
    """Return what makes a tensor: its dtype in torch, its shape and its bytes.

    Args:
        dtype: a key of :data:`~klora_runtime.artifact.dtypes.DTYPES`.
        shape: its shape.
        digest: SHA-256 of its bytes in row-major order.
    """
    return f"{DTYPES[dtype].in_torch} {list(shape)} {digest}"


def tensor_name(identity: str) -> str:
    """Return a tensor's name in an artifact: a digest of its :func:`identity`, 32 hex digits."""
    return hashlib.sha256(identity.encode()).hexdigest()[:_NAME_DIGITS]


def damage(name: str, dtype: str, shape: Sequence[int], data: memoryview) -> str | None:
    """Return the damage of a tensor of an artifact; None if its numbers are those of its name."""
    digest = hashlib.sha256(data).hexdigest()
    if tensor_name(identity(dtype, shape, digest)) != name:
        return f"tensor {name}: its bytes do not match its digest"
    if not all_finite(dtype, data):
        return f"tensor {name}: holds NaN or infinity"
    return None


def refuse_damaged(path: Path, damages: Iterable[str | None]) -> None:
    """Refuse an artifact with damaged tensors.

    Args:
        path: the artifact.
        damages: the result of :func:`damage` for each tensor of it.

    Raises:
        ArtifactError: some tensors are damaged; ``issues`` lists them.
    """
    every = list(damages)
    issues = [each for each in every if each is not None]
    if issues:
        raise ArtifactError(
            f"artifact {shown(path)}: {len(issues)} of {len(every)} tensors are damaged; "
            "get the file again from its source.",
            issues,
        )


def all_finite(dtype: str, data: memoryview) -> bool:
    """Return whether no number is NaN or infinite; true for dtypes that have neither.

    The exponent of such a number has all its bits set, so adding its lowest bit carries into the
    sign's bit, which was cleared. A whole chunk is one integer, so one addition tests all its
    numbers.

    Args:
        dtype: a key of :data:`~klora_runtime.artifact.dtypes.DTYPES`, but no float8.
        data: the bytes of the numbers, little-endian.
    """
    if not DTYPES[dtype].exponent:
        return True
    exponents, lowests, signs = _bits(dtype)
    return not any(
        ((int.from_bytes(data[start : start + _CHUNK], "little") & exponents) + lowests) & signs
        for start in range(0, len(data), _CHUNK)
    )


@cache
def _bits(dtype: str) -> tuple[int, int, int]:
    """Return exponent, lowest bit of the exponent, and sign, for all numbers of a chunk."""
    size, exponent = DTYPES[dtype].nbytes, DTYPES[dtype].exponent
    lowest = exponent & -exponent
    exponents, lowests, signs = (
        int.from_bytes(bits.to_bytes(size, "little") * (_CHUNK // size), "little")
        for bits in (exponent, lowest, exponent + lowest)
    )
    return exponents, lowests, signs


def number(dtype: str, data: bytes) -> float:
    """Return one number of a file."""
    code = DTYPES[dtype].code
    if code:
        whole = data.rjust(struct.calcsize(code), b"\0")  # short floats lack the last bits
        return float(struct.unpack(code, whole)[0])
    (bits,) = data  # float8 with 4 bits of exponent and 3 of fraction
    exponent, fraction = bits >> 3 & 15, bits & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    size = fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10)
    return -size if bits > 127 else size
