"""The ways to sample with two LoRAs, each on its own pipeline.

A contestant is made from files, as a user would do it, and then makes one image after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from reference import KLora

from benchmark.literal import Literal
from benchmark.loras import Files, all_switching
from benchmark.timing import seconds_of
from klora_runtime.artifact.file import load_fusion
from klora_runtime.artifact.schedule import CONTENT, STYLE
from klora_runtime.artifact.timeline import progress_of_step
from klora_runtime.pipeline.handle import FusionHandle, apply_fusion


class Contestant(Protocol):
    """A way to have two LoRAs on a pipeline."""

    def before_step(self, index: int, steps: int) -> None:
        """Prepare step ``index`` of ``steps``; called only if ``Kind.follows_steps``."""

    def switch(self) -> float | None:
        """Return the seconds to switch all layers from one LoRA to the other; None if impossible.

        The contestant does not sample afterwards.
        """


class Bare:
    """No LoRA at all."""

    def __init__(self, pipe: Any, files: Files) -> None:
        self._pipe = pipe

    def before_step(self, index: int, steps: int) -> None:
        raise NotImplementedError("this contestant does not follow steps")

    def switch(self) -> float | None:
        return None


class PeftActive(Bare):
    """Both LoRAs loaded by diffusers, both active in all layers at all steps."""

    def __init__(self, pipe: Any, files: Files) -> None:
        super().__init__(pipe, files)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about two adapters
            pipe.load_lora_weights(str(files.content), adapter_name=CONTENT)
            pipe.load_lora_weights(str(files.style), adapter_name=STYLE)
        pipe.set_adapters([CONTENT, STYLE])


class PeftFused(PeftActive):
    """Both LoRAs added to the weights permanently."""

    def __init__(self, pipe: Any, files: Files) -> None:
        super().__init__(pipe, files)
        pipe.fuse_lora(adapter_names=[CONTENT, STYLE])
        pipe.unload_lora_weights()


class PeftCallback(PeftActive):
    """One LoRA active at a time, set for all layers before each step from a callback.

    The callback cannot choose by layer: diffusers' finest scale applies to all projections of an
    attention. So it takes the LoRA that K-LoRA chooses for most layers at that step.
    """

    def __init__(self, pipe: Any, files: Files) -> None:
        super().__init__(pipe, files)
        self._timelines = [entry.timeline for entry in load_fusion(files.artifact).entries]

    def before_step(self, index: int, steps: int) -> None:
        progress = progress_of_step(index, steps)
        content = sum(timeline.at(progress).get(CONTENT, 0.0) for timeline in self._timelines)
        self._pipe.set_adapters(CONTENT if 2 * content >= len(self._timelines) else STYLE)

    def switch(self) -> float | None:
        self._pipe.set_adapters(CONTENT)
        return seconds_of(lambda: self._pipe.set_adapters(STYLE), self._pipe.device)


class LiteralKLora(Bare):
    """K-LoRA recomputed in every call of every layer."""

    def __init__(self, pipe: Any, files: Files) -> None:
        super().__init__(pipe, files)
        denoiser = getattr(pipe, files.component)
        klora = KLora(files.content, files.style, dtype=torch.float32, device=pipe.device)
        self._klora = Literal(denoiser, files.component, klora)

    def before_step(self, index: int, steps: int) -> None:
        self._klora.at(progress_of_step(index, steps))


class _Klora(Bare):
    """klora in one of its modes."""

    mode: str

    def __init__(self, pipe: Any, files: Files) -> None:
        super().__init__(pipe, files)
        self._files = files
        self.handle: FusionHandle = apply_fusion(pipe, files.artifact, mode=self.mode)

    def switch(self) -> float | None:
        """Follow the scheduler from its first step to its last, as a run does."""
        self.handle.swap(all_switching(self.handle.fusion, self._files))
        scheduler = self._pipe.scheduler

        def once() -> float:
            scheduler.set_begin_index(0)
            return seconds_of(lambda: scheduler.set_begin_index(1), self._pipe.device)

        scheduler.set_timesteps(2, device=self._pipe.device, **_shift(scheduler))
        once()  # warms up
        return once()


class KloraMerge(_Klora):
    """klora, mode merge."""

    mode = "merge"


class KloraBranch(_Klora):
    """klora, mode branch."""

    mode = "branch"


@dataclass(frozen=True)
class Kind:
    """A row of the table."""

    name: str
    what: str
    """Description for people."""
    make: Callable[[Any, Files], Contestant]
    writes_weights: bool = False
    """Whether it needs its own base weights, because it writes into them."""
    follows_steps: bool = False
    """Whether it is told each step."""
    on_disk: Callable[[Files], int | None] = lambda files: files.lora_bytes
    """Returns the bytes of the files that it reads."""


#: Name -> row, in the order of the table.
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("bare", "bare model", Bare, on_disk=lambda files: None),
        Kind("peft-active", "PEFT, two active adapters", PeftActive),
        Kind("peft-fused", "PEFT, fuse_lora (static)", PeftFused, writes_weights=True),
        Kind("peft-callback", "PEFT, set_adapters each step", PeftCallback, follows_steps=True),
        Kind("literal", "literal K-LoRA", LiteralKLora, follows_steps=True),
        Kind(
            "merge",
            "klora, merge",
            KloraMerge,
            writes_weights=True,
            on_disk=lambda files: files.artifact_bytes,
        ),
        Kind("branch", "klora, branch", KloraBranch, on_disk=lambda files: files.artifact_bytes),
    )
}


def _shift(scheduler: Any) -> dict[str, float]:
    """Return the shift that flow-matching schedulers need for the image's size."""
    return {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
