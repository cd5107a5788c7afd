"""Statistics of single layers: against float64, at every edge of K, to the bit on any machine."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lora_files import needs_cuda, random_pair, run_python
from support.pairs import slow

from klora_compile.measuring import magnitudes
from klora_compile.measuring import measure as measuring
from klora_compile.measuring import tiles as measure_tiles
from klora_compile.measuring.measure import measure
from klora_compile.measuring.statistics import Statistics
from klora_compile.reading.layers import Layer
from klora_runtime.devices.names import as_device
from klora_runtime.errors import LoraError

CPU = torch.device("cpu")
#: Shapes (rank, out, in) for which a threaded product rounds differently from a plain one.
AWKWARD = [
    *((5, 2, 320), (1, 1, 1), (3, 7, 1), (4, 1, 4097), (2, 640, 3), (9, 33, 77), (16, 257, 640)),
    *((8, 2, 4097), (8, 3, 4097), (16, 2, 4097), (16, 3, 4097)),
]


def layer(out: int, width: int, rank: int, name: str = "x", **more: Any) -> Layer:
    down, up = random_pair(out, width, rank, **more)
    return Layer.lora("unet", name, down, up, alpha=float(rank), alpha_source="rank")


def one(subject: Layer, *ks: int, device: torch.device = CPU) -> Statistics:
    return measure([subject], {subject.name: ks}, device=device)[subject.name]


def assert_exact(found: Statistics, subject: Layer, ks: Sequence[int]) -> None:
    """Compare with |up @ down| in float64, up to the rounding of float32 products."""
    up, down = subject.up.double().flatten(1), subject.down.double().flatten(1)
    values = (up @ down).abs().flatten().sort(descending=True).values
    rounding = subject.rank * 2.0**-23 * (up.abs() @ down.abs())
    assert abs(found.l1 - float(values.sum())) <= float(rounding.sum())
    assert set(found.top_k) == set(ks)
    for k in ks:
        assert abs(found.top_k[k] - float(values[:k].sum())) <= k * float(rounding.max())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(), (3, 3), (1, 3)])
def test_sums_are_those_of_the_dense_delta(dtype: torch.dtype, kernel: tuple[int, ...]) -> None:
    subject = layer(48, 24, 4, kernel=kernel, dtype=dtype)
    assert_exact(one(subject, 1, 16, 1000), subject, (1, 16, 1000))


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    rank=st.integers(1, 6),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_sums_are_right_for_any_shape_and_tile(
    out: int, width: int, rank: int, seed: int, data: st.DataObject
) -> None:
    subject = layer(out, width, rank, seed=seed)
    ks = tuple(data.draw(st.lists(st.integers(1, out * width), min_size=1, max_size=3)))
    tile = data.draw(st.integers(1, 2 * out * width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_tiles, "TILE_ELEMENTS", tile)
        assert_exact(one(subject, *ks), subject, ks)


def test_alpha_has_no_part_in_the_statistics() -> None:
    down, up = random_pair(8, 8, 2)
    plain, scaled = (Layer.lora("unet", "x", down, up, alpha, "tensor") for alpha in (2.0, -9.0))
    assert one(plain, 4) == one(scaled, 4)


def test_k_at_its_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """1; all; all but one; around the number of values in one tile; none."""
    monkeypatch.setattr(measure_tiles, "TILE_ELEMENTS", 50)  # 5 rows of 10
    subject = layer(13, 10, 3)
    ks = (1, 2, 49, 50, 51, 99, 100, 101, 129, 130)
    assert_exact(one(subject, *ks), subject, ks)
    for k in ks:
        assert one(subject, k).top_k == {k: one(subject, *ks).top_k[k]}
    measured = one(subject, 1)
    assert one(subject) == Statistics(measured.l1, {}, measured.frobenius)


def test_equal_values_count_as_often_as_they_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_tiles, "TILE_ELEMENTS", 8)
    subject = Layer.lora(
        "unet", "x", torch.ones(1, 4), torch.tensor([[1.0], [-3.0], [3.0]]), 1.0, "rank"
    )
    assert one(subject, 1, 7, 8, 9, 12).top_k == {1: 3.0, 7: 21.0, 8: 24.0, 9: 25.0, 12: 28.0}


def test_values_that_hardly_differ_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile is a little larger than the one before it, or a little smaller."""
    monkeypatch.setattr(measure_tiles, "TILE_ELEMENTS", 4)
    rising = 1 + torch.arange(100.0).reshape(100, 1) * 2.0**-20
    expected = math.fsum(rising[-5:].flatten().tolist())
    for up in (rising, rising.flip(0), rising.roll(50, 0)):
        assert (
            one(Layer.lora("unet", "x", torch.ones(1, 1), up, 1.0, "rank"), 5).top_k[5] == expected
        )


