"""Numbers of few bits as `FORMAT.md` defines them, against a decoder that goes bit by bit."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klora_runtime.fusion import Dense, Factors
from klora_runtime.quantised import MAX_WIDTH, Quantised, Vectors, pack, unpack
from klora_runtime.stored_factors import from_quantised, vectors_of

SEEDS = st.integers(0, 2**31)
PARTS = st.lists(st.integers(1, 140), min_size=1, max_size=2).map(tuple)
WIDTHS = st.lists(st.integers(1, MAX_WIDTH), min_size=1, max_size=6).map(
    lambda widths: sorted(widths, reverse=True)
)


def literal(packed: bytes, widths: list[int], parts: tuple[int, ...]) -> list[list[float]]:
    """Section 2 of the spec, one number at a time."""
    blocks = sum(math.ceil(part / 64) for part in parts)
    halves = struct.unpack_from(f"<{blocks * len(widths)}H", packed)
    scales = [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
    starts = [sum(math.ceil(p / 64) for p in parts[:i]) for i in range(len(parts))]
    block_of = [s + i // 64 for s, p in zip(starts, parts, strict=True) for i in range(p)]
    position = 8 * 2 * len(scales)
    whole = int.from_bytes(packed, "little")
    rows = []
    for vector, width in enumerate(widths):
        if vector and width != widths[vector - 1]:
            position = 8 * math.ceil(position / 8)
        row = []
        for block in block_of:
            code = (whole >> position) & (2**width - 1)
            row.append((2 * code - (2**width - 1)) * scales[vector * blocks + block])
            position += width
        rows.append(row)
    assert len(packed) == math.ceil(position / 8)
    return rows


def numbers(widths: list[int], vectors: Vectors, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random odd numbers of each width, and scales of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    odds = [
        2 * torch.randint(0, 2**w, (vectors.length,), generator=generator) - (2**w - 1)
        for w in widths
    ]
    exponents = torch.randint(-60, 60, (len(widths), vectors.blocks), generator=generator)
    scales = torch.rand(exponents.shape, generator=generator) * 2.0**exponents
    return torch.stack(odds), scales.bfloat16()


@settings(max_examples=60, deadline=None)
@given(parts=PARTS, widths=WIDTHS, seed=SEEDS)
def test_bytes_are_those_of_the_spec(parts: tuple[int, ...], widths: list[int], seed: int) -> None:
    vectors = Vectors(parts)
    odds, scales = numbers(widths, vectors, seed)
    packed = pack(odds, scales, widths, vectors)
    assert packed.dtype == torch.uint8
    assert packed.shape == (vectors.nbytes(widths),)
    expected = torch.tensor(literal(packed.numpy().tobytes(), widths, parts), dtype=torch.float64)
    found = unpack(packed, widths, vectors)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), expected)
    assert torch.equal(expected, odds.double() * scales.double()[:, vectors.block_of()])


@pytest.mark.parametrize("shape", [(5, 70), (3, 2, 3, 3), (64, 1)])
def test_factors_of_any_shape(shape: tuple[int, ...]) -> None:
    widths, vectors = [9, 9, 4], vectors_of(shape, dense=False)
    odds, scales = numbers(widths, vectors, 3)
    quantised = Quantised(tuple(widths), pack(odds, scales, widths, vectors), 0.01)
    factors = from_quantised(0.5, quantised, shape, dense=False)
    assert isinstance(factors, Factors)
    assert factors.down.shape == (3, *shape[1:])
    assert factors.up.shape == (shape[0], 3, *(1 for _ in shape[2:]))
    values = unpack(quantised.packed, widths, vectors)
    product = torch.einsum("ri,ro->oi", *values.double().split([math.prod(shape[1:]), shape[0]], 1))
    assert torch.allclose(factors.matrix(torch.float64, torch.device("cpu")), product, rtol=1e-12)
    assert factors.quantised is quantised


def test_a_packed_tensor_may_begin_at_an_odd_byte() -> None:
    """As it does where a file was read in one piece."""
    vectors = Vectors((3, 2))
    packed = pack(*numbers([3], vectors, 0), [3], vectors)
    shifted = torch.cat([packed.new_zeros(1), packed])[1:]
    assert torch.equal(unpack(shifted, [3], vectors), unpack(packed, [3], vectors))


def test_a_dense_delta_is_one_vector() -> None:
    vectors = vectors_of((7, 10), dense=True)
    odds, scales = numbers([6], vectors, 1)
    quantised = Quantised((6,), pack(odds, scales, [6], vectors), 0.0)
    found = from_quantised(2.0, quantised, (7, 10), dense=True)
    assert isinstance(found, Dense)
    assert torch.equal(found.delta.flatten(), unpack(quantised.packed, [6], vectors)[0])


def test_numbers_are_unpacked_where_they_are() -> None:
    """Nothing of it is on another device: the meta device stands for a GPU."""
    vectors, widths = Vectors((70, 9)), (15, 9, 9, 3)
    packed = torch.zeros(vectors.nbytes(widths), dtype=torch.uint8, device="meta")
    found = unpack(packed, widths, vectors)
    assert (found.shape, found.device.type) == ((4, 79), "meta")
