"""Compression: every delta within the tolerance, in few bytes, the same ones each time."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from drawings.shipped import style_lora, subject_lora
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.generation import TWO_STEPS, LoraPair, build, generate
from support.golden_fusion import golden_fusion, switching_entry
from support.lora_files import (
    needs_real_loras,
    random_pair,
    real_lora,
    run_python,
)
from tiny_pipeline import Family

from klora_compile import compile_fusion, compress, drop_unused, read_adapter, verify_fusion
from klora_compile.cli import main
from klora_compile.report.compression import compression_of
from klora_compile.sources import by_source
from klora_compile.storing.loss import relative_error
from klora_compile.storing.tolerances import LOWEST, tolerances
from klora_runtime import apply_fusion, load_fusion, save_fusion
from klora_runtime.artifact.delta import Dense, LowRank, Stored
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.q.codec import stored_sizes
from klora_runtime.errors import ConfigError

DEMO = (subject_lora("frog"), style_lora("ink"))


def exact_errors(plain: Fusion, small: Fusion) -> dict[tuple[str, str], float]:
    """(layer, slot) -> relative error, from the deltas multiplied out in float64."""
    found = {}
    for one, other in zip(plain.entries, small.entries, strict=True):
        assert one.factors.keys() == other.factors.keys()
        for slot, whole in one.factors.items():
            exact = whole.delta.matrix()
            lost = other.factors[slot].delta.matrix() - exact
            found[one.path, slot] = float(lost.norm() / exact.norm())
    return found


def one_layer(factors: Stored, shape: tuple[int, ...]) -> Fusion:
    """A fusion of one layer with one content slot, as nothing else would matter."""
    entry = replace(switching_entry(), shape=shape, factors={"content": factors, "style": factors})
    return replace(golden_fusion(), entries=(entry,))


def stored(fusion: Fusion) -> Stored:
    return fusion.entries[0].factors["content"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The LoRAs of the demo with the layers of one block alone."""
    folder, paths = tmp_path_factory.mktemp("few"), []
    for path in DEMO:
        tensors = {k: v for k, v in load_file(path).items() if ".mid_block." in k}
        save_file(tensors, folder / path.name)
        paths.append(folder / path.name)
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def block(few: tuple[Path, Path]) -> Fusion:
    return compile_fusion(*few, device="cpu")


@pytest.fixture(scope="module")
def small(block: Fusion) -> Fusion:
    return compress(block, 0.01)


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 150),
    width=st.integers(1, 150),
    rank=st.integers(1, 9),
    kernel=st.sampled_from([(), (3, 3)]),
    size=st.sampled_from([1e-9, 1.0, 1e9]),
    tolerance=st.sampled_from([1e-4, 0.01, 0.2]),
    seed=st.integers(0, 999),
)
def test_any_pair_stays_within_its_tolerance(
    out: int, width: int, rank: int, kernel: tuple[int, ...], size: float, tolerance: float,
    seed: int,
) -> None:  # fmt: skip
    down, up = random_pair(out, width, rank, seed=seed, kernel=kernel)
    up *= torch.logspace(0, -3, rank).view(1, -1, *up.shape[2:])
    delta = LowRank(down * size, up)
    plain = one_layer(Stored(0.5, delta), (out, width, *kernel))
    small = compress(plain, tolerance)
    (error,) = set(exact_errors(plain, small).values())
    found = stored(small)
    assert error <= tolerance * (1 + 1e-6)
    assert found.scale == 0.5
    if found.quantised is None:
        assert found is stored(plain)
    else:
        assert found.quantised.error == pytest.approx(error, rel=1e-3, abs=1e-9)
        assert sum(stored_sizes([found])) < delta.nbytes + 100  # a code of its own


@pytest.mark.slow
@pytest.mark.parametrize("tolerance", [0.001, 0.01, 0.1])
def test_each_layer_of_the_demo_stays_within_the_tolerance(tolerance: float) -> None:
    demo = compile_fusion(*DEMO, device="cpu")
    assert_within_the_tolerance(demo, compress(demo, tolerance), tolerance)


@pytest.mark.parametrize("tolerance", [0.01, 0.1])
def test_each_layer_of_a_block_stays_within_the_tolerance(tolerance: float, block: Fusion) -> None:
    assert_within_the_tolerance(block, compress(block, tolerance), tolerance)


