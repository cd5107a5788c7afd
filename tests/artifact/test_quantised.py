"""Compressed factors as `FORMAT.md` defines them, against a decoder that goes number by number."""

from __future__ import annotations

import itertools
import math
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klora_compile.storing.trellis import Trellis
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.factors import packed_problems
from klora_runtime.artifact.q.bitstream import Rows, pack, sizes, unpack
from klora_runtime.artifact.q.codec import PackedSlot, pack_factors, stored_sizes, unpack_factors
from klora_runtime.artifact.q.form import MAX_CLASS, MAX_LEVEL, Quantised
from klora_runtime.artifact.q.values import indices_of, shifted, steps_of, values_of
from klora_runtime.artifact.safetensors_file import TensorInfo

SEEDS = st.integers(0, 2**31)


def rows_of(slots: list[PackedSlot]) -> list[tuple[int, int, int, int]]:
    """(n, level, slot, matrix) of each row, in the order of the JSON."""
    rows = []
    for number, slot in enumerate(slots):
        levels = slot.quantised.levels
        if slot.dense:
            length = math.prod(slot.shape[1:]) if len(slot.shape) > 1 else slot.shape[0]
            rows += [(length, levels[0], number, 0)] * (math.prod(slot.shape) // length)
            continue
        for matrix, length in enumerate((math.prod(slot.shape[1:]), slot.shape[0])):
            rows += [(length, level, number, matrix) for level in levels]
    return rows


def widths_of(rows: list[tuple[int, int, int, int]]) -> tuple[list[int], list[int]]:
    """The width and the code of each row."""
    classes = [level - math.floor(math.log2(length**2)) for length, level, *_ in rows]
    widths = [max(0, math.ceil((own - 4) / 4)) for own in classes]
    return widths, [own - 4 * width for own, width in zip(classes, widths, strict=True)]


def literal(packed: bytes, slots: list[PackedSlot]) -> list[list[list[list[float]]]]:
    """Section 2 of the spec: slot -> matrix -> row -> number."""
    rows = rows_of(slots)
    widths, codes = widths_of(rows)
    parts = [math.ceil(length / 8) for length, *_ in rows]
    order = sorted(range(len(rows)), key=lambda row: (codes[row], widths[row], rows[row][0]))
    begin, high = 0, dict[int, list[int]]()
    for code in sorted(set(codes)):
        mine, raw = [row for row in order if codes[row] == code], b""
        while len(raw) < sum(4 * parts[row] for row in mine):
            end = begin + 4 + int.from_bytes(packed[begin : begin + 4], "little")
            raw += zlib.decompress(packed[begin + 4 : end], -15)
            begin = end
        for row in mine:
            own, raw = raw[: 4 * parts[row]], raw[4 * parts[row] :]
            halves = [byte & 15 for byte in own] + [byte >> 4 for byte in own]
            high[row] = [half - 16 if half > 7 else half for half in halves]
        assert raw == b""
    low = {row: [0] * 8 * parts[row] for row in order}
    for _, group in itertools.groupby(order, lambda row: (codes[row], widths[row], rows[row][0])):
        mine, bit, left = list(group), 0, widths[order[0]]
        left = widths[mine[0]]
        kinds = [left > 0, (left - 1) % 2 and left > 0, (left - 1) // 2 % 2 and left > 0]
        planes = [bits for bits, there in zip((1, 1, 2), kinds, strict=True) if there]
        for bits in planes + [4] * (max(0, left - 1) // 4):
            for row in mine:
                for place in range(bits * parts[row]):
                    byte = packed[begin]
                    begin += 1
                    for number in range(place, 8 * parts[row], bits * parts[row]):
                        low[row][number] += byte % 2**bits << bit
                        byte >>= bits
            bit += bits
    count = (len(packed) - begin) // 8
    words = [
        int.from_bytes(packed[place : place + 4], "little", signed=place >= begin + 4 * count)
        for place in range(begin, len(packed), 4)
    ]
    assert len(words) == 2 * count
    extra = dict(zip(words[:count], words[count:], strict=True))
    found: list[list[list[list[float]]]] = [[[], []] for _ in slots]
    values, place = dict[int, list[float]](), 0
    for row in order:
        step = slots[rows[row][2]].quantised.step
        step = float(torch.tensor(step * 2.0 ** (-rows[row][1] / 8), dtype=torch.float32))
        whole, width = [], widths[row]
        for one, other in zip(high[row], low[row], strict=True):
            term = extra.get(place, 0) * (1 if width else 2)
            whole.append((one + term) * 2**width + other)
            place += 1
        assert not any(whole[rows[row][0] :])
        values[row] = exact_values(whole[: rows[row][0]], parts[row], step, large=width > 0)
    for row, (_, _, slot_number, matrix) in enumerate(rows):
        found[slot_number][matrix].append(values[row])
    return found


def exact_values(whole: list[int], part: int, step: float, *, large: bool) -> list[float]:
    found = []
    for place, number in enumerate(whole):
        before = whole[place // part * part : place][::-1][::2]
        second = sum(one % 2 for one in before) % 2
        sign = (number > 0) - (number < 0)
        exact = 2 * number + second if large else 2 * number - second * sign
        found.append(float(torch.tensor(exact * (step / 2), dtype=torch.float32)))
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
            rows = Rows(length, levels)
            limits = (8 << rows.bits).unsqueeze(1)
            spread = torch.rand(count, length, generator=generator, dtype=torch.float64)
            beyond = 1 + 5 * (torch.rand(count, length, generator=generator) < 0.02)
            indices = ((2 * spread - 1) * limits * beyond).floor().int()
            steps = steps_of(slot.quantised.step, levels)
            matrices.append(values_of(indices, steps, rows.large))
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
    assert all(tensor.is_contiguous() or tensor.T.is_contiguous() for tensor in tensors)


def test_sizes_add_up_to_the_bytes() -> None:
    stored = [slot_of((64, 64), [40, 31, 9]), slot_of((9, 40), [25], dense=True)]
    factors = numbers_of(stored, 3)
    whole = len(pack_factors(factors))
    found = stored_sizes(factors)
    assert sum(found) == pytest.approx(whole, abs=1e-6)
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
    assert entropy - 0.05 < float(found.mean()) / 1000 < entropy + 0.1
    assert 8 * len(pack([rows], [numbers])) == pytest.approx(float(found.sum()))


def unpacked(packed: torch.Tensor, groups: list[Rows]) -> list[torch.Tensor]:
    """The values in half steps."""
    found = [torch.empty(len(rows.levels), rows.length) for rows in groups]

    def use(group: int, rows: torch.Tensor, points: torch.Tensor) -> None:
        found[group][rows] = points

    unpack(packed, groups, use)
    return found


def test_rows_of_many_lengths_and_codes() -> None:
    """As a hostile file could have it: hundreds of lengths, and rows of all codes."""
    groups = [Rows(length, torch.tensor([length % 60])) for length in range(1, 301)]
    numbers = [torch.zeros(1, rows.length, dtype=torch.int32) for rows in groups]
    found = unpacked(pack(groups, numbers), groups)
    assert all(not each.any() for each in found)


def test_rows_are_decoded_alike_however_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [slot_of((9, 40), [60, 50, 21, 20, 3])]
    written = numbers_of(stored, 1)
    packed = pack_factors(written)
    monkeypatch.setattr("klora_runtime.artifact.q.bitstream._TOGETHER", 80)
    (found,) = unpack_factors(packed, stored)
    assert all(map(torch.equal, found.delta.tensors, written[0].delta.tensors))


def test_a_code_may_have_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [slot_of((64, 64), [40, 24])]
    written = numbers_of(stored, 0)
    monkeypatch.setattr("klora_runtime.artifact.q.bitstream._BLOCK", 50)
    packed = pack_factors(written)
    (found,) = unpack_factors(packed, stored)
    assert all(map(torch.equal, found.delta.tensors, written[0].delta.tensors))
    assert literal(packed.numpy().tobytes(), stored)[0][0] == found.delta.down.tolist()


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
    with pytest.raises(ValueError, match=r"its numbers need|not one of|invalid|ascend"):
        unpack_factors(wrong, stored)


@pytest.mark.parametrize("level", [15, 3])
def test_padding_is_zero(level: int) -> None:
    rows = Rows(7, torch.tensor([level]))  # with planes, and without
    eight = Rows(8, torch.tensor([level + 1]))  # of the same class
    assert (eight.classes == rows.classes).all()
    packed = pack([eight], [torch.tensor([[1, 0, 0, 0, 0, 0, 0, 2]]).int()])
    with pytest.raises(ValueError, match="the numbers after a row's last one are not 0"):
        unpacked(packed, [rows])
    fine = pack([eight], [torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]]).int()])
    assert unpacked(fine, [rows])[0].tolist() == [[2, 0, 0, 0, 0, 0, 0]]


def words(*numbers: int) -> torch.Tensor:
    data = b"".join((number % 2**32).to_bytes(4, "little") for number in numbers)
    return torch.tensor(list(data), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("terms", "why"),
    [
        ((3,), "it has .* bytes, its numbers need"),
        ((3, 3, 1, 1), "do not ascend below 16"),
        ((4, 3, 1, 1), "do not ascend below 16"),
        ((16, 1), "do not ascend below 16"),
        ((-1, 1), "do not ascend below 16"),
        ((3, 0), "a term of its large numbers is not one of 1 to 4194304"),
        ((3, 2**22 + 1), "a term of its large numbers is not one of 1 to 4194304"),
        ((3, -(2**31)), "a term of its large numbers is not one of 1 to 4194304"),
        ((3, 2**22), "a number in it is not within 4194304"),
        ((15, 1), "the numbers after a row's last one are not 0"),
    ],
)
@pytest.mark.parametrize("level", [20, 3])
def test_terms_that_lie_are_refused(level: int, terms: tuple[int, ...], why: str) -> None:
    rows = Rows(15, torch.tensor([level]))
    packed = pack([rows], [torch.ones(1, 15, dtype=torch.int32)])
    good = unpacked(torch.cat([packed, words(3, 5)]), [rows])[0]
    assert len(good[0].unique()) > 1
    with pytest.raises(ValueError, match=why):
        unpacked(torch.cat([packed, words(*terms)]), [rows])


@pytest.mark.parametrize("level", [20, 3])
def test_large_numbers_come_back(level: int) -> None:
    rows = Rows(8, torch.tensor([level]))
    numbers = torch.tensor([[2**22, -(2**22), 9, 8, 7, -8, -9, -10]], dtype=torch.int32)
    (found,) = unpacked(pack([rows], [numbers]), [rows])
    assert torch.equal(found, values_of(numbers, torch.full((1, 1), 2.0), rows.large))


@pytest.mark.parametrize("change", ["no end", "more after it"])
def test_a_stream_is_all_of_its_bytes(change: str) -> None:
    rows = Rows(8, torch.tensor([8]))
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    numbers = coder.compress(bytes(4)) + coder.flush(zlib.Z_FULL_FLUSH)
    stream = numbers if change == "no end" else numbers + coder.flush() + bytes(1)
    data = torch.tensor([*len(stream).to_bytes(4, "little"), *stream], dtype=torch.uint8)
    with pytest.raises(ValueError, match="a stream in it is not one of 8 numbers"):
        unpacked(data, [rows])


def test_the_highest_class_is_that_of_the_spec() -> None:
    assert MAX_CLASS == 68
    assert Rows(1, torch.tensor([MAX_CLASS])).bits.item() == 16


def test_a_stream_of_more_numbers_is_refused_before_it_is_read() -> None:
    rows = Rows(8, torch.tensor([8]))
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = coder.compress(bytes(10**8)) + coder.flush()
    data = torch.frombuffer(bytearray(len(bomb).to_bytes(4, "little") + bomb), dtype=torch.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="a stream in it is not one of 8 numbers"):
            unpacked(data, [rows])
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("size", "fits"), [(5, True), (4, False)])
def test_two_numbers_take_a_bit_or_more(size: int, fits: bool) -> None:
    slot = {"kind": "dense", "encoding": "q", "packed": "x", "scale": 1.0, "step": 1.0}
    entry = {"shape": [80], "factors": {"content": {**slot, "levels": [9], "error": 0.0}}}
    found = list(packed_problems([entry], {"x": TensorInfo("U8", (size,), 0, size)}))
    problem = ("tensor x", f"{size} bytes cannot hold the 80 numbers of its slots")
    assert found == ([] if fits else [problem])


