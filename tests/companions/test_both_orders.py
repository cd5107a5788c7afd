"""Every companion of the table beside a fusion: put on and taken off in both orders, both modes.

The pictures equal those of the literal schedule with the same companion. Taken off, each leaves
the other as it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import KLora, sampling
from support.companions import COMPANIONS
from support.companions.companion import Companion
from support.families import lora_files
from support.generation import LEAST_EFFECT, TOLERANCE
from support.handmade import State
from tiny_pipeline import relative_difference

from klora_compile import compile_fusion
from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import InUseError

MODES = ("merge", "branch")

#: The least that a companion changes of the latents.
LEAST_CHANGE = 1e-3

#: Mode; which is put on first; which is taken off first.
WAYS = tuple(product(MODES, ("companion", "fusion"), ("companion", "fusion")))


@dataclass(frozen=True)
class Scene:
    """A companion's pipeline, and what it makes without klora's runtime."""

    fusion: Fusion
    bare: torch.Tensor
    alone: torch.Tensor
    """With the companion."""
    fused: torch.Tensor
    """With the literal schedule."""
    both: torch.Tensor
    left: State
    """What the companion leaves behind when it is taken off."""

    @classmethod
    def of(cls, companion: Companion, folder: Path) -> Scene:
        pipe = companion.case.pipeline()
        files = lora_files(pipe, companion.case, folder)
        klora = KLora(*files)
        bare = companion.generate(pipe)
        with sampling(pipe, klora, companion.moments(on=False)):
            fused = companion.generate(pipe)
        on = companion.put_on(pipe)
        alone = companion.generate(pipe, on)
        with sampling(pipe, klora, companion.moments(on=True)):
            both = companion.generate(pipe, on)
        on.take_off()
        assert (relative_difference(alone, bare) < LEAST_CHANGE) == companion.lossless
        assert relative_difference(fused, bare) >= LEAST_EFFECT
        assert relative_difference(both, alone) >= LEAST_EFFECT
        assert relative_difference(both, fused) >= LEAST_CHANGE
        return cls(compile_fusion(*files, device="cpu"), bare, alone, fused, both, State.of(pipe))


@pytest.fixture(scope="module")
def scene_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Companion], Scene]:
    scenes: dict[str, Scene] = {}

    def scene_of(companion: Companion) -> Scene:
        if find_spec(companion.package) is None:
            pytest.skip(f"{companion.package} is not installed")
        if companion.name not in scenes:
            scenes[companion.name] = Scene.of(companion, tmp_path_factory.mktemp("loras"))
        return scenes[companion.name]

    return scene_of


def one_way_each() -> list[Any]:
    """Every companion in every way; ``make test`` has one way of each that is quick, in turn."""
    return [
        pytest.param(
            companion,
            way,
            marks=() if companion.quick and i % len(WAYS) == j else pytest.mark.slow,
            id=f"{companion}, {way[0]}: {way[1]} on first, {way[2]} off first",
        )
        for (i, companion), (j, way) in product(enumerate(COMPANIONS), enumerate(WAYS))
    ]


@pytest.mark.parametrize(("companion", "way"), one_way_each())
def test_in_every_order(
    companion: Companion, way: tuple[str, str, str], scene_of: Callable[[Companion], Scene]
) -> None:
    mode, first_on, first_off = way
    scene = scene_of(companion)
    pipe = companion.case.pipeline()
    plain, call = type(pipe), type(pipe).__call__

    on = companion.put_on(pipe) if first_on == "companion" else None
    handle = apply_fusion(pipe, scene.fusion, mode=mode)
    on = companion.put_on(pipe) if on is None else on
    if companion.after_a_branch is not None and (mode, first_on) == ("branch", "fusion"):
        with pytest.raises(InUseError, match=companion.after_a_branch):
            companion.generate(pipe, on)
        on.take_off()
        same(companion.generate(pipe), scene.fused)
        handle.remove()
        assert torch.equal(companion.generate(pipe), scene.bare)
        return
    for _ in range(2):
        same(companion.generate(pipe, on), scene.both)

    if first_off == "companion":
        on.take_off()
        same(companion.generate(pipe), scene.fused)
        handle.remove()
    else:
        handle.remove()
        assert torch.equal(companion.generate(pipe, on), scene.alone)
        on.take_off()
    assert torch.equal(companion.generate(pipe), scene.bare)
    assert plain.__call__ is call
    state = State.of(pipe)
    assert state.modules == scene.left.modules
    assert (state.pipeline, state.scheduler) == (scene.left.pipeline, scene.left.scheduler)


@pytest.mark.parametrize(
    ("companion", "mode", "first_off"),
    [
        pytest.param(
            each,
            mode,
            first_off,
            marks=()
            if (each.name, mode, first_off) == ("FreeU", "branch", 1)
            else pytest.mark.slow,
            id=f"{each}, {mode}, {first_off} off first",
        )
        for each, mode, first_off in product(COMPANIONS, MODES, (0, 1))
        if each.components is not None
    ],
)
def test_between_two_fusions(
    companion: Companion, mode: str, first_off: int, scene_of: Callable[[Companion], Scene]
) -> None:
    """One on the denoiser and one on the text encoder."""
    scene = scene_of(companion)
    pipe = companion.case.pipeline()
    assert companion.components is not None

    handles = [apply_fusion(pipe, scene.fusion, mode=mode, components=companion.components[:1])]
    on = companion.put_on(pipe)
    handles.append(apply_fusion(pipe, scene.fusion, mode=mode, components=companion.components[1:]))
    same(companion.generate(pipe, on), scene.both)
    handles[first_off].remove()
    handles[1 - first_off].remove()
    assert torch.equal(companion.generate(pipe, on), scene.alone)
    on.take_off()
    assert torch.equal(companion.generate(pipe), scene.bare)
    assert State.of(pipe).modules == scene.left.modules


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_difference(found, expected) <= TOLERANCE
