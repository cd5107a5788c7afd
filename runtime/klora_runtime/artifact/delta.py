"""Deltas: what one LoRA adds to one parameter, without its scale.

A delta is a product of two factors (:class:`LowRank`) or a full tensor (:class:`Dense`); both have
the same methods. Norms, inner products and singular values of a product are computed from its
factors by rank x rank matrices; only :meth:`LowRank.matrix` forms the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.lazy_torch import torch

if TYPE_CHECKING:
    from klora_runtime.artifact.q.form import Quantised


@dataclass(frozen=True)
class Singular:
    """A singular value decomposition in float64: delta = left @ diag(values) @ right."""

    left: torch.Tensor
    """(rows, n), orthonormal columns."""
    values: torch.Tensor
    """(n,), descending."""
    right: torch.Tensor
    """(n, columns), orthonormal rows."""


@dataclass(frozen=True)
class LowRank:
    """A delta as the product up @ down."""

    down: torch.Tensor
    """(rank, in), or (rank, in, *kernel) for kernels larger than 1."""
    up: torch.Tensor
    """(out, rank), or (out, rank, 1, ...)."""

    @classmethod
    def of_file(cls, down: FileTensor, up: FileTensor) -> LowRank:
        """Return a delta whose factors are read by torch when they are first needed."""
        found = object.__new__(cls)
        vars(found)["_stored"] = (down, up)
        return found

    def __getattr__(self, name: str) -> Any:
        """Read a factor of :meth:`of_file`."""
        if name not in ("down", "up") or "_stored" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        down, up = vars(self)["_stored"]
        return vars(self).setdefault(name, (down if name == "down" else up).loaded())

    @property
    def parts(self) -> tuple[torch.Tensor | FileTensor, ...]:
        """The tensors that hold its numbers, as bytes if they come from a file."""
        stored: tuple[torch.Tensor | FileTensor, ...] | None = vars(self).get("_stored")
        return stored or (self.down, self.up)

    @property
    def rank(self) -> int:
        return int(self.parts[0].shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter that it changes."""
        down, up = self.parts
        return (int(up.shape[0]), *map(int, down.shape[1:]))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold its numbers."""
        return self.down, self.up

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def rows(self, ranges: Sequence[range]) -> LowRank:
        """Return the delta of these rows of the parameter, in the given order."""
        return LowRank(self.down, _rows(self.up, ranges))

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """Return the delta on another device or in another dtype; None keeps the present one."""
        return LowRank(
            self.down.to(device=device, dtype=dtype), self.up.to(device=device, dtype=dtype)
        )

    def flattened(self) -> LowRank:
        """Return the delta with matrices as factors: (rank, in * kernel) and (out, rank)."""
        return LowRank(self.down.flatten(1), self.up.flatten(1))

    def in_float64(self, device: torch.device | None = None) -> LowRank:
        """Return the flattened delta in float64.

        Args:
            device: a device that has float64; None keeps the delta on its own device, or moves it
                to the host if that device has no float64.
        """
        return self.flattened().to(device or _home(self)).to(dtype=torch.float64)

    def matrix(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the whole delta as (rows, all other dimensions); for its device see in_float64.

        Args:
            dtype: dtype of the product; None for float64.
        """
        exact = dtype is None or dtype == torch.float64
        flat = self.in_float64() if exact else self.flattened().to(dtype=dtype)
        return flat.up @ flat.down

    def norm(self) -> float:
        """Return the Frobenius norm, computed in float64."""
        flat = self.in_float64()
        return math.sqrt(max(0.0, float(inner_products(flat, flat))))

    def inner(self, other: Delta) -> float:
        """Return the Frobenius inner product with a delta of the same shape, in float64."""
        if isinstance(other, Dense):
            return other.inner(self)
        return float(inner_products(self.in_float64(), other.in_float64()))

    def singular(self) -> Singular:
        """Return the singular value decomposition, n = rank.

        It is computed from R_up R_down^T, rank x rank, where up = Q_up R_up and
        down^T = Q_down R_down are QR decompositions.
        """
        flat = self.in_float64()
        up_basis, up_core = torch.linalg.qr(flat.up)
        down_basis, down_core = torch.linalg.qr(flat.down.T)
        left, values, right = torch.linalg.svd(up_core @ down_core.T, full_matrices=False)
        return Singular(up_basis @ left, values, (down_basis @ right.T).T)

    def balanced(self) -> LowRank:
        """Return the same delta with factors of equal size; see :func:`balanced`."""
        return balanced([self])[0]

    def is_finite(self) -> bool:
        """Return whether no stored value is NaN or infinite."""
        return is_finite(self.down) and is_finite(self.up)


