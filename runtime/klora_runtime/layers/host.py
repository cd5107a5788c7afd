"""What layers ask of the program that they are part of: their host.

A host moves weights in and out, converts them at each call, fuses projections, and has names of its
own for modules. Layers know none of that. They ask a :class:`Host`, and each target carries the one
that found it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Casting:
    """A host's way to keep a weight in one dtype and to multiply in another."""

    dtype: torch.dtype
    """In which the module multiplies."""
    name: str
    """Of this way, in an error."""


class Host:
    """A host that does nothing around its modules; one that does overrides what it does.

    A module is told by its lineage: the component, every module between, and the module itself.
    """

    def paths(self, path: str) -> Sequence[str]:
        """Where in a component a module may be that an artifact has at ``path``, to try in turn."""
        return (path,)

    def device(self, lineage: Sequence[nn.Module]) -> torch.device | None:
        """Where a module gets its inputs, if the host brings its weight there; None if it does not.

        The weight may then be elsewhere between calls, or on the meta device.
        """
        return None

    def casting(self, module: nn.Module) -> Casting | None:
        """How it converts a module's weight at each call; None if it does not."""
        return None

    def offloads(self, model: nn.Module) -> bool:
        """Whether it takes a component off its device to have the room, so that no copies of the
        component's weights may stay there."""
        return False

    def unused(self, lineage: Sequence[nn.Module], name: str) -> str | None:
        """Why a module is there and never called, and what to do, as the end of a sentence.

        Args:
            name: of the module in the one before it.
        """
        return None

    def reads_weight(self, lineage: Sequence[nn.Module], name: str) -> bool:
        """Whether the module before this one reads its weight and never calls it.

        Args:
            name: of the module in the one before it.
        """
        return False

    def unwritable(self, lineage: Sequence[nn.Module], parameter: torch.Tensor) -> str | None:
        """Why what is written into a module's parameter would not last, and what to do."""
        return None

    def repeated_blocks(self, model: nn.Module) -> Collection[str]:
        """Names of the classes of those modules of a component that share compiled code."""
        return ()


#: Modules that nothing is done around.
PLAIN = Host()
