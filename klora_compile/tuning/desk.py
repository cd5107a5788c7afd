"""The desk behind all tabs of the page: one pipeline, one generation at a time, what was tried.

A tab has a ticket. Each change of its settings takes the next one, and a generation stops before
its next evaluation of the denoiser if its ticket is no longer the newest of its tab.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from klora_compile.rules.lookup import usual_rule
from klora_compile.sampling.pictures import makes_videos
from klora_compile.slots import scheduled, slots_of
from klora_compile.trying.names import RULE
from klora_compile.trying.studio import Picture, StoppedError, Studio
from klora_compile.trying.trial import Trial
from klora_compile.tuning.controls import (
    PROMPT,
    SEED,
    STEPS,
    Texts,
    plain_sum_of,
    trial_of_texts,
)
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError

#: Settings on the strip, and pictures in memory; the oldest go first.
STRIP, _KEPT = 40, 120

#: Side of a picture on the strip, in pixels.
_THUMBNAIL = 128

#: Steps at first, if neither the user nor the pipeline names any.
_STEPS = 20

#: Seconds between two looks whether a waiting generation was stopped.
_PATIENCE = 0.05


@dataclass(frozen=True)
class Tried:
    """Settings whose picture was made."""

    number: int
    """Counts up from 1."""
    settings: Texts
    thumbnail: Image.Image


class Desk:
    """Everything that the tabs of a page share.

    Args:
        studio: makes the pictures; nothing else may use it meanwhile.

    Raises:
        ConfigError: the pipeline makes videos.
    """

    def __init__(self, studio: Studio) -> None:
        if makes_videos(studio.pipe):
            raise ConfigError(
                f"{type(studio.pipe).__name__} makes videos, and the page shows pictures. Take "
                "klora sample."
            )
        self._studio = studio
        self._generating = threading.Lock()
        self._tickets: defaultdict[str, int] = defaultdict(int)
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._tried: list[Tried] = []
        self._keeping = threading.Lock()
        self._closed = False

    @property
    def slots(self) -> tuple[str, ...]:
        """Slots of the LoRAs."""
        return slots_of(self._studio.loras.adapters)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the LoRAs' files."""
        return tuple(each.survey.path.name for each in self._studio.loras.adapters.values())

    def first_settings(self, given: Texts) -> dict[str, str]:
        """Return the settings that a page starts with.

        Args:
            given: what the user named; the rest is as for ``klora compile``, the number of steps as
                the pipeline has it.

        Raises:
            ConfigError: see :func:`~klora_compile.tuning.controls.trial_of_texts`.
            KloraError: see :meth:`fusion`.
        """
        rule = usual_rule(len(scheduled(self.slots)))
        usual = {RULE: rule, STEPS: str(_steps(self._studio.pipe)), SEED: "0", PROMPT: ""}
        first = {**usual, **given}
        self.fusion(first)
        return first

    @property
    def tried(self) -> tuple[Tried, ...]:
        """What was tried in any tab, the newest first."""
        return tuple(reversed(self._tried))

    @property
    def mode(self) -> str | None:
        """How the fusion acts on the pipeline; None before the first picture."""
        return None if self._studio.handle is None else self._studio.handle.mode

    def fusion(self, settings: Texts) -> Fusion:
        """Return the fusion with some settings.

        Raises:
            ConfigError: see :func:`~klora_compile.tuning.controls.trial_of_texts`.
            KloraError: see :meth:`~klora_compile.trying.studio.Studio.fusion`.
        """
        return self._studio.fusion(trial_of_texts(settings).config)

    def stop(self, tab: str) -> None:
        """Stop what a tab generates or waits for, before the next evaluation."""
        self._tickets[tab] += 1

    def run(self, tab: str) -> Run:
        """Begin to generate for a tab; what it generated before stops."""
        self.stop(tab)
        return Run(self, tab, self._tickets[tab])

    def keep(self, settings: Texts, picture: Picture) -> None:
        """Put settings with their picture on the strip, unless they are there."""
        small = picture.shot.frames[0].copy()
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        with self._keeping:
            number = self._tried[-1].number + 1 if self._tried else 1
            if not any(each.settings == settings for each in self._tried):
                self._tried = [*self._tried, Tried(number, dict(settings), small)][-STRIP:]

    def numbered(self, number: int) -> Tried | None:
        """Return what was tried by its number; None if it is no longer on the strip."""
        return next((each for each in self._tried if each.number == number), None)

    def close(self) -> None:
        """Stop all that is generated, and leave the pipeline bare."""
        self._closed = True
        with self._generating:
            self._studio.close()

    def is_stale(self, tab: str, ticket: int) -> bool:
        """Return whether a tab has taken a newer ticket."""
        return self._closed or self._tickets[tab] != ticket

    def made(
        self, trial: Trial, go_on: Callable[[], None], on_evaluation: Callable[[], None]
    ) -> Picture:
        """Return the picture of a trial, from memory if it was made before.

        Args:
            trial: the trial.
            go_on: called while it waits for its turn; what it raises ends that.
            on_evaluation: called before each evaluation of the denoiser; what it raises ends the
                generation.
        """
        go_on()
        found = self._pictures.get(trial.key)
        if found is not None:
            return found
        while not self._generating.acquire(timeout=_PATIENCE):
            go_on()
        try:
            go_on()
            picture = self._studio.picture(trial, on_evaluation=on_evaluation)
            self._pictures[trial.key] = picture
            while len(self._pictures) > _KEPT:
                self._pictures.popitem(last=False)
        finally:
            self._generating.release()
        return picture


class Run:
    """The generation that a tab waits for: the picture of its settings, and what it is beside."""

    def __init__(self, desk: Desk, tab: str, ticket: int) -> None:
        self._desk, self._tab, self._ticket = desk, tab, ticket

    def picture(self, settings: Texts, on_evaluation: Callable[[int], None]) -> Picture:
        """Make the picture of some settings and put it on the strip.

        Args:
            settings: the settings.
            on_evaluation: called before each evaluation of the denoiser, with their number so far.

        Raises:
            StoppedError: the tab has changed its settings or was stopped.
            KloraError: see :meth:`~klora_compile.trying.studio.Studio.picture`.
        """
        picture = self._made(settings, on_evaluation)
        self._desk.keep(settings, picture)
        return picture

    def plain_sum(self, settings: Texts, on_evaluation: Callable[[int], None]) -> Picture:
        """Make the picture of the plain sum with the same weights, prompt, steps and seed.

        Args:
            settings: the settings.
            on_evaluation: see :meth:`picture`.

        Raises:
            StoppedError: see :meth:`picture`.
            KloraError: see :meth:`picture`.
        """
        return self._made(plain_sum_of(settings), on_evaluation)

    def _made(self, settings: Texts, on_evaluation: Callable[[int], None]) -> Picture:
        done = 0

        def go_on() -> None:
            if self._desk.is_stale(self._tab, self._ticket):
                raise StoppedError("stopped")

        def count() -> None:
            nonlocal done
            go_on()
            on_evaluation(done)
            done += 1

        return self._desk.made(trial_of_texts(settings), go_on, count)


def _steps(pipe: Any) -> int:
    """Return the number of steps that a pipeline takes if none is named."""
    parameter = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter and isinstance(parameter.default, int) else _STEPS
