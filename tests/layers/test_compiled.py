"""torch.compile: outputs equal eager, and nothing is compiled anew once an image was made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import IMAGES, lora_files
from support.generation import TOLERANCE, TWO_STEPS, LoraPair, build, generate
from tiny_pipeline import Family, relative_difference

from klora_compile import compile_fusion
from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import IncompatibleModelError
from klora_runtime.pipeline.handle import FusionHandle

NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler here, and there is no g++"
)
Compile = Callable[..., Any]


def in_place(denoiser: Any, **options: Any) -> Any:
    denoiser.compile(fullgraph=True, **options)
    return denoiser


def wrapped(denoiser: Any, **options: Any) -> Any:
    return torch.compile(denoiser, fullgraph=True, **options)


def by_block(denoiser: Any, **options: Any) -> Any:
    denoiser.compile_repeated_blocks(fullgraph=True, **options)
    return denoiser


@dataclass(frozen=True)
class Model:
    """A pipeline and two fusions of the same layers for it."""

    build: Callable[[], Any]
    sample: Callable[[Any, int], torch.Tensor]
    denoiser: str
    fusion: Fusion
    other: Fusion


@pytest.fixture
def unet(lora_pairs: dict[Family, LoraPair]) -> Model:
    loras = lora_pairs["sd1"]
    return Model(
        lambda: build(TWO_STEPS),
        lambda pipe, steps: generate(pipe, replace(TWO_STEPS, steps=steps)),
        "unet",
        loras.fusion(TWO_STEPS),
        loras.swapped().fusion(TWO_STEPS),
    )


@pytest.fixture
def transformer(tmp_path: Path) -> Model:
    (case,) = (case for case in IMAGES if case.name == "FLUX.1")
    content, style = lora_files(case.pipeline(), case, tmp_path)
    return Model(
        case.pipeline,
        case.generate,
        "transformer",
        compile_fusion(content, style, device="cpu"),
        compile_fusion(style, content, device="cpu"),
    )


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def use(model: Model, pipe: Any, handle: FusionHandle) -> Iterator[torch.Tensor]:
    """One image after each thing that can be done to a fusion."""
    yield model.sample(pipe, 2)
    yield model.sample(pipe, 5)
    handle.set(content=0.5, style=1.5)
    yield model.sample(pipe, 2)
    handle.enabled = False
    yield model.sample(pipe, 2)
    handle.enabled = True
    yield model.sample(pipe, 2)
    handle.swap(model.other)
    yield model.sample(pipe, 2)
    handle.swap(model.fusion)
    yield model.sample(pipe, 2)


def check(model: Model, kind: str, compile_: Compile, first: str, **options: Any) -> int:
    """Compare with eager; returns how many graphs were compiled after applying."""
    eager = model.build()
    expected = list(use(model, eager, apply_fusion(eager, model.fusion, mode=kind)))
    pipe = model.build()

    def compile_now() -> None:
        setattr(pipe, model.denoiser, compile_(getattr(pipe, model.denoiser), **options))

    if first == "compile":
        compile_now()
        bare = model.sample(pipe, 2)
    before = graphs()
    handle = apply_fusion(pipe, model.fusion, mode=kind)
    if first == "apply":
        compile_now()

    model.sample(pipe, 2)
    after = graphs()
    assert after > 0
    images = list(use(model, pipe, handle))

    assert graphs() == after
    for image, one in zip(images, expected, strict=True):
        assert relative_difference(image, one) <= TOLERANCE
    handle.remove()
    if first == "compile":
        assert torch.equal(model.sample(pipe, 2), bare)
        assert graphs() == after
    return after - before


@pytest.mark.parametrize("first", ["compile", "apply"])
@pytest.mark.parametrize("compile_", [in_place, wrapped, by_block])
@pytest.mark.parametrize("mode", ["merge", "branch"])
def test_nothing_is_compiled_anew(mode: str, compile_: Compile, first: str, unet: Model) -> None:
    compiled = check(unet, mode, compile_, first, backend="eager")

    regions = 2 if compile_ is by_block else 1  # the UNet has blocks of two widths
    assert compiled == (0 if (mode, first) == ("merge", "compile") else regions)


@NEEDS_COMPILER
def test_blocks_with_inductor(unet: Model) -> None:
    check(unet, "merge", by_block, "compile")


@NEEDS_COMPILER
def test_a_whole_transformer_with_inductor(transformer: Model) -> None:
    check(transformer, "branch", in_place, "apply", mode="reduce-overhead")


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


def freeze_a_part(pipe: Any) -> AbstractContextManager[None]:
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, options=FREEZING)
    return nullcontext()


def freeze_forward(pipe: Any) -> AbstractContextManager[None]:
    pipe.unet.forward = torch.compile(pipe.unet.forward, options=FREEZING)
    return nullcontext()


@pytest.mark.parametrize("mode", ["merge", "branch"])
@pytest.mark.parametrize(
    "freeze",
    [
        freeze_all,
        freeze_this,
        freeze_this_wrapped,
        freeze_blocks,
        freeze_a_part,
        freeze_forward,
    ],
)
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
