"""Compressed factors as `FORMAT.md` defines them, against a decoder that goes number by number."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klora_compile.storing.trellis import nearest
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.factors import packed_problems
from klora_runtime.artifact.q.bitstream import Rows, pack, sizes, unpack
from klora_runtime.artifact.q.codec import PackedSlot, pack_factors, stored_sizes, unpack_factors
from klora_runtime.artifact.q.form import MAX_CLASS, MAX_LEVEL, Quantised
from klora_runtime.artifact.q.values import indices_of, shifted, steps_of, values_of
from klora_runtime.artifact.safetensors_file import TensorInfo

SEEDS = st.integers(0, 2**31)


def literal(packed: bytes, slots: list[PackedSlot]) -> list[list[list[list[float]]]]:
    """Section 2 of the spec: slot -> matrix -> row -> number."""
    rows = []  # (numbers, level, slot, matrix, row)
    for number, slot in enumerate(slots):
        levels = slot.quantised.levels
        if slot.dense:
            length = math.prod(slot.shape[1:]) if len(slot.shape) > 1 else slot.shape[0]
            count = math.prod(slot.shape) // length
            rows += [(length, levels[0], number, 0, row) for row in range(count)]
            continue
        for matrix, length in enumerate((math.prod(slot.shape[1:]), slot.shape[0])):
            rows += [(length, level, number, matrix, row) for row, level in enumerate(levels)]
    rows.sort(key=lambda row: row[0])  # stable
    classes = [level - math.floor(math.log2(length**2)) for length, level, *_ in rows]
    bits = [max(0, math.ceil((own - 8) / 4)) for own in classes]
    codes = [own - 4 * width for own, width in zip(classes, bits, strict=True)]
    high: dict[int, list[int]] = {}
    begin = 0
    for code in sorted(set(codes)):
        size = int.from_bytes(packed[begin : begin + 4], "little")
        raw = zlib.decompress(packed[begin + 4 : begin + 4 + size], -15)
        begin += 4 + size
        numbers = iter(byte - 256 if byte > 127 else byte for byte in raw)
        for index, own in enumerate(codes):
            if own == code:
                high[index] = list(itertools.islice(numbers, rows[index][0]))
        assert next(numbers, None) is None
    for width in sorted(set(bits) - {0}):
        mine = [index for index, own in enumerate(bits) if own == width]
        count = sum(rows[index][0] for index in mine)
        size = math.ceil(count * width / 8)
        whole = int.from_bytes(packed[begin : begin + size], "little")
        begin += size
        for index in mine:
            for place in range(rows[index][0]):
                high[index][place] = high[index][place] * 2**width + whole % 2**width
                whole >>= width
        assert whole == 0
    assert begin == len(packed)
    found: list[list[list[list[float]]]] = [[[], []] for _ in slots]
    for index, (_, level, slot_number, matrix, _) in enumerate(rows):
        step = slots[slot_number].quantised.step
        step = float(torch.tensor(step * 2.0 ** (-level / 8), dtype=torch.float32))
        row = []
        for place, number in enumerate(high[index]):
            before = high[index][:place][::-1][::2]
            second = sum(one % 2 for one in before) % 2
            sign = (number > 0) - (number < 0)
            exact = (2 * number - second * sign) * (step / 2)
            row.append(float(torch.tensor(exact, dtype=torch.float32)))
        found[slot_number][matrix].append(row)
    return found


def slot_of(shape: tuple[int, ...], levels: list[int], *, dense: bool = False) -> PackedSlot:
    own = tuple(sorted(levels, reverse=True))
    return PackedSlot(0.5, shape, dense, Quantised(0.3, own[:1] if dense else own, 0.01))


def numbers_of(slots: list[PackedSlot], seed: int) -> list[Stored]:
    """Random factors that each slot can hold, all sizes of its rows."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Stored] = []
    for slot in slots:
        matrices = []
        for count, length in slot.matrices:
            levels = torch.tensor(slot.quantised.levels).expand(count)
            limits = Rows(length, levels).limits.unsqueeze(1)
            spread = torch.rand(count, length, generator=generator, dtype=torch.float64)
            indices = ((2 * spread - 1) * limits).floor().int()
            matrices.append(values_of(indices, steps_of(slot.quantised.step, levels.tolist())))
        if slot.dense:
            found.append(Stored(0.5, Dense(matrices[0].reshape(slot.shape)), slot.quantised))
            continue
        (out, *inner), rank = slot.shape, len(slot.quantised.levels)
        down = matrices[0].reshape(rank, *inner)
        up = matrices[1].T.reshape(out, rank, *(1 for _ in inner[1:])).contiguous()
        found.append(Stored(0.5, LowRank(down, up), slot.quantised))
    return found