# --- values -------------------------------------------------------------------------------------

LARGE = torch.tensor([True, False, True])


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 40), most=st.sampled_from([1, 3, 2**22]), seed=SEEDS)
def test_values_give_their_numbers_back(length: int, most: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-most, most + 1, (3, length), generator=generator, dtype=torch.int32)
    steps = steps_of(0.7, [200, 13, 0])
    for large in (LARGE, ~LARGE):
        assert torch.equal(indices_of(values_of(indices, steps, large), steps, large), indices)


@pytest.mark.parametrize("row", [[0.0, 0.5, 1.5], [0.5 * (1 + 1e-6)], [math.nan], [math.inf]])
@pytest.mark.parametrize("large", [True, False])
def test_values_between_the_points_of_a_grid_are_refused(row: list[float], large: bool) -> None:
    with pytest.raises(ValueError, match="compressed factors were changed; compress them again"):
        indices_of(torch.tensor([row]), steps_of(1.0, [0]), torch.tensor([large]))


def test_an_odd_number_moves_the_grid_of_every_second_number_after_it_in_its_part() -> None:
    parities = torch.zeros(2, 47, dtype=torch.uint8)  # parts of 6 numbers, the last of 5
    parities[0, 0] = parities[1, 7] = parities[1, 9] = 1
    found = shifted(parities)
    assert found[0].nonzero().flatten().tolist() == [1, 3, 5]
    assert found[1].nonzero().flatten().tolist() == [8]


