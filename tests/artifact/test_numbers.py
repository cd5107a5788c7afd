"""Numbers as bytes: NaN, infinity and single values, against torch."""

from __future__ import annotations

import math

import pytest
import torch

from klora_runtime.artifact.dtypes import DTYPES
from klora_runtime.artifact.numbers import all_finite, number
from klora_runtime.artifact.tensor_file import bytes_of, torch_dtype

FLOATS = [name for name, dtype in DTYPES.items() if dtype.exponent]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("count", [1, 5, 20_000])
def test_one_number_that_is_not_finite_is_noticed_wherever_it_is(name: str, count: int) -> None:
    info = torch.finfo(torch_dtype(name))
    values = torch.tensor([info.max, -info.max, info.tiny, -0.0, 1.5], dtype=torch_dtype(name))
    values = values.repeat(count // 5 + 1)[:count]
    assert all_finite(name, memoryview(bytes_of(values)))
    for place in {0, count // 2, count - 1}:
        for wrong in (math.nan, math.inf, -math.inf):
            changed = values.clone()
            changed[place] = wrong
            assert not all_finite(name, memoryview(bytes_of(changed)))


def test_the_least_nan_is_noticed() -> None:
    least = (0x7F800001).to_bytes(4, "little")
    assert not all_finite("F32", memoryview(least))
    assert all_finite("F32", memoryview(b""))


def test_whole_numbers_are_finite() -> None:
    assert all_finite("I32", memoryview(b"\xff" * 8))
    assert all_finite("U8", memoryview(b"\xff" * 3))


@pytest.mark.parametrize("name", DTYPES)
def test_one_number_is_read_as_torch_reads_it(name: str) -> None:
    size = DTYPES[name].nbytes
    for last in range(2 if name == "BOOL" else 256):
        data = bytes((7 * last + 3 * place) % 256 for place in range(size - 1)) + bytes([last])
        expected = float(torch.frombuffer(bytearray(data), dtype=torch_dtype(name))[0])
        found = number(name, data)
        assert found == expected or (math.isnan(found) and math.isnan(expected)), last
