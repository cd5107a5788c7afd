"""A fusion on live layers in one mode: its weights, its on/off state, and its progress.

Every host uses this class: it finds the layers (`targets`), reports the progress, and requests
changes. Each change first checks everything, then allocates everything, then changes the layers. If
it fails, every layer returns to its previous state, or to the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ConfigError, IncompatibleModelError, InUseError, shown
from klora_runtime.layers.mode import Mode
from klora_runtime.layers.targets import Target

#: Weights of slots are between minus and plus this.
MAX_WEIGHT = 100.0


class LiveFusion:
    """A fusion whose layers follow the progress of sampling. Making one changes nothing.

    Args:
        fusion: the fusion to apply.
        mode: a mode made for the fusion's layers.
        weights: slot -> factor on its deltas, from :func:`checked_weights`.

    Attributes:
        fusion, mode, weights: the present ones; only the methods change them.
        enabled: whether the fusion acts; if not, the layers are bare.
    """

    def __init__(self, fusion: Fusion, mode: Mode, weights: Mapping[str, float]) -> None:
        self.fusion = fusion
        self.mode = mode
        self.weights = weights
        self.enabled = True
        self._progress = 0.0

    def write(self) -> None:
        """Make every layer act for the present progress; if that fails, no layer acts."""
        try:
            self.mode.write(self._progress, self.weights)
        except (InUseError, IncompatibleModelError):
            raise  # nothing was changed
        except BaseException:
            self.enabled = False
            self.mode.pause()
            raise

    def move(self, progress: float) -> None:
        """Move to ``progress``, in [0, 1]: write the layers that switch in between."""
        self._progress = progress
        if self.enabled:
            self.mode.move(progress, self.weights)

    def follow(self) -> None:
        """The model was moved or converted; layers that act do so in its dtype from now on."""
        if self.mode.follow() and self.enabled:
            self.write()

    def enable(self, value: bool) -> None:
        """Let the fusion act, or make every layer bare to the bit; a failure changes nothing."""
        if value == self.enabled:
            return
        if value:
            self.write()
        else:
            self._pause()
        self.enabled = value

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Make the layers bare inside the block."""
        enabled = self.enabled
        self.enable(False)
        try:
            yield
        finally:
            self.enable(enabled)

    def set_weights(self, changed: Mapping[str, float]) -> None:
        """Change the weights of these slots; keep the others."""
        with self._as_it_was_on_failure():
            self.weights = {**self.weights, **changed}
            if self.enabled:
                self.write()

    def swap(self, fusion: Fusion, targets: Sequence[Target]) -> None:
        """Replace the fusion by another one in the same mode.

        Args:
            fusion: the new fusion; weights of slots with the same name stay.
            targets: the layers of the new fusion.
        """
        mode = self.mode.successor(targets)
        with self._as_it_was_on_failure():
            self.mode.yield_to(mode)
            self.fusion, self.mode = fusion, mode
            self.weights = {s: weight for s, weight in self.weights.items() if s in fusion.slots}
            if self.enabled:
                self.write()

    def release(self) -> None:
        """Restore every parameter to the bit, for good; if that fails, all layers act again."""
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
        """Undo changes of attributes and layers inside the block if it fails."""
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
    """Return the factors of slots, each between -:data:`MAX_WEIGHT` and :data:`MAX_WEIGHT`.

    Raises:
        ConfigError: the fusion does not have a slot, or a factor is out of range.
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