def assert_within_the_tolerance(plain: Fusion, small: Fusion, tolerance: float) -> None:
    errors = exact_errors(plain, small)
    assert 0.9 * tolerance < max(errors.values()) <= tolerance * (1 + 1e-6)
    report = compression_of(small)
    assert report is not None
    assert report.worst == pytest.approx(max(errors.values()), rel=1e-3)
    assert errors[f"{report.layer}.weight", report.slot] > 0.999 * max(errors.values())
    assert report.slots == report.of == len(errors)
    assert 0.96 * tolerance < report.error < report.worst  # few values a layer at 0.1


@pytest.mark.parametrize("tolerance", [0.03, 0.2])
def test_a_tolerance_of_loras_takes_fewer_bytes_for_the_loss_of_the_whole(
    tolerance: float, block: Fusion
) -> None:
    """Deltas whose norms differ much: strong ones lose less than their share, weak ones more."""
    entries = [
        replace(
            entry,
            factors={s: replace(f, scale=f.scale * 3.0**-i) for s, f in entry.factors.items()},
        )
        for i, entry in enumerate(block.entries)
    ]
    plain = replace(block, entries=tuple(entries))
    whole, each = compress(plain, tolerance, by="lora"), compress(plain, tolerance)
    for slot in ("content", "style"):
        assert lost_of(slot, plain, whole) <= tolerance * (1 + 1e-6)
        assert lost_of(slot, plain, whole) > 0.9 * tolerance
    assert packed_bytes(whole) < 0.9 * packed_bytes(each)
    errors = exact_errors(plain, whole)
    assert min(errors.values()) < tolerance < max(errors.values()) <= 0.5 * (1 + 1e-6)


def lost_of(slot: str, plain: Fusion, small: Fusion) -> float:
    """The relative error of all deltas of a LoRA together, from products in float64."""
    lost = whole = 0.0
    for one, other in zip(plain.entries, small.entries, strict=True):
        exact = one.factors[slot].scale * one.factors[slot].delta.matrix(torch.float64)
        found = other.factors[slot].scale * other.factors[slot].delta.matrix(torch.float64)
        lost += float((found - exact).square().sum())
        whole += float(exact.square().sum())
    return math.sqrt(lost / whole)


def packed_bytes(fusion: Fusion) -> float:
    return sum(stored_sizes([each for entry in fusion.entries for each in entry.factors.values()]))


def test_the_smallest_tolerance_of_a_lora_counts_the_least_loss_of_strong_layers() -> None:
    """A layer loses LOWEST at least, which is more than its share where weak ones are many."""
    strong, weak = (Stored(scale, LowRank(*random_pair(60, 80, 2))) for scale in (1.0, 0.01))
    (entry,) = one_layer(strong, (60, 80)).entries
    weaker = [
        replace(entry, module=f"weak.{number}", factors={"content": weak}) for number in range(40)
    ]
    found = tolerances([entry, *weaker], LOWEST, "lora")
    norms = [strong.delta.norm(), *[0.01 * weak.delta.norm()] * 40]
    lost = math.hypot(*(n * share["content"] for n, share in zip(norms, found, strict=True)))
    assert lost <= LOWEST * math.hypot(*norms) * (1 + 1e-6)


def test_a_delta_of_zeros_does_not_disturb_the_tolerance_of_a_lora() -> None:
    pair = LowRank(*random_pair(60, 80, 2))
    zero = LowRank(pair.down, torch.zeros_like(pair.up))
    plain = one_layer(Stored(1.0, pair), (60, 80))
    (entry,) = plain.entries
    empty = replace(entry, module="other", factors={"content": Stored(1.0, zero)})
    small = compress(replace(plain, entries=(entry, empty)), 0.1, by="lora")
    error = lost_of("content", plain, replace(small, entries=small.entries[:1]))
    assert 0.09 < error <= 0.1 * (1 + 1e-6)
    only = compress(replace(plain, entries=(empty,)), 0.1, by="lora")
    assert only.entries[0].factors["content"].delta.norm() == 0.0


