"""Random operations on one pipeline: every picture is a fresh pipeline's, every removal is whole.

``make operations`` runs a thousand rounds instead of one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from support.failing import FailingOperation
from support.generation import Case, SchedulerName, build, generate, scheduler
from support.handmade import ATTENTION, CROSS_ATTENTION, State, hand_entry, hand_fusion
from torch import nn

from klora_runtime import apply_fusion
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import InUseError
from klora_runtime.pipeline.handle import FusionHandle

ROUNDS = int(os.environ.get("KLORA_OPERATIONS", "1"))

TO_Q, TO_K = f"unet.{ATTENTION}.to_q", f"unet.{ATTENTION}.to_k"
CROSS = f"unet.{CROSS_ATTENTION}.to_out.0"
CONV = "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.0.self_attn.q_proj"
SHAPES = {
    TO_Q: (32, 32),
    TO_K: (32, 32),
    CROSS: (32, 32),
    CONV: (32, 32, 3, 3),
    TEXT: (32, 32),
}


def made(layers: Mapping[str, float | None], rank: int) -> Fusion:
    """A fusion of layers that switch at these moments."""
    entries = (
        hand_entry(layer, SHAPES[layer], switch=switch, rank=rank, seed=rank + number)
        for number, (layer, switch) in enumerate(layers.items())
    )
    return hand_fusion(*entries)


FUSIONS: Mapping[str, Fusion] = {
    "both": made({TO_Q: 0.5, TO_K: 0.3, CONV: 0.7, TEXT: None}, 2),
    "others": made({CROSS: 0.4, TO_Q: None, TEXT: None}, 3),
    "denoiser": made({TO_Q: 0.6, CONV: 0.2}, 4),
    "constant": made({TO_K: None}, 1),
    "text": made({TEXT: None}, 2),
}
WEIGHTS = (0.0, 0.5, 1.0, -1.0)
SCHEDULERS: tuple[SchedulerName, ...] = ("DDIM", "PNDM", "Euler", "DPM++ 2M", "Heun")

#: What was done to the weights of the bare pipeline: its dtypes, one after the other.
Dtypes = tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Applied:
    """What a handle is expected to do."""

    fusion: str
    mode: str
    weights: tuple[tuple[str, float], ...] = (("content", 1.0), ("style", 1.0))
    enabled: bool = True

    @property
    def components(self) -> set[str]:
        return {entry.component for entry in FUSIONS[self.fusion].entries}

    @property
    def follows(self) -> bool:
        """Whether it has to know the step."""
        entries = FUSIONS[self.fusion].entries
        return any(e.component == "unet" and e.timeline.switches for e in entries)

    def on(self, pipe: Any) -> FusionHandle:
        handle = apply_fusion(pipe, FUSIONS[self.fusion], self.mode, weights=dict(self.weights))
        handle.enabled = self.enabled
        return handle


@dataclass(frozen=True)
class Scene:
    """All that a picture depends on."""

    dtypes: Dtypes = ()
    scheduler: SchedulerName = "DDIM"
    applied: frozenset[Applied] = field(default_factory=frozenset)

    def fresh(self) -> Any:
        """A pipeline like this, made anew."""
        pipe = build(Case(2, self.scheduler))
        for dtype in self.dtypes:
            convert(pipe, dtype)
        return pipe


def convert(pipe: Any, dtype: torch.dtype) -> None:
    """As ``pipe.to`` does it, without its warning."""
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        nn.Module.to(model, dtype)


def picture(pipe: Any, case: Case, change: str | None, handles: Any) -> torch.Tensor:
    """One generation, with what happens between its steps."""

    def between(_pipe: Any, index: int, _timestep: Any, values: Any) -> Any:
        if index == 0:
            for handle in handles:
                if change == "set":
                    handle.set(content=0.25)
                elif change == "off and on":
                    handle.enabled = not handle.enabled
                    handle.enabled = not handle.enabled
        return values

    if case.kind == "img2img":
        sibling = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        sibling.set_progress_bar_config(disable=True)
        return generate(sibling, case, callback_on_step_end=between)
    return generate(pipe, case, callback_on_step_end=between)


@functools.cache
def expected(scene: Scene, case: Case, change: str | None) -> torch.Tensor:
    """The picture of a fresh pipeline."""
    pipe = scene.fresh()
    handles = [each.on(pipe) for each in sorted(scene.applied, key=repr)]
    return picture(pipe, case, change, handles)


@functools.cache
def bare_bits(dtypes: Dtypes) -> Mapping[str, Any]:
    """Dtype, strides and bits of every parameter of a pipeline that never carried a fusion."""
    return bits(Scene(dtypes).fresh())


def bits(pipe: Any) -> Mapping[str, Any]:
    """Pointers and identities left out, by which two pipelines differ."""
    return {name: values[2:] for name, values in State.of(pipe).bits.items()}


def classes(pipe: Any) -> Any:
    """Everything that a fusion puts on a pipeline beside the weights."""
    return replace(State.of(pipe), bits={})


class Injected(Exception):
    """Raised by a test in the middle of something."""


CASES = st.builds(
    Case,
    steps=st.sampled_from([2, 3]),
    guidance=st.sampled_from(["off", "batched"]),
    kind=st.sampled_from(["sd1", "sd1", "img2img"]),
)
ERRORS = st.sampled_from([Injected, KeyboardInterrupt, MemoryError])
NUMBERS = st.integers(0, 60)
PICKS = st.integers(0, 1)


class Operations(RuleBasedStateMachine):
    """One pipeline, up to two fusions on it, and what is expected of them."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.pipe = self.scene.fresh()
        generate(self.pipe, Case(2))  # leaves attributes on pipelines and schedulers
        self.plain = classes(self.pipe)
        self.handles: list[tuple[FusionHandle, Applied]] = []

    # What is expected.

    def now(self) -> Scene:
        return replace(self.scene, applied=frozenset(applied for _, applied in self.handles))

    def expect(self, pick: int, **changes: Any) -> None:
        handle, applied = self.handles[pick]
        self.handles[pick] = handle, replace(applied, **changes)

    def pick(self, number: int) -> int:
        return number % len(self.handles)

    def check_bare(self) -> None:
        assert bits(self.pipe) == bare_bits(self.scene.dtypes)
        found = classes(self.pipe)
        assert (found.pipeline, found.modules) == (self.plain.pipeline, self.plain.modules)
        assert type(self.pipe.scheduler) is type(scheduler(self.scene.scheduler, 2))

    def failing(
        self, number: int | None, error: type[BaseException], act: Callable[[], Any]
    ) -> bool:
        """Do it, perhaps with an operation of torch that fails; whether it was done."""
        if number is None:
            act()
            return True
        injected = FailingOperation(number, error(), lasting=error is MemoryError)
        try:
            with injected:
                act()
        except BaseException:  # the injected error, or what a library makes of it
            if not injected.failed:
                raise
            return False
        return True

    # What happens.

    @precondition(lambda self: len(self.handles) < 2)
    @rule(
        name=st.sampled_from(sorted(FUSIONS)),
        mode=st.sampled_from(["merge", "branch"]),
        number=st.none() | NUMBERS,
        error=ERRORS,
    )
    def apply(self, name: str, mode: str, number: int | None, error: Any) -> None:
        new = Applied(name, mode)
        if any(new.components & applied.components for _, applied in self.handles):
            with pytest.raises(InUseError, match="already carries a fusion"):
                new.on(self.pipe)
            return
        made: list[FusionHandle] = []
        if self.failing(number, error, lambda: made.append(new.on(self.pipe))):
            self.handles.append((made[0], new))

    @precondition(lambda self: self.handles)
    @rule(
        number=PICKS,
        slot=st.sampled_from(["content", "style"]),
        weight=st.sampled_from(WEIGHTS),
        failing=st.none() | NUMBERS,
        error=ERRORS,
    )
    def set(self, number: int, slot: str, weight: float, failing: int | None, error: Any) -> None:
        pick = self.pick(number)
        handle, applied = self.handles[pick]
        if self.failing(failing, error, lambda: handle.set({slot: weight})):
            weights = tuple(sorted({**dict(applied.weights), slot: weight}.items()))
            self.expect(pick, weights=weights)
        self.see_enabled(pick, failing)

    @precondition(lambda self: self.handles)
    @rule(number=PICKS, value=st.booleans(), failing=st.none() | NUMBERS, error=ERRORS)
    def enable(self, number: int, value: bool, failing: int | None, error: Any) -> None:
        pick = self.pick(number)
        handle, _ = self.handles[pick]
        if self.failing(failing, error, lambda: setattr(handle, "enabled", value)):
            self.expect(pick, enabled=value)
        self.see_enabled(pick, failing)

    @precondition(lambda self: self.handles)
    @rule(
        number=PICKS,
        name=st.sampled_from(sorted(FUSIONS)),
        failing=st.none() | NUMBERS,
        error=ERRORS,
    )
    def swap(self, number: int, name: str, failing: int | None, error: Any) -> None:
        pick = self.pick(number)
        handle, applied = self.handles[pick]
        others = [each for index, (_, each) in enumerate(self.handles) if index != pick]
        if any(replace(applied, fusion=name).components & each.components for each in others):
            with pytest.raises(InUseError, match="already carries a fusion"):
                handle.swap(FUSIONS[name])
            return
        if self.failing(failing, error, lambda: handle.swap(FUSIONS[name])):
            self.expect(pick, fusion=name)
        self.see_enabled(pick, failing)

    def see_enabled(self, pick: int, failing: int | None) -> None:
        """After a failure a fusion may be off as a whole."""
        handle, applied = self.handles[pick]
        assert handle.enabled == applied.enabled or (failing is not None and not handle.enabled)
        self.expect(pick, enabled=handle.enabled)
        assert handle.fusion is FUSIONS[applied.fusion]

    @precondition(lambda self: self.handles)
    @rule(number=PICKS, failing=st.none() | NUMBERS, error=ERRORS)
    def remove(self, number: int, failing: int | None, error: Any) -> None:
        pick = self.pick(number)
        handle, _ = self.handles[pick]
        if self.failing(failing, error, handle.remove):
            assert handle.models == ()
            del self.handles[pick]
        else:
            self.see_enabled(pick, failing)
        if not self.handles:
            self.check_bare()

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def convert(self, dtype: torch.dtype) -> None:
        if dtype == (self.scene.dtypes or (torch.float32,))[-1]:
            return
        convert(self.pipe, dtype)
        self.scene = replace(self.scene, dtypes=(*self.scene.dtypes, dtype)[-2:])

    @rule(name=st.sampled_from(SCHEDULERS))
    def replace_scheduler(self, name: SchedulerName) -> None:
        self.pipe.scheduler = scheduler(name, 2)
        self.scene = replace(self.scene, scheduler=name)

    @rule(case=CASES, change=st.sampled_from([None, None, "set", "off and on"]))
    def sample(self, case: Case, change: str | None) -> None:
        case = replace(case, scheduler=self.scene.scheduler)
        found = picture(self.pipe, case, change, [handle for handle, _ in self.handles])
        assert torch.equal(found, expected(self.now(), case, change))
        if change == "set":
            for pick, (_, applied) in enumerate(self.handles):
                self.expect(pick, weights=(("content", 0.25), applied.weights[1]))

    @rule(case=CASES, number=st.integers(0, 2000), error=ERRORS)
    def sample_and_fail(self, case: Case, number: int, error: Any) -> None:
        """In the middle of a step, a switch, or the work before the loop."""
        case = replace(case, scheduler=self.scene.scheduler)
        handles = [handle for handle, _ in self.handles]
        self.failing(number, error, lambda: picture(self.pipe, case, None, handles))

    @rule(index=st.integers(0, 2), error=ERRORS)
    def sample_and_stop(self, index: int, error: Any) -> None:
        """Between two steps, as a server stops a run."""

        def stop(_pipe: Any, step: int, _timestep: Any, values: Any) -> Any:
            if step == index:
                raise error
            return values

        with contextlib.suppress(error):
            generate(self.pipe, Case(3), callback_on_step_end=stop)

    @precondition(lambda self: self.handles)
    @rule(number=PICKS, act=st.sampled_from(["set", "enable", "swap", "remove", "sample"]))
    def sample_while_another_thread_acts(self, number: int, act: str) -> None:
        """The other thread is refused, and the picture is right."""
        handle, applied = self.handles[self.pick(number)]
        acts: Mapping[str, Callable[[], Any]] = {
            "set": lambda: handle.set(content=0.75),
            "enable": lambda: setattr(handle, "enabled", not applied.enabled),
            "swap": lambda: handle.swap(FUSIONS[applied.fusion]),
            "remove": handle.remove,
            "sample": lambda: generate(self.pipe, Case(2)),
        }
        tried, refused = 0, list[InUseError]()

        def elsewhere() -> None:
            try:
                acts[act]()
            except InUseError as error:
                refused.append(error)

        def between(_pipe: Any, index: int, _timestep: Any, values: Any) -> Any:
            nonlocal tried
            tried += 1
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return values

        case = Case(2, self.scene.scheduler)
        found = generate(self.pipe, case, callback_on_step_end=between)
        assert len(refused) == tried >= 2
        assert torch.equal(found, expected(self.now(), case, None))

    @rule()
    def sample_with_another_scheduler(self) -> None:
        """A pipeline that shares the denoiser and has a scheduler of its own."""
        parts = {**self.pipe.components, "scheduler": scheduler("DDIM", 2)}
        sibling = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        sibling.set_progress_bar_config(disable=True)
        follows = any(
            applied.enabled
            and any(
                e.component == "unet" and e.timeline.switches
                for e in FUSIONS[applied.fusion].entries
            )
            for _, applied in self.handles
        )
        if follows:
            with pytest.raises(InUseError, match="the scheduler that the fusion follows does not"):
                generate(sibling, Case(2))
        else:
            scene = replace(self.now(), scheduler="DDIM")
            assert torch.equal(generate(sibling, Case(2)), expected(scene, Case(2), None))

    def teardown(self) -> None:
        for handle, _ in self.handles:
            handle.remove()
        self.check_bare()


Operations.TestCase.settings = settings(
    max_examples=ROUNDS,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a sequence is short enough to read; making it shorter takes minutes
)
TestRandomOperations = Operations.TestCase
