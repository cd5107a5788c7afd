"""The studio: a pipeline and two or more LoRAs, which makes a picture of every trial."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from klora_compile.compiler import compile_measured
from klora_compile.measured import MeasuredLoras
from klora_compile.planning.pairing import check_loras, check_slots
from klora_compile.sampling.pictures import Request, Shot, arguments, picture
from klora_compile.settings.config import Config
from klora_compile.slots import slots_of
from klora_compile.trying.trial import Trial
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import IncompatibleModelError, KloraError
from klora_runtime.pipeline.handle import FusionHandle, apply_fusion


class StoppedError(KloraError):
    """A picture was stopped before it was ready."""


@dataclass(frozen=True)
class Picture:
    """A picture, and how long it took."""

    shot: Shot
    """The picture, or the frames of a video; its ``seconds`` are those of the sampling."""
    mode: str
    """How the fusion acted: ``merge`` or ``branch``."""
    changing: float
    """Seconds to make the schedule and to write it into the model."""
    deriving: float
    """Seconds to compute derived slots that were not in memory."""


class Studio:
    """A pipeline and measured LoRAs; also a context manager, which leaves the pipeline bare.

    The picture of a trial is, to the pixel, that of ``klora sample`` with the artifact that ``klora
    compile`` makes with the same settings. One thread at a time makes pictures; others may ask for
    fusions meanwhile.

    Args:
        pipe: a diffusers pipeline without a fusion.
        loras: the LoRAs, with what was measured of them.
        mode: see :func:`~klora_runtime.apply_fusion`. ``auto`` chooses for the first trial; the
            next ones keep that mode if they can.
        missing: see :func:`~klora_runtime.apply_fusion`.
    """

    def __init__(
        self,
        pipe: Any,
        loras: MeasuredLoras,
        *,
        mode: str = "auto",
        missing: Literal["error", "skip"] = "error",
    ) -> None:
        self.pipe, self.loras = pipe, loras
        self._mode, self._missing = mode, missing
        self._handle: FusionHandle | None = None
        self._made: tuple[Config, Fusion] | None = None
        self._compiling = threading.Lock()

    def __enter__(self) -> Studio:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def handle(self) -> FusionHandle | None:
        """The handle of the fusion on the pipeline; None before the first picture."""
        return self._handle

    def fusion(self, config: Config) -> Fusion:
        """Return the fusion of these LoRAs with a config; see :func:`compile_fusion`.

        Raises:
            ConfigError: the rule does not take these LoRAs.
            LoraError: the values of a layer cannot be measured.
            PairingError: the LoRAs share no layer, or only one has some and that is not allowed.
        """
        with self._compiling:
            return self._compiled(config)

    def picture(self, trial: Trial, *, on_evaluation: Callable[[], None] | None = None) -> Picture:
        """Make the picture of a trial.

        Args:
            trial: the settings.
            on_evaluation: called before each evaluation of the denoiser; what it raises, such as
                :class:`StoppedError`, ends the picture.

        Raises:
            ConfigError: the pipeline's call does not take an argument; or see :meth:`fusion`.
            IncompatibleModelError: the fusion does not fit the pipeline.
            KloraError: the pipeline failed. The studio can make the next picture.
        """
        same = arguments(self.pipe, Request((trial.prompt,), settings=trial.call))
        begin = time.perf_counter()
        with self._compiling:
            derives = bool(self.loras.lacking(self.loras.settled(trial.config)))
            fusion = self._compiled(trial.config)
        made = time.perf_counter()
        handle = self._put_on(fusion)
        ready = time.perf_counter()
        with self._quiet(), _watched(handle, on_evaluation):
            shot = picture(self.pipe, trial.prompt, trial.seed, same)
        deriving = made - begin if derives else 0.0
        return Picture(shot, handle.mode, ready - begin - deriving, deriving)

    def close(self) -> None:
        """Take the fusion off the pipeline."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _compiled(self, config: Config) -> Fusion:
        if self._made is None or self._made[0] != config:
            adapters = self.loras.adapters
            check_slots(slots_of(adapters), config.rule, config.settings)
            check_loras({name: each.survey for name, each in adapters.items()}, config.rule)
            self._made = config, compile_measured(self.loras, config)
        return self._made[1]

    def _put_on(self, fusion: Fusion) -> FusionHandle:
        """Put a fusion on the pipeline: swap, or apply it anew if the present mode cannot."""
        if self._handle is not None and self._handle.fusion is fusion:
            return self._handle
        if self._handle is not None:
            try:
                self._handle.swap(fusion)
                return self._handle
            except IncompatibleModelError:
                if self._mode != "auto":
                    raise
                self.close()
        self._handle = apply_fusion(self.pipe, fusion, mode=self._mode, missing=self._missing)
        return self._handle

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Switch the pipeline's own progress bar off inside the block."""
        before = getattr(self.pipe, "_progress_bar_config", None)
        self.pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
        try:
            yield
        finally:
            self.pipe._progress_bar_config = before or {}


@contextmanager
def _watched(handle: FusionHandle, on_evaluation: Callable[[], None] | None) -> Iterator[None]:
    """Call a function before each evaluation of a component that carries the fusion."""
    if on_evaluation is None:
        yield
        return
    hooks = [model.register_forward_pre_hook(lambda *_: on_evaluation()) for model in handle.models]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
