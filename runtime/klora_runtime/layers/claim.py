"""The mark that allows one fusion at a time on a component, whatever the host.

The mark is an attribute of the component module: a weak reference to a :class:`Claimant`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Protocol

from torch import nn

from klora_runtime.errors import InUseError

#: The attribute, in ``vars(model)``: not part of the model's state and not seen by compiled code.
MARK = "_klora_applied"


class Claimant(Protocol):
    """The object that applied a fusion and can remove it."""

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The component modules that carry the fusion."""


def mark_of(claimant: Claimant) -> Mapping[str, object]:
    """Return the attributes of a component while this claimant has a fusion on it."""
    return {MARK: weakref.ref(claimant)}


def refuse_claimed(models: Mapping[str, nn.Module], claimant: Claimant) -> None:
    """Refuse components that carry another fusion.

    Args:
        models: component modules by name; the error states the name.
        claimant: a claimant whose own mark is allowed.

    Raises:
        InUseError: a component carries another fusion, or is a copy of one that did.
    """
    for name, model in models.items():
        mark = getattr(model, MARK, None)
        if mark is None:
            continue
        holder = mark()
        if holder is None or all(model is not own for own in holder.models):
            raise InUseError(
                f"{name} was copied while a fusion was applied to it, or that fusion's handle is "
                "gone: its weights are not the base's. Load the model again."
            )
        if holder is not claimant:
            raise InUseError(
                f"{name} already carries a fusion; call .remove() on its handle, or .swap(other) "
                "to change what it carries. (The handle is this error's .handle.)",
                handle=holder,
            )
