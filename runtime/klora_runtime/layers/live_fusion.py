"""A fusion on live layers, in one mode: its weights, on and off, where sampling has got to.

Any host stands on this: it finds the layers (`targets`), tells the progress, and says what is to
change. Order of everything in here: check all, allocate all, then change; where a change fails,
every layer goes back to what it was, or to the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, IncompatibleModelError, InUseError, shown
from klora_runtime.layers.mode import Mode
from klora_runtime.layers.targets import Target

#: Weights of slots lie within plus and minus this.
MAX_WEIGHT = 100.0


class LiveFusion:
    """A fusion whose layers follow the progress of sampling. Making one changes nothing.

    Args:
        fusion: what acts.
        mode: made for the fusion's layers.
        weights: slot -> factor on its deltas, as :func:`checked_weights` gives them.

    Attributes:
        fusion, mode, weights: as they are now; changed by the methods only.
        enabled: whether the fusion acts; the layers are bare where it does not.
    """

    def __init__(self, fusion: Fusion, mode: Mode, weights: Mapping[str, float]) -> None:
        self.fusion = fusion
        self.mode = mode
        self.weights = weights
        self.enabled = True
        self._progress = 0.0

    def write(self) -> None:
        """Make every layer act for the present progress; where that fails, none acts any more."""
        try:
            self.mode.write(self._progress, self.weights)
        except (InUseError, IncompatibleModelError):
            raise  # nothing was changed
        except BaseException:
            self.enabled = False
            self.mode.pause()
            raise

    def move(self, progress: float) -> None:
        """Sampling has got to ``progress``, in [0, 1); layers with a switch in between follow."""
        self._progress = progress
        if self.enabled:
            self.mode.move(progress, self.weights)

    def enable(self, value: bool) -> None:
        """Let the fusion act, or make every layer bare to the bit; what fails changes nothing."""
        if value == self.enabled:
            return
        if value:
            self.write()
        else:
            self._pause()
        self.enabled = value

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Bare layers for a while."""
        enabled = self.enabled
        self.enable(False)
        try:
            yield
        finally:
            self.enable(enabled)

    def set_weights(self, changed: Mapping[str, float]) -> None:
        """Change the weights of these slots; others stay."""
        with self._as_it_was_on_failure():
            self.weights = {**self.weights, **changed}
            if self.enabled:
                self.write()

    def swap(self, fusion: Fusion, targets: Sequence[Target]) -> None:
        """Put another fusion in this one's place, in the same mode.

        Args:
            fusion: the other one; weights of slots with the same name stay.
            targets: its layers.
        """
        mode = self.mode.successor(targets)
        with self._as_it_was_on_failure():
            self.mode.yield_to(mode)
            self.fusion, self.mode = fusion, mode
            self.weights = {s: weight for s, weight in self.weights.items() if s in fusion.slots}
            if self.enabled:
                self.write()

    def release(self) -> None:
        """Give everything back to the bit, for good; where that fails, all layers act again."""
        with self._as_it_was_on_failure():
            self.mode.release()

    def _pause(self) -> None:
        """Remove all deltas; if that fails half-way, put all of them back."""
        try:
            self.mode.pause()
        except InUseError:
            raise  # nothing was changed
        except BaseException:
            self.write()
            raise

    @contextmanager
    def _as_it_was_on_failure(self) -> Iterator[None]:
        """Undo the changes of attributes and layers inside where they fail."""
        before = self.fusion, self.mode, self.weights, self.enabled
        try:
            yield
        except BaseException:
            failed = self.mode
            self.fusion, self.mode, self.weights, self.enabled = before
            if failed is not self.mode:
                failed.yield_to(self.mode)
            if self.enabled:
                self.write()
            raise


def checked_weights(fusion: Fusion, weights: Mapping[str, float]) -> dict[str, float]:
    """Factors of slots, each from -:data:`MAX_WEIGHT` to :data:`MAX_WEIGHT`.

    Raises:
        ConfigError: a slot that the fusion does not have, or a factor out of range.
    """
    if not isinstance(weights, Mapping):
        raise ConfigError(f"weights={weights!r}: expected slot names with a number each.")
    for slot, weight in weights.items():
        if slot not in fusion.slots:
            raise ConfigError(
                f"there is no slot {shown(slot)}; this fusion has {', '.join(fusion.slots)}."
            )
        if not isinstance(weight, Real) or not -MAX_WEIGHT <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"weight of {slot}: expected a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, "
                f"found {weight!r}."
            )
    return {slot: float(weight) for slot, weight in weights.items()}
