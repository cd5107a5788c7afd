"""What every mode can do, and the choice among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, Self

from torch import nn

from klora_runtime.layers.rounding import Rounding
from klora_runtime.layers.targets import Target


class Mode(Protocol):
    """Holds a set of layers at base + what their timelines say.

    Making one checks that it can act on its targets and allocates; it changes nothing until
    :meth:`write`. ``weights`` is slot -> factor on top of the coefficients, 1 where missing.
    """

    name: str

    @property
    def paths(self) -> tuple[str, ...]:
        """The targets' paths."""

    @property
    def switches(self) -> int:
        """How many single-layer switches one run from progress 0 to 1 makes."""

    @property
    def writes(self) -> bool:
        """Whether it holds parameters of the model at other values than the base's."""

    def check(self) -> None:
        """See that nothing has come between this mode and its layers; follow a moved model.

        Raises:
            InUseError: something has; nothing was changed.
        """

    def overflows(self, weights: Mapping[str, float]) -> Iterable[str]:
        """Layers that would hold infinity somewhere in their schedule, in a sentence each."""

    def write(self, progress: float, weights: Mapping[str, float]) -> None:
        """Make every layer act as at ``progress``.

        Raises:
            InUseError: as :meth:`check`.
            IncompatibleModelError: there are :meth:`overflows`; nothing was changed.
        """

    def move(self, progress: float, weights: Mapping[str, float]) -> None:
        """The same, where only the layers with a breakpoint since the last progress can differ."""

    def confirm(self, model: nn.Module) -> None:
        """A component has run for the first time since :meth:`check`: see that every layer acted.

        Raises:
            InUseError: something else read the weight of layers that this mode acts at the calls
                of; ``issues`` names them.
        """

    def pause(self) -> None:
        """Make every layer act as the bare model, to the bit; :meth:`write` ends it.

        Raises:
            InUseError: as :meth:`check`, as do :meth:`yield_to` and :meth:`release`.
        """

    def successor(self, targets: Sequence[Target]) -> Self:
        """A mode of the same kind for other targets of the same model; changes nothing."""

    def yield_to(self, other: Self) -> None:
        """Give back the layers that ``other``, a successor, does not have; it writes next."""

    def release(self) -> None:
        """Give everything back to the bit, and drop all that was kept for it."""

    def rounding(self, weights: Mapping[str, float]) -> Iterable[Rounding]:
        """What the model's dtype costs each layer."""

    def nbytes(self) -> Mapping[str, int]:
        """Purpose and place, such as ``base weights on cpu`` -> bytes."""
