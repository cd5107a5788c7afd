"""Others on the same pipeline: patches of its class, a second fusion, and what they ask for.

Putting on and taking off, in every order, leaves the other as it would be alone. The real libraries
are in `tests/companions`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.applying import Apply
from support.generation import TWO_STEPS, generate
from torch import nn

from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import InUseError

ORDERS = [(on, off) for on in ("it first", "fusion first") for off in ("it first", "fusion first")]


class ClassPatch:
    """Replaces a method of the pipeline's class as caches do, and gives it back."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.calls = pipe, 0

    def on(self) -> None:
        original = self.pipe.__class__.__call__

        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return original(pipe, *args, **kwargs)

        self.pipe.__class__.__call__ = call
        self.pipe.__class__._original_call = original

    def off(self) -> None:
        self.pipe.__class__.__call__ = self.pipe.__class__._original_call
        del self.pipe.__class__._original_call


@pytest.mark.parametrize(("on", "off"), ORDERS)
def test_a_patch_of_the_pipelines_class(
    on: str, off: str, apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    plain, call, bare = type(pipe), type(pipe).__call__, generate(pipe, TWO_STEPS)
    with apply(pipe, fusion):
        expected = generate(pipe, TWO_STEPS)
    patch = ClassPatch(pipe)
    if on == "it first":
        patch.on()
    handle = apply(pipe, fusion)
    if on == "fusion first":
        patch.on()
    assert torch.equal(generate(pipe, TWO_STEPS), expected)
    assert patch.calls == 1
    if off == "it first":
        patch.off()
        assert torch.equal(generate(pipe, TWO_STEPS), expected)
        assert patch.calls == 1
    handle.remove()
    if off == "fusion first":
        assert torch.equal(generate(pipe, TWO_STEPS), bare)
        assert patch.calls == 2
        patch.off()
    assert torch.equal(generate(pipe, TWO_STEPS), bare)
    assert patch.calls <= 2
    assert type(pipe) is plain
    assert plain.__call__ is call
    assert "_original_call" not in vars(plain)


@pytest.mark.parametrize("off", [0, 1])
@pytest.mark.parametrize("on", [0, 1])
def test_a_second_fusion_on_another_component(
    on: int, off: int, apply: Apply, pipe: Any, fusion: Fusion
) -> None:
    components = ("unet", "text_encoder")
    bare, plain, scheduler = generate(pipe, TWO_STEPS), type(pipe), type(pipe.scheduler)
    alone = []
    for component in components:
        with apply(pipe, fusion, components=[component]):
            alone.append(generate(pipe, TWO_STEPS))
    with apply(pipe, fusion, components=list(components)):
        both = generate(pipe, TWO_STEPS)
    assert not torch.equal(alone[0], alone[1])

    handles: dict[int, Any] = {}
    for index in (on, 1 - on):
        handles[index] = apply(pipe, fusion, components=[components[index]])
    assert torch.equal(generate(pipe, TWO_STEPS), both)
    handles[off].remove()
    assert torch.equal(generate(pipe, TWO_STEPS), alone[1 - off])
    handles[1 - off].remove()
    assert torch.equal(generate(pipe, TWO_STEPS), bare)
    assert type(pipe) is plain
    assert type(pipe.scheduler) is scheduler


def test_classes_are_what_they_are_asked_for(apply: Apply, pipe: Any, fusion: Fusion) -> None:
    """``type(self.scheduler) != FlowMatchEulerDiscreteScheduler``, asks a pipeline of diffusers."""
    plain, scheduler = type(pipe), type(pipe.scheduler)
    with apply(pipe, fusion):
        assert type(pipe.scheduler) == scheduler  # noqa: E721
        assert pipe.scheduler.__class__ is scheduler
        assert pipe.__class__ is plain
        assert type(pipe) == plain  # noqa: E721


def test_a_layer_that_is_read_and_not_called_ends_a_run_at_its_first_evaluation(
    pipe: Any, fusion: Fusion
) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    attention = pipe.unet.get_submodule(layer.removesuffix(".to_q"))
    handle = apply_fusion(pipe, fusion, mode="branch", components=["unet"])
    expected = generate(pipe, TWO_STEPS)
    processor, steps = attention.processor, []

    def reading(attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return nn.functional.linear(hidden_states, attn.to_q.weight)

    def counted(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        steps.append(step)
        return kwargs

    attention.processor = reading
    for _ in range(2):
        with pytest.raises(InUseError, match="1 layers carry a branch and were not called") as e:
            generate(pipe, TWO_STEPS, callback_on_step_end=counted)
        assert e.value.issues == (f"unet.{layer}",)
    assert not steps
    attention.processor = processor
    assert torch.equal(generate(pipe, TWO_STEPS), expected)
    handle.remove()
