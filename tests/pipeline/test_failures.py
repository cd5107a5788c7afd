"""Whatever fails in whatever the handle does: the model is bare or whole, never half."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
import torch
from support.failing import FailingOperation
from support.generation import TWO_STEPS, build
from support.handmade import ATTENTION, State, fusion_for

from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.pipeline.component_watch import ComponentWatch
from klora_runtime.pipeline.handle import FusionHandle

TO_Q, TO_K, TO_V = (f"unet.{ATTENTION}.{leaf}" for leaf in ("to_q", "to_k", "to_v"))
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"

Outputs = Mapping[str, torch.Tensor]


class Scene(NamedTuple):
    """A pipeline that carries a fusion, and another fusion."""

    pipe: Any
    handle: FusionHandle
    other: Fusion


def outputs(pipe: Any) -> Outputs:
    """What every layer that one of the fusions changes gives for one input."""
    values = {}
    for layer in (TO_Q, TO_K, TO_V, CONV, TEXT):
        component, _, path = layer.partition(".")
        module = getattr(pipe, component).get_submodule(path)
        shape = (1, 32, 4, 4) if layer == CONV else (3, 32)
        x = torch.rand(shape, generator=torch.Generator().manual_seed(3))
        values[layer] = module(x.to(module.weight.dtype))
    return values


def alike(one: Outputs, other: Outputs) -> bool:
    return all(torch.equal(one[layer], other[layer]) for layer in other)


def move(scene: Scene) -> None:
    """From the first step of a run to the second, which switches every layer."""
    scheduler = scene.pipe.scheduler
    scheduler.set_timesteps(2)
    sample = torch.zeros(1, 4, 2, 2)
    scheduler.step(sample, scheduler.timesteps[0], sample)


ACTS: Mapping[str, Callable[[Scene], object]] = {
    "set": lambda scene: scene.handle.set(content=0.5),
    "disable": lambda scene: setattr(scene.handle, "enabled", False),
    "swap": lambda scene: scene.handle.swap(scene.other),
    "remove": lambda scene: scene.handle.remove(),
    "move": move,
}
MODES = ("merge", "branch")
QUICK = ("set", "remove")

#: How it fails at the turn of the given number.
KINDS: Mapping[str, Callable[[int], FailingOperation]] = {
    "once": lambda number: FailingOperation(number, KeyboardInterrupt()),
    "no memory from there on": lambda n: FailingOperation(n, MemoryError(), lasting=True),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return build(TWO_STEPS)


def failures(kind: str, act: Callable[[], object]) -> Iterator[int]:
    """``act``, again and again, each time failing at the next operation, until it does not."""
    for number in range(1000):
        failing = KINDS[kind](number)
        with suppress(KeyboardInterrupt, MemoryError), failing:
            act()
            assert not failing.failed  # it is not kept secret
            return
        yield number
    raise AssertionError("it failed a thousand times")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_applying_fails_at_every_operation(mode: str, kind: str, pipe: Any) -> None:
    fusion = fusion_for(pipe, [TO_Q, TO_K, CONV, TEXT])
    before, handles = State.of(pipe), list[FusionHandle]()
    for number in failures(kind, lambda: handles.append(apply_fusion(pipe, fusion, mode))):
        assert State.of(pipe) == before, number
    handles[0].remove()
    assert State.of(pipe) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "act", [act if act in QUICK else pytest.param(act, marks=pytest.mark.slow) for act in ACTS]
)
@pytest.mark.parametrize("mode", MODES)
def test_an_act_fails_at_every_operation(mode: str, act: str, kind: str, pipe: Any) -> None:
    """All layers are then as they were or as they were to be, or the fusion is off and all bare."""
    untouched, bare = State.of(pipe), outputs(pipe)
    fusion, other = fusion_for(pipe, [TO_Q, TO_K, CONV, TEXT]), fusion_for(pipe, [TO_V, TO_Q])
    scenes: list[Scene] = []

    def set_scene() -> Scene:
        scenes[:] = [Scene(pipe, apply_fusion(pipe, fusion, mode), other)]
        return scenes[0]

    scene = set_scene()
    before = outputs(pipe)
    ACTS[act](scene)
    after = outputs(pipe)
    scene.handle.remove()

    scene = set_scene()
    for number in failures(kind, lambda: ACTS[act](scenes[0])):
        if act == "move":  # is made good when sampling goes on
            move(scene)
        acts = scene.handle.enabled and scene.handle.models
        assert any(alike(outputs(pipe), each) for each in ((before, after) if acts else (bare,)))
        assert acts or kind != "once", number
        scene.handle.remove()
        assert State.of(pipe) == untouched, number
        scene = set_scene()
    scene.handle.remove()
    assert State.of(pipe) == untouched


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupt_while_a_component_is_taken_hold_of(
    mode: str, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark is on the component already, by which another fusion would be refused."""

    def interrupted(self: ComponentWatch) -> None:
        raise KeyboardInterrupt

    before = State.of(pipe)
    monkeypatch.setattr(ComponentWatch, "_observe_compiled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_fusion(pipe, fusion_for(pipe, [TO_Q, TEXT]), mode)
    assert State.of(pipe) == before
