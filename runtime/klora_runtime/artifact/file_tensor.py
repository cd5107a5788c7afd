"""Tensors as the bytes of a file, which are copied, named and checked without torch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from klora_runtime.artifact.dtypes import DTYPES
from klora_runtime.artifact.numbers import all_finite
from klora_runtime.lazy_torch import torch


@dataclass(frozen=True, eq=False)
class FileTensor:
    """A tensor of a file."""

    dtype: str
    """A key of :data:`~klora_runtime.artifact.dtypes.DTYPES`."""
    shape: tuple[int, ...]
    data: bytearray
    """Its bytes in row-major order."""

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return len(self.data)

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes, 64 hexadecimal digits."""
        return hashlib.sha256(self.data).hexdigest()

    def is_finite(self) -> bool:
        """Return whether no value is NaN or infinite; the dtype is no float8."""
        return all_finite(self.dtype, memoryview(self.data))

    def flattened(self) -> FileTensor:
        """Return the same numbers as a matrix, with all dimensions after the first joined."""
        return FileTensor(self.dtype, (self.shape[0], math.prod(self.shape[1:])), self.data)

    def loaded(self) -> torch.Tensor:
        """Return the tensor, on the CPU, as a view of the bytes."""
        dtype = getattr(torch, DTYPES[self.dtype].in_torch)
        if not self.data:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self.data, dtype=dtype).view(self.shape)