def test_what_was_lost_of_all_counts_each_delta_with_its_scale() -> None:
    pair = Stored(1.0, LowRank(*random_pair(60, 80, 2)))
    small = compress(one_layer(pair, (60, 80)), 0.1)
    one = stored(small)
    assert one.quantised is not None
    other = replace(one, scale=3.0, quantised=replace(one.quantised, error=0.0))
    entry = replace(small.entries[0], factors={"content": one, "style": other})
    report = compression_of(replace(small, entries=(entry,)))
    assert report is not None
    assert report.error == pytest.approx(one.quantised.error / math.sqrt(10))


def share(small: Fusion, sources: tuple[Path, Path], folder: Path) -> float:
    """Bytes of a compressed artifact by bytes of its sources."""
    size = save_fusion(small, folder / "small.klora.safetensors")
    return size / sum(path.stat().st_size for path in sources)


@pytest.mark.slow
def test_size_at_one_percent_of_the_demo(tmp_path: Path) -> None:
    """float16 of rank 8: no code of independent Gaussian numbers could do it in 32.5 %."""
    small = compress(drop_unused(compile_fusion(*DEMO, device="cpu")), 0.01)
    assert share(small, DEMO, tmp_path) < 0.35


@pytest.mark.slow
@needs_real_loras
@pytest.mark.parametrize(
    ("content", "style", "most"),
    [
        ("sd2_character.peft", "sd2_popart.kohya", 0.17),
        ("sd15_analog.peft", "sd15_animation.kohya", 0.26),
    ],
)
def test_size_at_one_percent_of_real_loras(
    content: str, style: str, most: float, tmp_path: Path
) -> None:
    pair = real_lora(content), real_lora(style)
    small = compress(drop_unused(compile_fusion(*pair, device="cpu")), 0.01)
    assert share(small, pair, tmp_path) < most


def test_a_component_that_does_not_matter_is_left_out() -> None:
    down, up = random_pair(60, 80, 4)
    small = stored(compress(one_layer(Stored(1.0, LowRank(down * torch.tensor([[1.0], [1.0], [1e-4],
        [1e-5]]), up)), (60, 80)), 0.01))  # fmt: skip
    assert isinstance(small.delta, LowRank)
    assert small.delta.rank == 2


def test_the_wide_component_gets_the_bits() -> None:
    down, up = random_pair(60, 80, 2)
    down = torch.linalg.qr(down.T)[0].T * torch.tensor([[1.0], [0.05]])
    up = torch.linalg.qr(up)[0]
    small = stored(compress(one_layer(Stored(1.0, LowRank(down, up)), (60, 80)), 0.01)).quantised
    assert small is not None
    assert small.levels[0] - small.levels[1] == round(4 * math.log2(20))


@pytest.mark.parametrize("shape", [(40,), (40, 50), (8, 4, 3, 3)])
def test_a_dense_delta(shape: tuple[int, ...]) -> None:
    delta = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    plain = one_layer(Stored(1.0, Dense(delta)), shape)
    small = compress(plain, 0.02)
    assert max(exact_errors(plain, small).values()) <= 0.02
    assert stored(small).quantised is not None