def levels_of(least: int) -> st.SearchStrategy[list[int]]:
    """Levels that rows of that many numbers may have."""
    most = min(MAX_LEVEL, MAX_CLASS + (least * least).bit_length() - 1)
    return st.lists(st.integers(0, most), min_size=1, max_size=5)


@st.composite
def slots(draw: st.DrawFn) -> PackedSlot:
    shape = draw(st.sampled_from([(9, 40), (40, 9), (12, 4, 3, 3), (30,), (1, 1), (64, 64)]))
    least = min(shape[0], math.prod(shape[1:]))
    levels = draw(levels_of(least if len(shape) > 1 else shape[0]))
    return slot_of(shape, levels, dense=len(shape) == 1 or draw(st.booleans()))


@settings(max_examples=60, deadline=None)
@given(stored=st.lists(slots(), min_size=1, max_size=4), seed=SEEDS)
def test_packed_slots_are_those_of_the_spec(stored: list[PackedSlot], seed: int) -> None:
    written = numbers_of(stored, seed)
    packed = pack_factors(written)
    expected = literal(packed.numpy().tobytes(), stored)
    for one, other, rows in zip(written, unpack_factors(packed, stored), expected, strict=True):
        assert type(one.delta) is type(other.delta)
        assert (one.scale, one.quantised) == (other.scale, other.quantised)
        for tensor, same in zip(one.delta.tensors, other.delta.tensors, strict=True):
            assert same.dtype == torch.float32
            assert torch.equal(tensor, same)
        if isinstance(other.delta, Dense):
            assert other.delta.values.flatten().tolist() == list(itertools.chain(*rows[0]))
        else:
            assert other.delta.down.flatten(1).tolist() == rows[0]
            assert other.delta.up.flatten(1).T.tolist() == rows[1]


def test_packed_bytes_may_begin_anywhere() -> None:
    """As they do where a file was read in one piece."""
    stored = [slot_of((9, 40), [30, 20])]
    packed = pack_factors(numbers_of(stored, 0))
    shifted_by_one = torch.cat([packed.new_zeros(1), packed])[1:]
    (one,), (other,) = unpack_factors(shifted_by_one, stored), unpack_factors(packed, stored)
    assert all(map(torch.equal, one.delta.tensors, other.delta.tensors))


def test_factors_share_one_block_of_memory() -> None:
    stored = [slot_of((9, 40), [30, 20]), slot_of((40, 9), [7], dense=True)]
    found = unpack_factors(pack_factors(numbers_of(stored, 0)), stored)
    tensors = [tensor for each in found for tensor in each.delta.tensors]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_sizes_add_up_to_the_bytes() -> None:
    stored = [slot_of((64, 64), [40, 31, 9]), slot_of((9, 40), [25], dense=True)]
    factors = numbers_of(stored, 3)
    whole = len(pack_factors(factors))
    found = stored_sizes(factors)
    assert sum(found) == pytest.approx(whole, abs=2)  # each run of bits ends in whole bytes
    assert found[0] > found[1] > 0.0


