"""Full precision is for the time that it is asked for, and leaves no setting behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from klora_runtime.devices.precision import full_float32

pytestmark = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has one switch for all"
)


@pytest.fixture(autouse=True)
def _settings_of_others() -> Iterator[None]:
    before = torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


def test_products_are_in_full_precision_inside() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with full_float32():
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_an_inherited_precision_stays_inherited() -> None:
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    with full_float32():
        pass
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