def test_a_level_is_an_eighth_of_an_octave() -> None:
    levels = list(range(MAX_LEVEL + 1))
    expected = torch.tensor([[3.0 * 2.0 ** (-level / 8)] for level in levels])
    assert torch.allclose(steps_of(3.0, levels), expected, rtol=1e-7, atol=0)
    assert float(steps_of(1e-28, [MAX_LEVEL])) > torch.finfo(torch.float32).tiny
    largest = values_of(torch.tensor([[2**22]]).int(), steps_of(1e28, [0]), LARGE[:1])
    assert torch.isfinite(largest).all()


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 5), spread=st.sampled_from([0.3, 1.0, 2.0]), seed=SEEDS)
def test_no_other_numbers_are_nearer(length: int, spread: float, seed: int) -> None:
    """Of all combinations within reach, for each of the eight parts."""
    generator = torch.Generator().manual_seed(seed)
    targets = spread * torch.randn(2, 8 * length, generator=generator)
    reach = range(-9, 10) if length < 4 else range(-4, 5)
    targets.clamp_(-3, 3) if length >= 4 else targets.clamp_(-8, 8)
    every = torch.zeros(len(reach) ** length, 8 * length, dtype=torch.int32)
    every[:, :length] = torch.tensor(list(itertools.product(reach, repeat=length)))
    large = torch.tensor([True, False])
    found = Trellis().nearest(2 * targets, large) / 2
    for kind, target, mine in zip(large, targets, found, strict=True):
        known = values_of(every, torch.ones(len(every), 1), kind.expand(len(every)))[:, :length]
        for part in range(8):
            own = slice(part * length, (part + 1) * length)
            least = float((known - target[own]).square().sum(1).min())
            assert float((mine[own] - target[own]).square().sum()) == pytest.approx(least, abs=1e-4)


def test_two_grids_lose_less_than_one() -> None:
    """At equal steps a single grid loses 1 / 12; the trellis is known for 0.8 to 1 dB of it at
    equal bits, and has more points."""
    targets = 20 * torch.randn(200, 1200, generator=torch.Generator().manual_seed(0))
    for large in (True, False):
        points = Trellis().nearest(2 * targets, torch.full((200,), large)) / 2
        assert float((points - targets).square().mean()) == pytest.approx(0.8 / 12, rel=0.02)
        assert float(points.square().mean()) == pytest.approx(400, rel=0.02)
        indices_of(points, torch.ones(200, 1), torch.full((200,), large))


def test_rows_are_chosen_alike_whatever_is_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = 6 * torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    large, trellis = torch.tensor([True, False] * 4)[:7], Trellis()
    together = trellis.nearest(targets, large)
    alone = [trellis.nearest(targets[i : i + 1], large[i : i + 1]) for i in range(7)]
    assert torch.equal(torch.cat(alone), together)
    monkeypatch.setattr("klora_compile.storing.trellis._SIDE_BY_SIDE", 16)
    assert torch.equal(Trellis().nearest(targets, large), together)
