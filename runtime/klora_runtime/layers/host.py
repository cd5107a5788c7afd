"""The host: what layers ask of the program that they are part of.

A host offloads weights, converts them at each call, fuses projections, and has its own names for
modules. Layers know none of that: they ask a :class:`Host`, and each target carries its host.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Casting:
    """Storage of a weight in one dtype with multiplication in another."""

    dtype: torch.dtype
    """Dtype in which the module multiplies."""
    name: str
    """Name of the technique, for errors."""


class Host:
    """A host that leaves its modules alone; other hosts override what they do.

    A module is identified by its lineage: the component, every module between, and the module.
    """

    def paths(self, path: str) -> Sequence[str]:
        """Return the paths where the host may have the module that an artifact calls ``path``."""
        return (path,)

    def device(self, lineage: Sequence[nn.Module]) -> torch.device | None:
        """Return the device to which the host brings a module's weight for a call; else None.

        Between calls the weight may be elsewhere, or on the meta device.
        """
        return None

    def casting(self, module: nn.Module) -> Casting | None:
        """Return how the host converts a module's weight at each call; None if it does not."""
        return None

    def offloads(self, model: nn.Module) -> bool:
        """Return whether the host moves a component off its device to free memory.

        Copies of such a component's weights must not stay on the device.
        """
        return False

    def checkpoints(self, component: str, model: nn.Module) -> Sequence[Path] | None:
        """Return files that a component may have been loaded from; None if copies are wanted.

        Mode merge reads base values back from them instead of copying them.
        """
        return None

    def unused(self, lineage: Sequence[nn.Module], name: str) -> str | None:
        """Return why a module is present but never called, and the fix, as the end of a sentence.

        Args:
            name: name of the module in its parent.
        """
        return None

    def reads_weight(self, lineage: Sequence[nn.Module], name: str) -> bool:
        """Return whether the parent of a module reads its weight and never calls it.

        Args:
            name: name of the module in its parent.
        """
        return False

    def unwritable(
        self, lineage: Sequence[nn.Module], names: Sequence[str], *, small: bool
    ) -> str | None:
        """Return why a write to a module's parameter would not last, and the fix.

        Args:
            names: the parameter's path inside the component, one name for each step of the lineage.
            small: whether the parameter is no weight that a layer multiplies with.
        """
        return None

    def origin(self, lineage: Sequence[nn.Module], names: Sequence[str]) -> torch.Tensor | None:
        """Return the tensor from which the host loads a small parameter before each call.

        A write to that tensor lasts, and a write to the parameter does not. None if the host loads
        the parameter from nowhere.

        Args:
            names: see :meth:`unwritable`.
        """
        return None

    def repeated_blocks(self, model: nn.Module) -> Collection[str]:
        """Return the class names of the blocks of a component that share compiled code."""
        return ()


#: The host of modules that nothing else acts on.
PLAIN = Host()