@pytest.mark.parametrize("guess", [-1.0, 0.0, 0.5, 1e9])
def test_a_guess_changes_no_bit(guess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too low, it lets more through than is kept; too high, a second pass is made."""
    monkeypatch.setattr(measure_tiles, "TILE_ELEMENTS", 600)
    subject = layer(60, 50, 4)
    expected = one(subject, 9, 40)
    monkeypatch.setattr(measure_tiles, "_guesses", lambda *_: iter([guess, 0.0]))
    assert one(subject, 9, 40) == expected
    assert_exact(expected, subject, (9, 40))


def test_a_sample_saves_the_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = measure_tiles._Product.tiles
    passes: list[None] = []
    monkeypatch.setattr(
        measure_tiles._Product, "tiles", lambda *args: passes.append(None) or tiles(*args)
    )
    kept: list[int] = []
    total = magnitudes.sums_of_largest
    monkeypatch.setattr(
        measure_tiles,
        "sums_of_largest",
        lambda values, ks: (kept.append(len(values)), total(values, ks))[1],
    )
    for seed in range(5):
        one(layer(900, 700, 8, seed=seed), 64)
    assert len(passes) == 5
    assert 5 * 64 <= sum(kept) <= 5 * 64 * 4


def test_rows_are_summed_in_float64() -> None:
    down = torch.ones(1, 4096)
    down[0, 0] = 2.0**25
    assert one(Layer.lora("unet", "x", down, torch.ones(1, 1), 1.0, "rank")).l1 == 2.0**25 + 4095


def test_sums_are_exact_where_a_running_sum_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """One large value and many that a float32 or float64 running sum would lose."""
    monkeypatch.setattr(measure_tiles, "TILE_ELEMENTS", 64)
    up = torch.full((4096, 1), 2.0**-30)
    up[0] = 2.0**30
    found = one(Layer.lora("unet", "x", torch.ones(1, 1), up, 1.0, "rank"), 4096)
    assert found.l1 == found.top_k[4096] == 2.0**30 + 4095 * 2.0**-30


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 2.0**120, width=32), min_size=1, max_size=40), st.data())
def test_running_sums_are_those_of_fsum(values: list[float], data: st.DataObject) -> None:
    """Also where float64 cannot hold them, and beyond the last value that is not zero."""
    ks = data.draw(st.lists(st.integers(1, len(values) + 3), min_size=1, max_size=4))
    found = magnitudes.sums_of_largest(np.array(values, np.float32), ks)
    assert found == {k: math.fsum(sorted(values)[::-1][:k]) for k in ks}


def test_a_guess_is_lowered_until_it_is_low_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is large lies where the sample looks, so that it promises too much."""
    up = torch.full((1280, 1), 0.5)
    up[::10] = 2 + torch.arange(128.0).reshape(-1, 1) / 128
    subject = Layer.lora("unet", "x", torch.ones(1, 10), up, 1.0, "rank")
    tiles, passes = measure_tiles._Product.tiles, list[None]()
    monkeypatch.setattr(
        measure_tiles._Product, "tiles", lambda *args: passes.append(None) or tiles(*args)
    )
    assert_exact(one(subject, 5000), subject, (5000,))
    assert len(passes) == 2


def test_zero_deltas_are_exactly_zero() -> None:
    down, up = random_pair(6, 4, 2)
    for pair in ((down, torch.zeros_like(up)), (torch.zeros_like(down), -0.0 * up)):
        assert one(Layer.lora("unet", "x", *pair, 2.0, "rank"), 1, 24) == Statistics(
            0.0, {1: 0.0, 24: 0.0}, 0.0
        )


def test_the_frobenius_norm_is_that_of_the_dense_delta() -> None:
    for subject in (layer(48, 24, 4), layer(48, 24, 4, kernel=(3, 3), dtype=torch.float16)):
        values = subject.up.double().flatten(1) @ subject.down.double().flatten(1)
        assert one(subject).frobenius == pytest.approx(float(values.norm()), rel=1e-12)


def test_a_layer_is_measured_alone_and_without_its_partner() -> None:
    """The other layers and the other K change no bit: what the catalogue of pairs relies on."""
    layers = [layer(40, 30, 3, name=f"x{i}", seed=i) for i in range(5)]
    together = measure(layers, {v.name: (1, 9, 500) for v in layers}, device=CPU)
    assert list(together) == [v.name for v in layers]
    for subject in layers:
        for k in (1, 9, 500):
            alone = one(subject, k)
            assert alone.l1 == together[subject.name].l1
            assert alone.top_k[k] == together[subject.name].top_k[k]


def test_each_layer_is_reported_in_order_as_it_is_done() -> None:
    seen: list[tuple[str, int, int]] = []
    layers = [layer(4, 4, 1, name=str(i)) for i in range(3)]
    measure(layers, {}, device=CPU, on_layer=lambda *args: seen.append(args))
    assert seen == [("unet.0", 1, 3), ("unet.1", 2, 3), ("unet.2", 3, 3)]


# --- the same bits ----------------------------------------------------------------------------


def awkward_layers() -> list[Layer]:
    return [
        layer(out, width, rank, name=f"{rank}_{out}_{width}", seed=i)
        for i, (rank, out, width) in enumerate(AWKWARD * 3)
    ]


def all_bits() -> dict[str, Statistics]:
    layers = awkward_layers()
    return measure(layers, {v.name: (1, min(9, v.numel)) for v in layers}, device=CPU)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    results = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(all_bits())
        assert torch.get_num_threads() == count
    assert results[0] == results[1] == results[2]


@pytest.mark.usefixtures("threads")
def test_each_worker_has_one_thread_and_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked as well as the bits: not every machine can round worse when allowed to."""
    seen: set[tuple[int, bool, str]] = set()
    real = measuring.measure_layer

    def spy(*args: Any) -> Statistics:
        main = threading.current_thread() is threading.main_thread()
        seen.add((torch.get_num_threads(), main, torch.backends.cuda.matmul.fp32_precision))
        return real(*args)

    monkeypatch.setattr(measuring, "measure_layer", spy)
    torch.set_num_threads(4)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        all_bits()
    finally:
        torch.set_float32_matmul_precision(precision)
    assert seen == {(1, False, "ieee")}


@pytest.mark.usefixtures("threads")
def test_each_worker_keeps_the_blas_to_one_thread_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The BLAS counts threads per thread: told in the main one alone, it takes all cores."""
    told: list[tuple[bool, int]] = []
    tell = torch.set_num_threads

    def spy(count: int) -> None:
        told.append((threading.current_thread() is threading.main_thread(), count))
        tell(count)

    tell(2)
    monkeypatch.setattr(torch, "set_num_threads", spy)
    all_bits()
    assert (False, 1) in told
    assert told[0] == (True, 1)
    assert told[-1] == (True, 2)


def test_a_lower_matmul_precision_changes_no_bit() -> None:
    expected, before = all_bits(), torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert all_bits() == expected
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("place", ["in a worker", "in a callback", "on overflow"])
def test_the_number_of_threads_is_given_back_after_an_error(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("as planned")

    torch.set_num_threads(3)
    layers, callback = awkward_layers(), None
    if place == "in a worker":
        monkeypatch.setattr(measuring, "measure_layer", fail)
    elif place == "in a callback":
        callback = fail
    else:
        layers[1] = Layer.lora(
            "unet", "huge", torch.full((1, 2), 1e30), torch.full((2, 1), 1e30), 1.0, "rank"
        )
    with pytest.raises((RuntimeError, LoraError), match=r"as planned|overflows float32"):
        measure(layers, {}, device=CPU, on_layer=callback)
    assert torch.get_num_threads() == 3
    assert not [t for t in threading.enumerate() if t.name.startswith("klora-measure")]


@pytest.mark.parametrize("value", [1e30, -1e30])
def test_overflow_is_an_error_that_names_the_layer(value: float) -> None:
    huge = torch.full((2, 4), value)
    with pytest.raises(LoraError, match=r"unet\.deep\.down: its delta overflows float32\."):
        one(Layer.lora("unet", "deep.down", huge, torch.full((6, 2), 1e30), 2.0, "rank"), 1)
    cancelling = torch.tensor([[1e30, 1e30], [-1e30, -1e30]])  # inf - inf is NaN
    with pytest.raises(LoraError, match="overflows float32"):
        one(Layer.lora("unet", "x", cancelling, torch.full((6, 2), value), 2.0, "rank"), 1)


# --- memory -----------------------------------------------------------------------------------

MEMORY = """
import sys, torch
from pathlib import Path
from klora_compile.measuring.measure import measure
from klora_compile.reading.layers import Layer

def peak():  # not ru_maxrss, which begins at the parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

def layer(out, width, rank):
    return Layer.lora("unet", f"{out}", torch.randn(rank, width), torch.randn(out, rank), rank)

torch.set_num_threads(1)
small, large = layer(64, 64, 16), layer(12288, 3072, 16)
measure([small], {small.name: (256,)}, device=torch.device("cpu"))
(small.up @ small.down).abs()
before = peak()
if sys.argv[1] == "tiles":
    measure([large], {large.name: (256,)}, device=torch.device("cpu"))
else:
    (large.up @ large.down).abs()
print(peak() - before)
"""


#: Bytes of a layer of FLUX's size as float32: 144 MiB.
ONE_DELTA = 12288 * 3072 * 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc here")
@pytest.mark.parametrize(
    ("way", "least", "most"),
    [("tiles", 0, 24 * 2**20), slow("dense", 1.5 * ONE_DELTA, 4 * ONE_DELTA)],
)
def test_peak_memory_does_not_grow_with_the_layer(way: str, least: float, most: float) -> None:
    """Less than a quarter of the layer; dense, which shows that this is seen, takes two."""
    result = run_python(MEMORY, way, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert least <= int(result.stdout) <= most


# --- devices ----------------------------------------------------------------------------------


@needs_cuda
def test_cuda_gives_the_same_sums_without_tf32() -> None:
    device = as_device("cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for subject in awkward_layers():
            ks = (1, min(9, subject.numel))
            here, there = one(subject, *ks), one(subject, *ks, device=device)
            assert math.isclose(here.l1, there.l1, rel_tol=1e-6)
            assert all(math.isclose(here.top_k[k], there.top_k[k], rel_tol=1e-6) for k in ks)
    finally:
        torch.set_float32_matmul_precision(before)
