"""torch.compile: outputs equal eager, and nothing is compiled anew once an image was made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from generation import TOLERANCE, TWO_STEPS, LoraPair, build, generate
from tiny_pipeline import Family, relative_difference

from klora_runtime import apply_fusion
from klora_runtime.errors import IncompatibleModelError
from klora_runtime.fusion import Fusion
from klora_runtime.handle import FusionHandle

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler here, and there is no g++"
)
Compile = Callable[..., None]


def in_place(pipe: Any, **options: Any) -> None:
    pipe.unet.compile(fullgraph=True, **options)


def wrapped(pipe: Any, **options: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, **options)


def by_block(pipe: Any, **options: Any) -> None:
    pipe.unet.compile_repeated_blocks(fullgraph=True, **options)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def use(pipe: Any, handle: FusionHandle, other: Fusion) -> Iterator[torch.Tensor]:
    """One image after each thing that can be done to a fusion."""
    fusion = handle.fusion
    yield generate(pipe, TWO_STEPS)
    yield generate(pipe, replace(TWO_STEPS, steps=5))
    handle.set(content=0.5, style=1.5)
    yield generate(pipe, TWO_STEPS)
    handle.enabled = False
    yield generate(pipe, TWO_STEPS)
    handle.enabled = True
    yield generate(pipe, TWO_STEPS)
    handle.swap(other)
    yield generate(pipe, TWO_STEPS)
    handle.swap(fusion)
    yield generate(pipe, TWO_STEPS)


def check(kind: str, compile_: Compile, first: str, loras: LoraPair, **options: Any) -> int:
    """Compare with eager; returns how many graphs were compiled after applying."""
    fusion, other = loras.fusion(TWO_STEPS), loras.swapped().fusion(TWO_STEPS)
    eager = build(TWO_STEPS)
    expected = list(use(eager, apply_fusion(eager, fusion, mode=kind), other))
    pipe = build(TWO_STEPS)
    if first == "compile":
        compile_(pipe, **options)
        bare = generate(pipe, TWO_STEPS)
    before = graphs()
    handle = apply_fusion(pipe, fusion, mode=kind)
    if first == "apply":
        compile_(pipe, **options)

    generate(pipe, TWO_STEPS)
    after = graphs()
    assert after > 0
    images = list(use(pipe, handle, other))

    assert graphs() == after
    for image, one in zip(images, expected, strict=True):
        assert relative_difference(image, one) <= TOLERANCE
    handle.remove()
    if first == "compile":
        assert relative_difference(generate(pipe, TWO_STEPS), bare) == 0
        assert graphs() == after
    return after - before


@pytest.mark.parametrize("first", ["compile", "apply"])
@pytest.mark.parametrize("compile_", [in_place, wrapped, by_block])
@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_nothing_is_compiled_anew(
    mode: str, compile_: Compile, first: str, lora_pairs: dict[Family, LoraPair]
) -> None:
    compiled = check(mode, compile_, first, lora_pairs["sd1"], backend="eager")

    regions = 2 if compile_ is by_block else 1  # the UNet has blocks of two widths
    assert compiled == (0 if (mode, first) == ("merge", "compile") else regions)


@NEEDS_COMPILER
@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_with_inductor(mode: str, lora_pairs: dict[Family, LoraPair]) -> None:
    first = "compile" if mode == "merge" else "apply"
    check(mode, by_block, first, lora_pairs["sd1"], mode="reduce-overhead")


FREEZING = {"freezing": True}


def freeze_all(pipe: Any) -> AbstractContextManager[None]:
    import torch._inductor.config

    context: AbstractContextManager[None] = torch._inductor.config.patch(FREEZING)
    return context


def freeze_this(pipe: Any) -> AbstractContextManager[None]:
    pipe.unet.compile(options=FREEZING)
    return nullcontext()


def freeze_this_wrapped(pipe: Any) -> AbstractContextManager[None]:
    pipe.unet = torch.compile(pipe.unet, options=FREEZING)
    return nullcontext()


def freeze_blocks(pipe: Any) -> AbstractContextManager[None]:
    pipe.unet.compile_repeated_blocks(options=FREEZING)
    return nullcontext()


@pytest.mark.parametrize("mode", ["merge", "branch"])
@pytest.mark.parametrize("freeze", [freeze_all, freeze_this, freeze_this_wrapped, freeze_blocks])
def test_freezing_is_refused(
    freeze: Callable[[Any], AbstractContextManager[None]], mode: str, pipe: Any, fusion: Fusion
) -> None:
    handle = apply_fusion(pipe, fusion, mode=mode)
    with freeze(pipe):
        with pytest.raises(IncompatibleModelError, match="option freezing folds the weights"):
            generate(pipe, TWO_STEPS)
        handle.remove()
        with pytest.raises(IncompatibleModelError, match="option freezing folds the weights"):
            apply_fusion(pipe, fusion, mode=mode)
