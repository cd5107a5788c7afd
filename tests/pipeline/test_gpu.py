"""The same on a GPU: decisions, latents, and every bit back. Skipped where there is none."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import sampling
from support.applying import Apply
from support.generation import TOLERANCE, Case, LoraPair, build, generate, progress
from tiny_pipeline import Family, parameters, relative_difference

from klora_compile import compile_fusion
from klora_compile.measuring.batches import ELEMENTS, _batches, measure_batches
from klora_compile.measuring.courier import Courier
from klora_compile.measuring.tiles import Scratch, measure_layer
from klora_compile.reading.adapter import read_adapter
from klora_compile.verify import verify_fusion
from klora_runtime import apply_fusion
from klora_runtime.artifact.delta import LowRank

DEVICE = "cuda"
CASES = [
    Case(20, "DDIM", "batched", "sd1", "s"),
    Case(20, "Euler", "off", "sdxl", "s*"),
    Case(20, "PNDM", "off", "img2img", "s", "authors"),
    Case(20, "Heun", "batched", "sd2", "s*"),
]

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device here"
)


def test_decisions_do_not_depend_on_the_device(lora_pairs: dict[Family, LoraPair]) -> None:
    loras = lora_pairs["sdxl"]
    there = compile_fusion(loras.content, loras.style, device=DEVICE)
    content, style = read_adapter(loras.content), read_adapter(loras.style)
    assert verify_fusion(there, {"content": content, "style": style}, device="cpu") == []
    here = compile_fusion(loras.content, loras.style, device="cpu")
    for steps in (4, 20, 50, 100):
        for index in range(steps):
            t = (index + 0.5) / steps
            for one, other in zip(there.entries, here.entries, strict=True):
                assert one.timeline.at(t) == other.timeline.at(t)


def test_measuring_waits_for_nothing_before_a_batch_is_read() -> None:
    """Layers of FLUX's largest shape, and enough of one of SDXL's for several batches."""
    device = torch.device(DEVICE)
    torch.manual_seed(0)
    shapes = [(3072, 12288), *[(1280, 1280)] * 70]
    tasks = [
        (LowRank(torch.randn(32, inner), torch.randn(out, 32)), (1024, 8192))
        for out, inner in shapes
    ]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = dict(measure_batches(tasks, device))
    assert torch.cuda.max_memory_allocated() - before < 3 * 4 * ELEMENTS
    courier = Courier(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in _batches(tasks, ELEMENTS):
            batch.start(courier)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for place in (0, 1, 70):
        expected = measure_layer(*tasks[place], Scratch())
        assert found[place].l1 == pytest.approx(expected.l1, rel=1e-6)
        assert found[place].top_k == pytest.approx(expected.top_k, rel=1e-6)
        assert found[place].frobenius == pytest.approx(expected.frobenius, rel=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_latents_equal_the_reference(
    case: Case, apply: Apply, lora_pairs: dict[Family, LoraPair]
) -> None:
    loras = lora_pairs[case.family]
    other = build(case).to(DEVICE)
    with sampling(other, loras.reference(case), progress(case)):
        expected = generate(other, case).cpu()
    pipe = build(case).to(DEVICE)
    before = parameters(pipe)
    handle = apply(pipe, loras.fusion(case))
    assert relative_difference(generate(pipe, case).cpu(), expected) <= TOLERANCE
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in parameters(pipe).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_moved_after_applying(
    dtype: torch.dtype, apply: Apply, lora_pairs: dict[Family, LoraPair]
) -> None:
    case = CASES[0]
    pipe: Any = build(case).to(dtype)
    bare = parameters(pipe)
    handle = apply(pipe, lora_pairs["sd1"].fusion(case))
    pipe.to(DEVICE)
    generate(pipe, case)
    assert "factors on cuda:0" in handle.report().nbytes
    assert all(where.endswith("cuda:0") for where in handle.report().nbytes)
    handle.remove()
    pipe.to("cpu")
    assert all(torch.equal(value, bare[name]) for name, value in parameters(pipe).items())


def synchronisations(pipe: Any, case: Case) -> int:
    """How often the host waits for the GPU during one generation."""
    generate(pipe, case)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(pipe, case)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_more_synchronisations_than_the_bare_pipeline(
    case: Case, apply: Apply, lora_pairs: dict[Family, LoraPair]
) -> None:
    pipe = build(case).to(DEVICE)
    bare = synchronisations(pipe, case)
    apply(pipe, lora_pairs[case.family].fusion(case))
    assert synchronisations(pipe, case) <= bare


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_clock_of_the_noise_waits_once(
    case: Case, apply: Apply, lora_pairs: dict[Family, LoraPair]
) -> None:
    """When timesteps are set."""
    pipe = build(case).to(DEVICE)
    bare = synchronisations(pipe, case)
    apply(pipe, replace(lora_pairs[case.family].fusion(case), clock="noise"))
    assert synchronisations(pipe, case) <= bare + 1


@pytest.mark.parametrize("first", ["compile", "apply"])
def test_cuda_graphs(first: str, apply: Apply, lora_pairs: dict[Family, LoraPair]) -> None:
    case = CASES[0]
    fusion, other = (pair.fusion(case) for pair in (lora_pairs["sd1"], lora_pairs["sd1"].swapped()))
    eager = build(case).to(DEVICE)
    handle = apply(eager, fusion)
    expected = [generate(eager, case)]
    handle.swap(other)
    expected.append(generate(eager, case))

    pipe = build(case).to(DEVICE)
    if first == "compile":
        pipe.unet.compile(mode="reduce-overhead", fullgraph=True)
        generate(pipe, case)
    handle = apply(pipe, fusion)
    if first == "apply":
        pipe.unet.compile(mode="reduce-overhead", fullgraph=True)
    generate(pipe, case)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [generate(pipe, case)]
        handle.swap(other)
        found.append(generate(pipe, case))
    for image, one in zip(found, expected, strict=True):
        assert relative_difference(image, one) <= 1e-3  # compiled products round differently


@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind: str, use_stream: bool, lora_pairs: dict[Family, LoraPair]) -> None:
    case = CASES[0]
    fusion = lora_pairs["sd1"].fusion(case)
    plain = build(case).to(DEVICE)
    apply_fusion(plain, fusion, mode="branch")
    pipe = build(case).to(DEVICE)
    pipe.unet.to("cpu")
    pipe.unet.enable_group_offload(
        onload_device=torch.device(DEVICE),
        offload_type=kind,
        num_blocks_per_group=1,
        use_stream=use_stream,
    )
    handle = apply_fusion(pipe, fusion)
    assert handle.report().mode == "branch"
    assert relative_difference(generate(pipe, case), generate(plain, case)) <= TOLERANCE
    assert "factors on cuda:0" in handle.report().nbytes


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_of_the_pipeline(method: str, lora_pairs: dict[Family, LoraPair]) -> None:
    case = CASES[0]
    fusion = lora_pairs["sd1"].fusion(case)
    plain = build(case).to(DEVICE)
    apply_fusion(plain, fusion)
    pipe = build(case)
    getattr(pipe, method)()
    handle = apply_fusion(pipe, fusion)
    assert handle.report().mode == ("merge" if "model" in method else "branch")
    for _ in range(2):
        assert relative_difference(generate(pipe, case), generate(plain, case)) <= TOLERANCE