def test_the_size_of_a_slot_is_that_of_its_rows() -> None:
    """Not of those before it that are as long."""
    many, few = slot_of((64, 64), [60, 60]), slot_of((64, 64), [20, 20])
    found = stored_sizes(numbers_of([many, few, many], 0))
    assert found[0] == pytest.approx(found[2])
    assert found[0] > 1.5 * found[1]


def test_rows_alike_share_a_code_whatever_they_are_of() -> None:
    """What is stored of a slot grows by its numbers, not by a code of its own."""
    slot = slot_of((64, 64), [24])
    sizes_of = [len(pack_factors(numbers_of([slot] * count, 0))) for count in (1, 4, 8)]
    assert sizes_of[2] - sizes_of[1] < 1.2 * 4 / 3 * (sizes_of[1] - sizes_of[0])


def test_a_row_is_coded_with_few_bits_more_than_its_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = Rows(1000, torch.full((50,), 27 + 8))  # class 16: 16 in root mean square
    numbers = (16 * torch.randn(50, 1000, generator=generator)).round().int()
    entropy = math.log2(16 * math.sqrt(2 * math.pi * math.e))
    (found,) = sizes([rows], [numbers])
    assert entropy - 0.05 < float(found.mean()) < entropy + 0.1
    assert 8 * len(pack([rows], [numbers])) == pytest.approx(float(found.sum()) * 1000, abs=8)


def test_groups_take_no_time_for_codes_that_they_lack() -> None:
    """As a hostile file could have it: thousands of lengths, and rows of all codes."""
    groups = [Rows(length, torch.tensor([length % 60])) for length in range(1, 2001)]
    numbers = [torch.zeros(1, rows.length, dtype=torch.int32) for rows in groups]
    packed = pack(groups, numbers)
    begin = time.process_time()
    found = unpack(packed, groups)
    assert time.process_time() - begin < 1.5
    assert all(map(torch.equal, found, numbers))


@pytest.mark.parametrize("change", ["cut", "more", "length", "no code", "empty"])
def test_other_sizeare_refused(change: str) -> None:
    stored = [slot_of((64, 64), [40, 24])]
    packed = pack_factors(numbers_of(stored, 0))
    wrong = {
        "cut": packed[:-1],
        "more": torch.cat([packed, packed[:1]]),
        "length": torch.cat([packed[:1] + 1, packed[1:]]),
        "no code": torch.cat([packed[:4], packed[4:5] | 7, packed[5:]]),
        "empty": packed[:0],
    }[change]
    with pytest.raises(ValueError, match=r"its numbers need|not one of|invalid"):
        unpack_factors(wrong, stored)


def test_bits_after_the_last_number_are_zero() -> None:
    stored = [slot_of((7,), [15], dense=True)]  # class 10: 1 bit kept apart, of 7 numbers
    packed = pack_factors(numbers_of(stored, 0))
    packed[-1] |= 128
    with pytest.raises(ValueError, match="the bits after its numbers are not 0"):
        unpack_factors(packed, stored)


@pytest.mark.parametrize("change", ["no end", "more after it"])
def test_a_stream_is_all_of_its_bytes(change: str) -> None:
    rows = Rows(4, torch.tensor([10]))
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    numbers = coder.compress(bytes(4)) + coder.flush(zlib.Z_FULL_FLUSH)
    stream = numbers if change == "no end" else numbers + coder.flush() + bytes(1)
    data = torch.tensor([*len(stream).to_bytes(4, "little"), *stream], dtype=torch.uint8)
    with pytest.raises(ValueError, match="a stream in it is not one of 4 numbers"):
        unpack(data, [rows])


def test_the_highest_class_is_that_of_the_spec() -> None:
    assert MAX_CLASS == 68
    assert Rows(1, torch.tensor([MAX_CLASS])).bits.item() == 15


