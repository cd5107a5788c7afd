"""What a pipeline makes under rules of whole LoRAs, against PEFT and against a literal loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Lora
from support.applying import Apply
from support.generation import Case, build, evaluations, generate
from support.pairs import slow
from tiny_pipeline import relative_difference, tiny_lora

from klora_compile import Settings, compile_fusion
from klora_compile.rules import Direct, Switch
from klora_runtime import apply_fusion

CASE = Case(12)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("loras")
    pipe = build(CASE)
    one, two, three = (
        tiny_lora(pipe, folder / f"{i}.safetensors", seed=i, rank=i + 1, modules=ATTENTION)
        for i in (1, 2, 3)
    )
    return one, two, three


@pytest.mark.parametrize("mode", ["merge", slow("branch")])
def test_direct_is_what_peft_makes_of_two_active_adapters(
    loras: tuple[Path, Path, Path], mode: str
) -> None:
    content, style, _ = loras
    weights = Settings(content_weight=0.8, style_weight=1.3)
    fusion = compile_fusion(content, style, Direct(), weights, device="cpu")
    pipe = build(CASE)
    bare = generate(pipe, CASE)
    with apply_fusion(pipe, fusion, mode=mode):
        ours = generate(pipe, CASE)
    for name, path in (("content", content), ("style", style)):
        pipe.load_lora_weights(str(path), adapter_name=name)
    pipe.set_adapters(["content", "style"], [0.8, 1.3])
    theirs = generate(pipe, CASE)
    assert relative_difference(ours, theirs) < 1e-5
    assert relative_difference(ours, bare) > 1e-2


@pytest.mark.parametrize("count", [slow(2), 3])
def test_switch_is_loras_that_take_turns(
    loras: tuple[Path, Path, Path], count: int, apply: Apply
) -> None:
    """The weights are written anew before each step, with the LoRA whose turn it is."""
    contents, style = loras[: count - 1], loras[count - 1]
    fusion = compile_fusion(contents, style, Switch(steps=CASE.steps, tau=2), device="cpu")
    pipe = build(CASE)
    with apply(pipe, fusion):
        ours = generate(pipe, CASE)
    given = [Lora(path, ignore_alpha=False) for path in loras[:count]]
    theirs = alternating(build(CASE), given, tau=2)
    assert relative_difference(ours, theirs) < 1e-5


def alternating(pipe: Any, loras: list[Lora], tau: int) -> torch.Tensor:
    layers = loras[0].layers
    weights = {n: pipe.unet.get_submodule(n.partition(".")[2]).weight for n in layers}
    base = {name: weight.detach().clone() for name, weight in weights.items()}
    step = 0

    def before(module: torch.nn.Module, args: Any) -> None:
        nonlocal step
        lora = loras[(step % (len(loras) * tau)) // tau]
        for name, weight in weights.items():
            weight.data.copy_(base[name].double() + lora.delta(name))
        step += 1

    pipe.unet.register_forward_pre_hook(before)
    result = generate(pipe, CASE)
    assert step == evaluations(CASE.scheduler, CASE.steps)
    return result
