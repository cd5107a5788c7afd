"""A delta gives the same numbers from its factors as from all its numbers."""

from __future__ import annotations

import math

import pytest
import torch
from support.lora_files import random_pair
from support.other_device import OtherDevice

from klora_runtime.artifact.delta import Delta, Dense, LowRank, balanced, inner_products, is_finite

SHAPES = [((9, 14), 4), ((14, 9), 9), ((6, 4, 3, 3), 2), ((1, 8), 1)]


def pair_of(
    shape: tuple[int, ...], rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[LowRank, Dense]:
    """A delta in both forms."""
    out, inner, *kernel = shape
    down, up = random_pair(out, inner, rank, seed=seed, kernel=tuple(kernel), dtype=dtype)
    product = torch.einsum("or,r...->o...", up.double().reshape(out, rank), down.double())
    return LowRank(down, up), Dense(product)


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_both_forms_are_one_delta(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    factors, dense = pair_of(shape, rank, 1, dtype)
    other, other_dense = pair_of(shape, 1, 2, dtype)
    assert factors.shape == dense.shape == shape
    assert factors.rank == rank
    assert factors.matrix().dtype == torch.float64
    torch.testing.assert_close(factors.matrix(), dense.matrix())
    torch.testing.assert_close(factors.flattened().matrix(), dense.flattened().values)
    size = float(dense.values.square().sum().sqrt())
    product = float((dense.values * other_dense.values).sum())
    for one in (factors, dense):
        assert one.norm() == pytest.approx(size, rel=1e-12)
        for another in (other, other_dense):
            assert one.inner(another) == pytest.approx(product, rel=1e-9, abs=1e-9)
            assert another.inner(one) == pytest.approx(product, rel=1e-9, abs=1e-9)


def test_factors_that_cancel_have_a_norm() -> None:
    """The sum of r x r products may round below 0, as it does for every third of these."""
    for seed in range(20):
        down, up = random_pair(40, 30, 8, seed=seed)
        nothing = LowRank(torch.cat([down, down]), torch.cat([up, -up], 1))
        assert nothing.norm() < 1e-5


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_singular_values_and_vectors(shape: tuple[int, ...], rank: int) -> None:
    for delta in pair_of(shape, rank, 5):
        found = delta.singular()
        wanted = torch.linalg.svdvals(delta.matrix())
        torch.testing.assert_close(found.values[:rank], wanted[:rank])
        rebuilt = found.left @ torch.diag(found.values) @ found.right
        torch.testing.assert_close(rebuilt, delta.matrix())
        eye = torch.eye(len(found.values), dtype=torch.float64)
        torch.testing.assert_close(found.left.T @ found.left, eye)
        torch.testing.assert_close(found.right @ found.right.T, eye)


def test_a_rank_above_the_sides_has_as_many_singular_values_as_sides() -> None:
    delta = LowRank(*random_pair(3, 5, 8))
    found = delta.singular()
    torch.testing.assert_close(found.values, torch.linalg.svdvals(delta.matrix()))
    torch.testing.assert_close(found.left @ torch.diag(found.values) @ found.right, delta.matrix())


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_balancing_changes_sizes_and_no_value(kernel: tuple[int, ...]) -> None:
    down, up = random_pair(12, 10, 5, kernel=kernel)
    sizes = torch.tensor([2.0**40, 1.0, 2.0**-30, 3.0, 0.0])
    delta = LowRank(
        down * sizes.view(-1, 1, *(1 for _ in kernel)),
        up / torch.where(sizes > 0, sizes, 1.0).view(-1, *(1 for _ in kernel)),
    )
    even = delta.balanced()
    assert torch.equal(even.matrix(), delta.matrix())
    rows, columns = even.down.flatten(1).abs().amax(1), even.up.flatten(1).abs().amax(0)
    ratios = rows[:4] / columns[:4]
    assert (ratios <= 2.0).all()
    assert (ratios >= 0.5).all()
    assert torch.equal(even.down[4], delta.down[4])
    assert torch.equal(even.up[:, 4], delta.up[:, 4])


def test_many_are_balanced_as_each_alone() -> None:
    deltas = [LowRank(*random_pair(8, 6, rank, seed=rank)) for rank in (3, 1, 4)]
    deltas = [LowRank(delta.down * 1000, delta.up) for delta in deltas]
    for one, together in zip(deltas, balanced(deltas), strict=True):
        assert all(map(torch.equal, one.balanced().tensors, together.tensors))
    assert balanced([]) == []


def test_what_is_not_finite_stays_where_it_is() -> None:
    delta = LowRank(torch.tensor([[math.inf], [8.0]]), torch.tensor([[1.0, 2.0]]))
    even = delta.balanced()
    assert even.down.flatten().tolist() == [math.inf, 4.0]
    assert even.up.flatten().tolist() == [1.0, 4.0]


def test_stacks_have_an_inner_product_each() -> None:
    one, other = (LowRank(torch.randn(3, r, 7), torch.randn(3, 5, r)) for r in (2, 4))
    expected = ((one.up @ one.down) * (other.up @ other.down)).sum((1, 2))
    torch.testing.assert_close(inner_products(one, other), expected)


@pytest.mark.parametrize("delta", pair_of((7, 5, 2, 2), 3, 4))
def test_rows_in_any_order_and_step(delta: Delta) -> None:
    rows = [*range(5, 7), *range(0, 6, 2)]
    found = delta.rows([range(5, 7), range(0, 6, 2)])
    assert found.shape == (5, 5, 2, 2)
    assert torch.equal(found.matrix(), delta.matrix()[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 63, 1000, 40000])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype, value: float, place: int) -> None:
    values = torch.zeros(40001, dtype=dtype)
    assert is_finite(values)
    values[place] = value
    assert not is_finite(values)
    assert not Dense(values.reshape(1, -1)).is_finite()


def test_of_no_values_all_are_finite() -> None:
    assert is_finite(torch.empty(0))


def test_float64_is_computed_on_the_host_for_a_device_without_it() -> None:
    factors = LowRank(torch.randn(3, 20), torch.randn(30, 3))
    dense = Dense(torch.randn(30, 20))
    for one, other in ((factors, dense), (dense, factors), (factors, factors)):
        expected = one.norm(), one.inner(other), one.singular().values, one.matrix()
        with OtherDevice("mps:0") as device:
            there, too = one.to(device.device), other.to(device.device)
            assert all(device.holds(tensor) for tensor in there.tensors)
            assert (there.norm(), there.inner(too)) == expected[:2]
            assert torch.equal(there.singular().values, expected[2])
            assert torch.equal(there.matrix(), expected[3])
            assert there.matrix(torch.float32).device == device.device
            balanced = there.balanced()
            assert all(device.holds(tensor) for tensor in balanced.tensors)


def test_float64_is_computed_on_a_device_that_has_it() -> None:
    with OtherDevice("cuda:0", float64=True) as device:
        there = LowRank(torch.randn(3, 20), torch.randn(30, 3)).to(device.device)
        assert device.holds(there.matrix())
        assert there.in_float64(torch.device("cpu")).down.device.type == "cpu"