def test_a_stream_of_more_numbers_is_refused_before_it_is_read() -> None:
    rows = Rows(4, torch.tensor([10]))
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(10**8)) + coder.flush()
    data = torch.frombuffer(bytearray(len(bomb).to_bytes(4, "little") + bomb), dtype=torch.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="a stream in it is not one of 4 numbers"):
            unpack(data, [rows])
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("size", "fits"), [(10, True), (9, False)])
def test_a_number_takes_a_bit_or_more(size: int, fits: bool) -> None:
    slot = {"kind": "dense", "encoding": "q", "packed": "x", "scale": 1.0, "step": 1.0}
    entry = {"shape": [80], "factors": {"content": {**slot, "levels": [9], "error": 0.0}}}
    found = list(packed_problems([entry], {"x": TensorInfo("U8", (size,), 0, size)}))
    problem = ("tensor x", f"{size} bytes cannot hold the 80 numbers of its slots")
    assert found == ([] if fits else [problem])


# --- values -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 40), most=st.sampled_from([1, 3, 2**22]), seed=SEEDS)
def test_values_give_their_numbers_back(length: int, most: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-most, most + 1, (3, length), generator=generator, dtype=torch.int32)
    steps = steps_of(0.7, [200, 13, 0])
    assert torch.equal(indices_of(values_of(indices, steps), steps), indices)


def test_values_between_the_points_of_a_grid_are_refused() -> None:
    steps = steps_of(1.0, [0])
    with pytest.raises(ValueError, match="compressed factors were changed; compress them again"):
        indices_of(torch.tensor([[0.0, 0.5, 1.5]]), steps)
    with pytest.raises(ValueError, match="compressed factors were changed"):
        indices_of(torch.tensor([[1.0, 0.5 * (1 + 1e-6)]]), steps)


def test_an_odd_number_moves_the_grid_of_every_second_number_after_it() -> None:
    parities = torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0]], dtype=torch.uint8)
    assert shifted(parities).tolist() == [[0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0]]


def test_a_level_is_an_eighth_of_an_octave() -> None:
    levels = list(range(MAX_LEVEL + 1))
    expected = torch.tensor([[3.0 * 2.0 ** (-level / 8)] for level in levels])
    assert torch.allclose(steps_of(3.0, levels), expected, rtol=1e-7, atol=0)
    assert float(steps_of(1e-28, [MAX_LEVEL])) > torch.finfo(torch.float32).tiny
    assert torch.isfinite(values_of(torch.tensor([[2**22]]).int(), steps_of(1e28, [0]))).all()


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 5), spread=st.sampled_from([0.3, 1.0, 2.0]), seed=SEEDS)
def test_no_other_numbers_are_nearer(length: int, spread: float, seed: int) -> None:
    """Of all combinations within reach."""
    targets = spread * torch.randn(1, length, generator=torch.Generator().manual_seed(seed))
    reach = range(-9, 10) if length < 4 else range(-4, 5)
    targets.clamp_(-3, 3) if length >= 4 else targets.clamp_(-8, 8)
    every = torch.tensor(list(itertools.product(reach, repeat=length)), dtype=torch.int32)
    ones = torch.ones(len(every), 1)
    least = float((values_of(every, ones) - targets).square().sum(1).min())
    found = values_of(nearest(targets), ones[:1])
    assert float((found - targets).square().sum()) == pytest.approx(least, abs=1e-5)


def test_two_grids_lose_less_than_one() -> None:
    """At equal steps a single grid loses 1 / 12; the trellis is known for 0.8 to 1 dB of it at
    equal bits, and has more points."""
    targets = 20 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    indices = nearest(targets)
    lost = float((values_of(indices, torch.ones(200, 1)) - targets).square().mean())
    assert lost == pytest.approx(0.79 / 12, rel=0.02)
    assert float(indices.float().square().mean()) == pytest.approx(400, rel=0.02)


def test_rows_are_chosen_alike_whatever_is_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = 3 * torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    together = nearest(targets)
    assert torch.equal(torch.cat([nearest(row.unsqueeze(0)) for row in targets]), together)
    monkeypatch.setattr("klora_compile.storing.trellis._HELD", 6 * 50 * 2)
    assert torch.equal(nearest(targets), together)
