"""torch.compile: outputs equal eager, and nothing is compiled anew once an image was made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.families import IMAGES, lora_files
from support.generation import TOLERANCE, TWO_STEPS, build, generate
from support.pairs import slow
from tiny_pipeline import TEXT_WIDTH, relative_difference, tiny_lora

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


def small_unet() -> Any:
    """A pipeline with one block down and one up: what compiling takes grows with the layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
            attention_head_dim=8,
            norm_num_groups=4,
            cross_attention_dim=TEXT_WIDTH,
        )
    pipe = build(TWO_STEPS)
    pipe.unet = unet.eval().requires_grad_(False)
    return pipe


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder, pipe = tmp_path_factory.mktemp("loras"), small_unet()
    modules = ("to_q", "to_out.0", "conv1", "proj_in")
    content, style = (
        tiny_lora(
            pipe, folder / f"{seed}.safetensors", seed=seed, rank=2 + seed, strength=1.0,
            modules=modules,
        )
        for seed in (1, 2)
    )  # fmt: skip
    fusion = compile_fusion(content, style, device="cpu")
    assert sum(entry.timeline.switches for entry in fusion.entries) > 5
    return Model(
        small_unet,
        lambda pipe, steps: generate(pipe, replace(TWO_STEPS, steps=steps)),
        "unet",
        fusion,
        compile_fusion(style, content, device="cpu"),
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


#: Each mode and each order, and blocks or all; the other ways are slow.
EACH = [("merge", by_block, "compile"), ("branch", in_place, "apply")]
OTHERS = [
    slow(*way)
    for way in product(("merge", "branch"), (in_place, wrapped, by_block), ("compile", "apply"))
    if way not in EACH
]


@pytest.mark.parametrize(("mode", "compile_", "first"), [*EACH, *OTHERS])
def test_nothing_is_compiled_anew(mode: str, compile_: Compile, first: str, unet: Model) -> None:
    compiled = check(unet, mode, compile_, first, backend="eager")

    assert compiled == (0 if (mode, first) == ("merge", "compile") else 1)


@pytest.mark.slow
@NEEDS_COMPILER
def test_blocks_with_inductor(unet: Model) -> None:
    check(unet, "merge", by_block, "compile")


@pytest.mark.slow
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
