"""A leaf module that adds a gated low-rank branch to its own output.

The module gets a class of its own kind (`subclass`): one for each base class, which overrides
``forward``. So the branch acts inside of all that is called around it: torch's hooks, those of
diffusers and accelerate, caches that predict its output. Those that hold the plain ``forward``
already are led to the new one (`forwards`). Compilers see a class and a few tensors.

A branch acts only where the module is called. :class:`Calls` tells of the last evaluation whether
it was, or whether something read its weight instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from klora_runtime.layers.additions import Addition, kind_of
from klora_runtime.layers.forwards import lead, unled
from klora_runtime.layers.subclass import Overlay

#: Plain attributes of a branched module; in ``vars(module)``, so neither in its state nor moved.
_DOWN, _UP, _GATE = "_klora_down", "_klora_up", "_klora_gate"
_DENSE, _CALLS, _KEPT = "_klora_dense", "_klora_calls", "_klora_kept"


class Calls:
    """What was done to one branched leaf since :meth:`forget`; compiled code does not tell."""

    __slots__ = ("called", "read")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.called = False
        """Its ``forward`` was called, so the branch acted."""
        self.read = False
        """Its weight was read, by itself or by others."""


def attach(module: nn.Module, addition: Addition) -> None:
    """Make ``module(x)`` compute its own result + what an addition adds.

    Args:
        module: of a kind that :func:`~klora_runtime.layers.additions.kind_of` knows.
        addition: its tensors are read anew at each call, so they may be written in place.
    """
    own = vars(module)
    own.update({_DOWN: addition.down, _UP: addition.up, _GATE: addition.gate})
    own[_DENSE] = addition.dense
    own.setdefault(_CALLS, Calls())
    own.setdefault(_KEPT, {})
    _BRANCHED.put_on(module)
    plain = _BRANCHED.beneath(module)
    assert plain is not None
    lead(module, plain, type(module), own[_KEPT])


def detach(module: nn.Module) -> None:
    """Give ``module`` its class back; twice is once."""
    if (plain := _BRANCHED.beneath(module)) is not None:
        lead(module, type(module), plain, vars(module).get(_KEPT, {}))
    _BRANCHED.take_off(module)
    for name in (_DOWN, _UP, _GATE, _DENSE, _CALLS, _KEPT):
        vars(module).pop(name, None)


def is_branched(module: nn.Module) -> bool:
    """Whether a branch is attached, and nothing has changed the module's class since."""
    return _BRANCHED.is_outermost(module)


def misled(module: nn.Module) -> str | None:
    """What has replaced the module's ``forward`` and may not call the class's; None if nothing."""
    return unled(module, type(module))


def branch_of(module: nn.Module) -> Addition:
    """What a branched module adds; see :func:`attach`."""
    own = vars(module)
    return Addition(own[_DOWN], own[_UP], own[_GATE], own[_DENSE])


def calls_of(module: nn.Module) -> Calls:
    """What is known of a branched module's calls."""
    calls = vars(module)[_CALLS]
    assert isinstance(calls, Calls)
    return calls


def _methods(plain: Any) -> dict[str, Any]:
    kind = kind_of(plain)
    assert kind is not None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain.forward(self, *args, **kwargs)
        calls = getattr(self, _CALLS, None)
        if calls is None:  # somebody kept this function for longer than the branch was there
            return result
        if not torch.compiler.is_compiling():
            calls.called = True
        x = args[0] if args else next(iter(kwargs.values()))
        if self._klora_down is not None:
            gate = self._klora_gate
            result = kind.factors(self, x, result, self._klora_down, self._klora_up, gate)
        if self._klora_dense is not None:
            result = kind.dense(self, x, result, self._klora_dense)
        return result

    def weight(self: Any) -> Any:
        own = self.__dict__
        if not torch.compiler.is_compiling() and _CALLS in own:
            own[_CALLS].read = True
        try:
            return own["_parameters"]["weight"]
        except KeyError:
            raise AttributeError("weight") from None  # asks Module.__getattr__

    return {"forward": forward, "weight": property(weight)}


#: One class over each class of leaf, for as long as the process: compiled code keeps to it.
_BRANCHED = Overlay(_methods, passes=False)
