"""The interface of all modes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, Self

from torch import nn

from klora_runtime.layers.rounding import Rounding
from klora_runtime.layers.targets import Target


class Mode(Protocol):
    """A way to hold a set of layers at base + the deltas of their timelines.

    The constructor checks that the mode can act on its targets and allocates memory. Nothing
    changes before :meth:`write`. ``weights`` is slot -> factor on the coefficients; a missing slot
    has 1.
    """

    name: str

    @property
    def paths(self) -> tuple[str, ...]:
        """The targets' paths."""

    @property
    def switches(self) -> int:
        """Number of single-layer switches in one run from progress 0 to 1."""

    @property
    def writes(self) -> bool:
        """Whether parameters of the model hold other values than the base's."""

    def check(self) -> None:
        """Check that the mode can still act on its layers; follow a model that was moved.

        Raises:
            InUseError: it cannot; nothing was changed.
        """

    def follow(self) -> bool:
        """The model was moved or converted: let copies of its values become what these would be.

        Returns:
            Whether :meth:`write` must come before the layers act as they should.
        """

    def overflows(self, weights: Mapping[str, float]) -> Iterable[str]:
        """Yield one sentence per layer that would hold infinity somewhere in its schedule."""

    def write(self, progress: float, weights: Mapping[str, float]) -> None:
        """Make every layer act for ``progress``.

        Raises:
            InUseError: see :meth:`check`.
            IncompatibleModelError: there are :meth:`overflows`; nothing was changed.
        """

    def move(self, progress: float, weights: Mapping[str, float]) -> None:
        """Do the same, but write only the layers with a breakpoint since the last progress."""

    def confirm(self, model: nn.Module) -> None:
        """Check, after a component's first run since :meth:`check`, that every layer acted.

        Raises:
            InUseError: this mode acts when a layer is called, but something read the layer's weight
                instead of calling it; ``issues`` names these layers.
        """

    def pause(self) -> None:
        """Make every layer act as in the bare model, to the bit, until the next :meth:`write`.

        Raises:
            InUseError: see :meth:`check`; yield_to and release raise it too.
        """

    def successor(self, targets: Sequence[Target]) -> Self:
        """Return a mode of the same kind for other targets of the same model; change nothing."""

    def yield_to(self, other: Self) -> None:
        """Restore the layers that ``other``, a successor, does not have; ``other`` writes next."""

    def release(self) -> None:
        """Restore every parameter to the bit, and free all memory."""

    def rounding(self, weights: Mapping[str, float]) -> Iterable[Rounding]:
        """Return the rounding of each layer by the model's dtype."""

    def copied(self) -> Mapping[str, str]:
        """Return path of a parameter -> why its base value is copied, not read from a checkpoint.

        Empty where no checkpoint was named.
        """

    def nbytes(self) -> Mapping[str, int]:
        """Return purpose and place, such as ``base weights on cpu`` -> bytes."""
