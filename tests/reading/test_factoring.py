"""Deltas whose rank nobody stated: the smallest form that holds them, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.form_files import LINEAR, Source
from support.lora_files import write_lora

from klora_compile import read_adapter
from klora_compile.reading.factoring import compact, kronecker
from klora_runtime.artifact.delta import Dense, LowRank


def matrix(singular: list[float], out: int = 60, inner: int = 40) -> torch.Tensor:
    """A matrix of these singular values, float32."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(singular), generator=generator, dtype=torch.float64))[0]
        for n in (out, inner)
    )
    return (left * torch.tensor(singular, dtype=torch.float64) @ right.T).float()


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("rank", [1, 5, 23])
def test_a_low_rank_matrix_becomes_its_factors(shape: tuple[int, int], rank: int) -> None:
    values = matrix([1.0] * rank, *shape)
    found, numerical, error = compact(Dense(values), 1e-6)
    assert isinstance(found, LowRank)
    assert (found.rank, numerical, found.shape) == (rank, rank, shape)
    assert error <= 1e-6
    torch.testing.assert_close(found.matrix(), values.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("allowed", "rank"), [(1e-6, 4), (0.05, 3), (0.2, 2), (0.5, 1)])
def test_an_allowed_error_takes_the_smallest_rank(allowed: float, rank: int) -> None:
    """Lost without the last one, two, three: 0.009, 0.1, 0.41 of the norm."""
    values = matrix([10.0, 4.0, 1.0, 0.1])
    found, numerical, error = compact(Dense(values), allowed)
    assert isinstance(found, LowRank)
    assert found.rank == numerical == rank
    lost = float((found.matrix() - values.double()).norm() / values.double().norm())
    assert error == pytest.approx(lost, rel=1e-6)
    assert lost <= allowed + 1e-6


@pytest.mark.parametrize("rank", [24, 40])
def test_factors_that_are_more_numbers_than_the_matrix_do_not_pay(rank: int) -> None:
    values = matrix([1.0] * rank)
    found, numerical, error = compact(Dense(values), 1e-6)
    assert isinstance(found, Dense)
    assert torch.equal(found.values, values)
    assert (numerical, error) == (40 if rank == 40 else numerical, 0.0)
    assert numerical >= 24


def test_a_part_proves_that_no_rank_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the whole, eight times the work, is not decomposed."""
    sides: list[int] = []

    def spied(decompose: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
        def spy(of: torch.Tensor) -> Any:
            sides.append(len(of))
            return decompose(of)

        return spy

    for name in ("eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, spied(getattr(torch.linalg, name)))
    full = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    assert isinstance(compact(Dense(full), 1e-6)[0], Dense)
    assert max(sides) < 300 * 0.7
    sides.clear()
    assert isinstance(compact(Dense(matrix([1.0] * 5, 300, 300)), 1e-6)[0], LowRank)
    assert sides[-1] == 300


def test_vectors_and_zeros() -> None:
    bias = Dense(torch.ones(7))
    assert compact(bias, 1e-6) == (bias, 1, 0.0)
    found, rank, error = compact(Dense(torch.zeros(6, 4, 3, 3)), 1e-6)
    assert isinstance(found, LowRank)
    assert (found.shape, rank, error) == ((6, 4, 3, 3), 1, 0.0)
    assert float(found.matrix().abs().max()) == 0.0


@pytest.mark.parametrize("allowed", [1e-6, 0.1, 0.4])
def test_a_kronecker_product_is_parted_without_being_made(allowed: float) -> None:
    first = matrix([5.0, 1.0], 4, 3).double()
    second = matrix([3.0, 1.0, 0.2], 20, 16).double()
    whole = torch.kron(first, second)
    singular = np.linalg.svd(whole.numpy(), compute_uv=False)
    tails = np.sqrt(np.cumsum(singular[::-1] ** 2)[::-1] / (singular**2).sum())
    found = kronecker(first, second, allowed)
    assert found is not None
    down, up, lost = found
    assert len(down) == int((tails > allowed).sum())
    error = float((up @ down - whole).norm() / whole.norm())
    assert error == pytest.approx(lost, abs=1e-7)
    assert error <= allowed + 1e-7
    eye = torch.eye(8, dtype=torch.float64)
    assert kronecker(eye, eye, 1e-6) is None


@pytest.mark.parametrize(
    ("form", "width", "kind"),
    [
        ("LoHa", 16, LowRank),  # rank 9 of at most 16 pays for 48 x 48, not for 16 x 16
        ("LoKr", 16, LowRank),
        ("LoKr, whole", 16, Dense),
        ("full difference", 16, Dense),
        ("LoRA", 16, LowRank),
    ],
)
def test_which_forms_stay_dense(form: str, width: int, kind: type, tmp_path: Path) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    side = 48 if form == "LoHa" else width
    tensors = LINEAR[form](Source(0), side, side).tensors
    path = write_lora(tmp_path / "a.safetensors", {name + e: t for e, t in tensors.items()})
    assert isinstance(read_adapter(path).layers[name].delta, kind)
    if form == "LoHa":
        tensors = LINEAR[form](Source(0), 16, 16).tensors
        path = write_lora(path, {name + e: t for e, t in tensors.items()})
        assert isinstance(read_adapter(path).layers[name].delta, Dense)