def test_what_cannot_be_smaller_stays_as_it_is() -> None:
    down, up = random_pair(60, 80, 2)
    half = Stored(1.0, LowRank(down.half(), up.half()))
    zero = Stored(1.0, LowRank(torch.zeros(2, 4), torch.zeros(3, 2)))
    for factors, shape in ((half, (60, 80)), (zero, (3, 4))):
        plain = one_layer(factors, shape)
        assert stored(compress(plain, 1e-5)) is factors
        assert compression_of(compress(plain, 1e-5)) is None


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_what_no_step_of_the_format_reaches_stays_as_it_is(size: float) -> None:
    down, up = random_pair(30, 40, 2)
    for delta in (LowRank(down * size, up * size), Dense(up @ down * size)):
        factors = Stored(1.0, delta)
        assert stored(compress(one_layer(factors, (30, 40)), 0.01)) is factors


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1)])
def test_rows_whose_level_the_format_lacks_stay_as_they_are(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    factors = Stored(1.0, LowRank(*random_pair(*shape, 1)))
    small = compress(one_layer(factors, shape), 1e-4)
    assert stored(small) is factors
    save_fusion(small, tmp_path / "x.klora.safetensors")


def test_a_number_too_large_for_its_code_is_stored_beside_it(tmp_path: Path) -> None:
    spike = one_layer(Stored(1.0, Dense(torch.eye(1, 4000)[0])), (4000,))
    small = compress(spike, 0.01)
    assert stored(small).quantised is not None
    save_fusion(small, tmp_path / "x.klora.safetensors")
    again = load_fusion(tmp_path / "x.klora.safetensors")
    assert torch.equal(stored(again).delta.tensors[0], stored(small).delta.tensors[0])
    assert max(exact_errors(spike, again).values()) <= 0.01


def test_thirteen_bits_are_fewer_than_sixteen() -> None:
    pair = LowRank(*random_pair(60, 80, 2, dtype=torch.float16))
    small = stored(compress(one_layer(Stored(1.0, pair), (60, 80)), 2e-4))
    assert small.quantised is not None
    assert 12 < 8 * sum(stored_sizes([small])) / (2 * 140) < 16


def test_reading_and_writing_again_changes_no_byte(small: Fusion, tmp_path: Path) -> None:
    one, other = tmp_path / "a.klora.safetensors", tmp_path / "b.klora.safetensors"
    save_fusion(small, one)
    read = load_fusion(one, check="full")
    save_fusion(read, other)
    assert one.read_bytes() == other.read_bytes()
    for entry, again in zip(small.entries, read.entries, strict=True):
        for slot, held in entry.factors.items():
            found = again.factors[slot].delta
            for tensor, same in zip(held.delta.tensors, found.tensors, strict=True):
                assert tensor.dtype == same.dtype == torch.float32
                assert torch.equal(tensor, same)


def test_the_schedule_is_that_of_the_whole_deltas(block: Fusion) -> None:
    small = compress(block, 0.2)
    for one, other in zip(block.entries, small.entries, strict=True):
        assert (one.timeline, one.scores, one.fate) == (other.timeline, other.scores, other.fate)


def wide() -> Fusion:
    """A layer so large that a decomposition on two threads rounds differently."""
    return one_layer(Stored(1.0, LowRank(*random_pair(1280, 5120, 32))), (1280, 5120))


COMPRESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_compress import wide
from klora_compile import compress
from klora_runtime import save_fusion
out, threads = sys.argv[2:]
torch.set_num_threads(int(threads))
save_fusion(compress(wide(), 0.01), out)
assert torch.get_num_threads() == int(threads)
"""


@pytest.mark.slow
def test_equal_bytes_for_every_number_of_threads(tmp_path: Path) -> None:
    """Of a layer so large that a decomposition on two threads rounds differently."""
    assert torch.get_num_threads() == 1
    save_fusion(compress(wide(), 0.01), tmp_path / "here")
    result = run_python(COMPRESS, Path(__file__).parent, tmp_path / "there", 2, OMP_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_a_pipeline_samples_with_it(
    lora_pairs: dict[Family, LoraPair], mode: str, tmp_path: Path
) -> None:
    plain = lora_pairs["sd1"].fusion(TWO_STEPS)
    path = tmp_path / "small.klora.safetensors"
    save_fusion(compress(plain, 0.01), path)
    results = []
    for fusion in (plain, path):
        pipe = build(TWO_STEPS)
        with apply_fusion(pipe, fusion, mode=mode):
            results.append(generate(pipe, TWO_STEPS))
    difference = float((results[1] - results[0]).norm() / results[0].norm())
    assert 0.0 < difference < 0.01


# --- command line, verify -----------------------------------------------------------------------


def run(*args: object) -> str:
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_tell_what_was_lost(few: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "small.klora.safetensors"
    text = " ".join(run("compile", *few, "-o", out, "--compress", "0.01").split())
    assert re.search(r"compressed 32 of 32 deltas, 5\.\d bits a number, mean rank", text), text
    assert "% of the deltas, at most 1.00% of one (unet." in text
    assert "compressed 32 of 32 deltas" in " ".join(run("inspect", out).split())
    shown = json.loads(run("inspect", out, "--json", "--norms"))
    assert shown["compression"]["worst"] <= 0.01
    quick = json.loads(run("inspect", out, "--json"))
    assert quick["compression"]["bits"] == pytest.approx(shown["compression"]["bits"], rel=0.05)
    unknown = {"error": None, "bits": quick["compression"]["bits"]}
    assert quick["compression"] == shown["compression"] | unknown
    assert {each["bytes"] for row in quick["layers"] for each in row["stored"].values()} == {None}
    assert re.search(r"^ *lost +at most", run("inspect", out), re.MULTILINE)
    assert "% of the deltas, at most" in run("inspect", out, "--norms")
    layers = [each for layer in shown["layers"] for each in layer["stored"].values()]
    assert max(each["error"] for each in layers) == shown["compression"]["worst"]
    assert {each["encoding"] for each in layers} == {"q"}
    assert sum(each["bytes"] for each in layers) == pytest.approx(out.stat().st_size, rel=0.05)

    told = json.loads(run("compile", *few, "-o", out, "--force", "--compress", "0.01", "--json"))
    assert told["compression"] == shown["compression"]
    assert "as near to its sources as it states" in run("verify", out, "--against", *few)


def test_the_command_takes_what_the_tolerance_holds_for(
    few: tuple[Path, Path], tmp_path: Path
) -> None:
    sizes = []
    for by in ((), ("--compress-by", "layer"), ("--compress-by", "lora")):
        out = tmp_path / f"{len(sizes)}.klora.safetensors"
        told = json.loads(run("compile", *few, "-o", out, "--compress", "0.1", *by, "--json"))
        sizes.append((told["bytes_out"], told["compression"]["worst"]))
    assert sizes[0] == sizes[1]
    assert sizes[2][0] < sizes[0][0]
    assert sizes[0][1] <= 0.1 < sizes[2][1]
    assert "as near to its sources as it states" in run("verify", out, "--against", *few)
    alone = ("compile", *few, "-o", tmp_path / "x.klora.safetensors", "--compress-by", "lora")
    result = CliRunner().invoke(main, list(map(str, alone)))
    assert result.exit_code == 2
    assert "--compress-by acts with --compress TOL only; add that." in result.output


def test_verify_notices_an_error_that_is_not_the_stated_one(
    few: tuple[Path, Path], block: Fusion
) -> None:
    small = compress(block, 0.03)  # errors below it lose more by rounding than those below 0.01
    adapters = [read_adapter(path) for path in few]
    assert verify_fusion(small, by_source(*adapters), device="cpu") == []
    index = next(i for i, each in enumerate(small.entries) if "content" in each.factors)
    entry = small.entries[index]
    factors = entry.factors["content"]
    assert factors.quantised is not None
    lie = replace(factors, quantised=replace(factors.quantised, error=0.001))
    entry = replace(entry, factors={**entry.factors, "content": lie})
    entries = [*small.entries[:index], entry, *small.entries[index + 1 :]]
    (found,) = verify_fusion(replace(small, entries=tuple(entries)), by_source(*adapters))
    assert found.startswith(f"{entry.path}: error of compressed content (stated 0.001, found 0.0")
    assert found.endswith(" differs")


@pytest.mark.parametrize("tolerance", [0.0, 1e-6, 0.6, -1.0, float("nan")])
def test_a_tolerance_out_of_range_is_refused(tolerance: float) -> None:
    with pytest.raises(ConfigError) as caught:
        compress(golden_fusion(), tolerance)
    assert str(caught.value) == (
        f"tolerance: expected a number from 1e-05 to 0.5, found {tolerance!r}."
    )


def test_what_a_tolerance_holds_for_is_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        compress(golden_fusion(), 0.1, by="slot")  # type: ignore[arg-type]
    assert str(caught.value) == "by: expected layer or lora, found 'slot'."


def test_nothing_is_as_near_to_a_delta_of_zeros_as_itself() -> None:
    zeros, ones = torch.zeros(3, 4), torch.ones(3, 4)
    assert relative_error(Dense(zeros), Dense(zeros)) == 0.0
    assert relative_error(Dense(zeros), Dense(ones)) == math.inf


def test_what_is_compressed_is_not_compressed_again(small: Fusion) -> None:
    with pytest.raises(ConfigError) as caught:
        compress(small, 0.1)
    assert str(caught.value) == (
        "this fusion is compressed or thin already, and only a lossless one can be "
        "compressed. Compile its sources again."
    )


def test_the_search_runs_on_one_thread() -> None:
    """Sums in the order of the threads would give other bits on another machine."""
    threads, before = set(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compress(golden_fusion(), 0.01, on_layer=lambda *_: threads.add(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == {1}
