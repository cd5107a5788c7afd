"""Layers of one shape together, as on a GPU: the same numbers as one by one, whatever is beside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lora_files import random_pair
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile import compile_fusion
from klora_compile.measuring import batches as measure_batches
from klora_compile.measuring import measure as measuring
from klora_compile.measuring.batches import Task, _largest
from klora_compile.measuring.courier import Courier
from klora_compile.measuring.statistics import Statistics
from klora_compile.measuring.tiles import Scratch, measure_layer
from klora_runtime.artifact.delta import Dense, LowRank

CPU = torch.device("cpu")


def product(
    out: int, width: int, rank: int, seed: int, dtype: torch.dtype = torch.float32, kernel: int = 1
) -> LowRank:
    down, up = random_pair(
        out, width, rank, seed=seed, dtype=dtype, kernel=(kernel,) * 2 if kernel > 1 else ()
    )
    return LowRank(down, up)


def tasks() -> list[Task]:
    """Shapes in turns, so that batches take layers from everywhere; conv, half, dense, 1-D."""
    torch.manual_seed(0)
    found: list[Task] = []
    for seed in range(5):
        found += [
            (product(40, 30, 3, seed), (1, 9, 500)),
            (product(40, 30, 3, seed), (7,)),
            (product(64, 48, 4, seed, torch.float16), (16, 64)),
            (product(24, 8, 4, seed, torch.bfloat16, kernel=3), (16, 24 * 72)),
            (Dense(torch.randn(33, 20)), (1, 99)),
            (Dense(torch.randn(70)), (5,)),
            (product(3, 5, 1, seed), ()),
        ]
    return found


def measured(some: list[Task], elements: int) -> dict[int, Statistics]:
    return dict(measure_batches.measure_batches(some, CPU, elements))


@pytest.mark.parametrize("elements", [1, 100, 1300, 4000, 2**20])
def test_batches_give_what_tiles_give(elements: int) -> None:
    """Parts of a layer, one layer, a few with a padded rest, all."""
    every = tasks()
    found = measured(every, elements)
    assert sorted(found) == list(range(len(every)))
    for place, (delta, ks) in enumerate(every):
        expected = measure_layer(delta, ks, Scratch())
        assert found[place].l1 == pytest.approx(expected.l1, rel=1e-6)
        assert found[place].frobenius == pytest.approx(expected.frobenius, rel=1e-12)
        assert found[place].top_k == pytest.approx(expected.top_k, rel=1e-6)
        assert list(found[place].top_k) == list(ks)


def test_the_other_layers_change_no_bit() -> None:
    every = tasks()
    together = measured(every, 4000)
    for place, task in enumerate(every):
        assert measured([task], 4000)[0] == together[place]


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 3), count=st.integers(1, 300), data=st.data())
def test_the_largest_lie_in_the_blocks_with_the_largest_maxima(
    rows: int, count: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(0, count))
    few = torch.randint(0, data.draw(st.sampled_from([2, 9, 10**6])), (rows, count)).float()
    found = _largest(few, k).sort(dim=1, descending=True).values
    assert torch.equal(found, few.sort(dim=1, descending=True).values[:, :k])


def test_one_transfer_each_way_for_a_batch_and_reading_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    bring, take = Courier.bring, Courier.take
    monkeypatch.setattr(Courier, "bring", lambda *a: (events.append("bring"), bring(*a))[1])
    monkeypatch.setattr(Courier, "take", lambda *a: (events.append("take"), take(*a))[1])
    some: list[Task] = [(product(40, 30, 3, seed), (9,)) for seed in range(6)]
    for _ in measure_batches.measure_batches(some, CPU, 2 * 40 * 30):
        events.append("layer")
    start = ["bring", "bring", "take"]
    two = ["layer"] * 2
    assert events == [*start, *start, *two, *start, *two, *two]


def test_a_batch_starts_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of another shape, and those that have not come yet, are not waited for."""
    events: list[str] = []
    take = Courier.take
    monkeypatch.setattr(Courier, "take", lambda *a: (events.append("take"), take(*a))[1])

    def coming() -> Iterator[Task]:
        for seed in range(3):
            events.append("come")
            yield product(40, 30, 3, seed), (9,)
            events.append("come")
            yield product(20, 30, 3, seed), (9,)

    for place, _ in measure_batches.measure_batches(coming(), CPU, 2 * 40 * 30):
        events.append(str(place))
    first = ["come"] * 3 + ["take"]
    assert events == [*first, *["come"] * 3, "take", *"02", "take", *"135", "4"]


def test_overflow_is_seen() -> None:
    huge = LowRank(torch.full((2, 4), 1e30), torch.full((6, 2), 1e30))
    found = measured([(product(6, 4, 2, 0), (3,)), (huge, (3,))], 2**20)
    assert math.isfinite(found[0].l1)
    assert not math.isfinite(found[1].l1)


def test_a_pair_compiles_to_the_same_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline("sdxl")
    files = [tiny_lora(pipe, tmp_path / f"{i}.safetensors", seed=i, rank=4) for i in range(2)]
    here = compile_fusion(*files, device="cpu")
    monkeypatch.setattr(measuring, "_tile_by_tile", measuring._shape_by_shape)
    there = compile_fusion(*files, device="cpu")
    assert [e.module for e in there.entries] == [e.module for e in here.entries]
    for one, other in zip(here.entries, there.entries, strict=True):
        ratios = [entry.scores["klora"]["ratio"] or 0.0 for entry in (one, other)]
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-6)
        assert all(one.timeline.at(t / 100) == other.timeline.at(t / 100) for t in range(100))
