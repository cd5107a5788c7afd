"""The same on a GPU: decisions, latents, and every bit back. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation import TOLERANCE, Case, LoraPair, build, generate, progress
from reference import sampling
from tiny_pipeline import Family, parameters, relative_difference

from klora_compile import compile_fusion
from klora_compile.reading.adapter import read_adapter
from klora_compile.verify import differences
from klora_runtime import apply_fusion

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
    assert differences(there, content, style, device="cpu") == []
    here = compile_fusion(loras.content, loras.style, device="cpu")
    for steps in (4, 20, 50, 100):
        for index in range(steps):
            t = (index + 0.5) / steps
            for one, other in zip(there.entries, here.entries, strict=True):
                assert one.timeline.at(t) == other.timeline.at(t)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_latents_equal_the_reference(case: Case, lora_pairs: dict[Family, LoraPair]) -> None:
    loras = lora_pairs[case.family]
    other = build(case).to(DEVICE)
    with sampling(other, loras.reference(case), progress(case)):
        expected = generate(other, case).cpu()
    pipe = build(case).to(DEVICE)
    before = parameters(pipe)
    handle = apply_fusion(pipe, loras.fusion(case))
    assert relative_difference(generate(pipe, case).cpu(), expected) <= TOLERANCE
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in parameters(pipe).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_moved_after_applying(dtype: torch.dtype, lora_pairs: dict[Family, LoraPair]) -> None:
    case = CASES[0]
    pipe: Any = build(case).to(dtype)
    bare = parameters(pipe)
    handle = apply_fusion(pipe, lora_pairs["sd1"].fusion(case))
    pipe.to(DEVICE)
    generate(pipe, case)
    assert set(handle.report().nbytes) >= {"base weights on cuda:0", "factors on cuda:0"}
    handle.remove()
    pipe.to("cpu")
    assert all(torch.equal(value, bare[name]) for name, value in parameters(pipe).items())