@dataclass(frozen=True)
class Dense:
    """A delta with all its numbers."""

    values: torch.Tensor
    """The delta, in the parameter's shape (one dimension or more)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """See :attr:`LowRank.shape`."""
        return tuple(map(int, self.values.shape))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """See :attr:`LowRank.tensors`."""
        return (self.values,)

    @property
    def parts(self) -> tuple[torch.Tensor | FileTensor, ...]:
        """See :attr:`LowRank.parts`."""
        return (self.values,)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def rows(self, ranges: Sequence[range]) -> Dense:
        """See :meth:`LowRank.rows`."""
        return Dense(_rows(self.values, ranges))

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Dense:
        """See :meth:`LowRank.to`."""
        return Dense(self.values.to(device=device, dtype=dtype))

    def flattened(self) -> Dense:
        """Return the delta as a matrix: (rows, all other dimensions)."""
        return Dense(self.values.reshape(len(self.values), -1))

    def in_float64(self, device: torch.device | None = None) -> Dense:
        """See :meth:`LowRank.in_float64`."""
        return self.flattened().to(device or _home(self)).to(dtype=torch.float64)

    def matrix(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """See :meth:`LowRank.matrix`."""
        exact = dtype is None or dtype == torch.float64
        return (self.in_float64() if exact else self.flattened().to(dtype=dtype)).values

    def norm(self) -> float:
        """See :meth:`LowRank.norm`."""
        return float(self.in_float64().values.norm())

    def inner(self, other: Delta) -> float:
        """See :meth:`LowRank.inner`."""
        return float((self.matrix() * other.matrix()).sum())

    def singular(self) -> Singular:
        """Return the singular value decomposition, n = min(rows, columns)."""
        return Singular(*torch.linalg.svd(self.matrix(), full_matrices=False))

    def balanced(self) -> Dense:
        """Return the delta itself: it has no factors."""
        return self

    def is_finite(self) -> bool:
        """See :meth:`LowRank.is_finite`."""
        return is_finite(self.values)


#: Either form of a delta.
Delta = LowRank | Dense


@dataclass(frozen=True)
class Stored:
    """The stored delta of one slot of one entry; the model gets scale * delta."""

    scale: float
    """alpha / rank of the source (float64); 1 if the network alpha is ignored."""
    delta: Delta
    """The source's dtype and bytes; if :attr:`quantised` is set, its decoded values in float32."""
    quantised: Quantised | None = None
    """How the file encodes the delta; None if it is not compressed."""

    @classmethod
    def packed(
        cls,
        scale: float,
        quantised: Quantised,
        data: torch.Tensor,
        decoded: int,
        decode: Callable[[], Delta],
    ) -> Stored:
        """Return a compressed delta that is decoded when it is first needed.

        Args:
            data: the bytes that hold it, possibly with others.
            decoded: bytes of the decoded delta.
            decode: returns the delta; what it raises comes out of :attr:`delta`.
        """
        found = object.__new__(cls)
        vars(found).update(
            scale=scale, quantised=quantised, _data=data, _decoded=decoded, _decode=decode
        )
        return found

    def __getattr__(self, name: str) -> Any:
        """Decode the delta of :meth:`packed`."""
        held = vars(self)
        decode = held.get("_decode")
        if name != "delta" or (decode is None and "delta" not in held):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if decode is not None:  # else another thread has decoded it meanwhile
            held["delta"] = decode()
            for spent in ("_decode", "_decoded", "_data"):  # they hold the packed bytes
                held.pop(spent, None)
        return held["delta"]

    def __reduce__(self) -> Any:
        """Copy and pickle the decoded delta."""
        return type(self), (self.scale, self.delta, self.quantised)

    @property
    def pending(self) -> int:
        """Bytes that decoding adds; 0 if it is decoded."""
        found: int = vars(self).get("_decoded", 0)
        return found

    def sizes(self) -> Mapping[Hashable, int]:
        """Return address of each tensor's memory -> its bytes."""
        data = vars(self).get("_data")
        if data is not None:
            return {data.data_ptr(): data.nbytes}
        return {_address(part): part.nbytes for part in self.delta.parts}


def inner_products(one: LowRank, other: LowRank) -> torch.Tensor:
    """Return the Frobenius inner product of two low-rank deltas, from rank x rank matrices alone.

    Args:
        one: down (..., rank, columns) and up (..., rows, rank): matrices or stacks of matrices.
        other: a delta of the same rows and columns; its rank may differ.

    Returns:
        (...), in the dtype of the factors.
    """
    ups, downs = one.up.mT @ other.up, one.down @ other.down.mT
    return (ups * downs).sum(dim=(-2, -1))


def balanced(deltas: Sequence[LowRank]) -> list[LowRank]:
    """Return the same deltas with each column of up about as large as its row of down.

    The factors are scaled by powers of two, so no mantissa changes. Factors of equal size, and the
    products of ``down`` with an input, are the safest from overflow and underflow in float16.

    Args:
        deltas: deltas of one dtype on one device; one call for all waits for the device once.
    """
    if not deltas:
        return []
    sizes = [(_largest(delta.down, 1), _largest(delta.up, 0)) for delta in deltas]
    down, up = (torch.cat(parts).cpu().double() for parts in zip(*sizes, strict=True))
    known = (down > 0) & (up > 0) & (down + up).isfinite()
    ratios = torch.where(known, up, 1.0) / torch.where(known, down, 1.0)
    powers = torch.exp2((ratios.log2() / 2).round()).to(deltas[0].down)
    ranks = [delta.rank for delta in deltas]
    return [
        LowRank(
            delta.down * own.view(-1, *(1 for _ in delta.down.shape[1:])),
            delta.up / own.view(-1, *(1 for _ in delta.up.shape[2:])),
        )
        for delta, own in zip(deltas, torch.split(powers, ranks), strict=True)
    ]


def is_finite(values: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; minimum and maximum show both."""
    if not values.numel():
        return True
    least, most = torch.aminmax(values)
    return math.isfinite(least) and math.isfinite(most)


def _address(part: torch.Tensor | FileTensor) -> Hashable:
    """Return a key of the memory of a tensor."""
    return ("bytes", id(part.data)) if isinstance(part, FileTensor) else part.data_ptr()


def _home(delta: Delta) -> torch.device:
    from klora_runtime.devices.precision import home_of_float64  # it imports torch

    return home_of_float64(delta.tensors[0].device)


def _largest(factor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the largest magnitude of each rank, (rank,)."""
    size: torch.Tensor = torch.linalg.vector_norm(factor.flatten(1), math.inf, dim=dim)
    return size


def _rows(tensor: torch.Tensor, ranges: Sequence[range]) -> torch.Tensor:
    return torch.cat([tensor[rows.start : rows.stop : rows.step] for rows in ranges])
