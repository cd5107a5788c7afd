"""A leaf module that adds a gated low-rank branch to its own output.

The module gets a subclass of its class (`subclass`) that overrides ``forward``; modules of one
class share it. So the branch acts inside everything that wraps the call: hooks of torch, diffusers
and accelerate, and caches that predict outputs. Hooks that already hold the plain ``forward`` are
redirected (`forwards`). Compilers see a class and a few tensors.

A branch acts only if the module is called. :class:`Calls` records whether it was, or whether
something read its weight instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from klora_runtime.layers.additions import Addition, kind_of
from klora_runtime.layers.forwards import lead, unled
from klora_runtime.layers.subclass import Overlay

#: Attributes in ``vars`` of a branched module: not part of its state, and not moved with it.
_DOWN, _UP, _GATE = "_klora_down", "_klora_up", "_klora_gate"
_DENSE, _CALLS, _KEPT = "_klora_dense", "_klora_calls", "_klora_kept"


class Calls:
    """Calls and reads of one branched leaf since :meth:`forget`; compiled code records none."""

    __slots__ = ("called", "read")

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.called = False
        """Whether its ``forward`` was called, so that the branch acted."""
        self.read = False
        """Whether its weight was read, by itself or by others."""


def attach(module: nn.Module, addition: Addition) -> None:
    """Make ``module(x)`` return its own result plus the addition's output.

    Args:
        module: a module of a kind that :func:`~klora_runtime.layers.additions.kind_of` knows.
        addition: the tensors of the branch; they may be written in place between calls.
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
    """Give ``module`` its class back; a second call does nothing."""
    if (plain := _BRANCHED.beneath(module)) is not None:
        lead(module, type(module), plain, vars(module).get(_KEPT, {}))
    _BRANCHED.take_off(module)
    for name in (_DOWN, _UP, _GATE, _DENSE, _CALLS, _KEPT):
        vars(module).pop(name, None)


def is_branched(module: nn.Module) -> bool:
    """Return whether a branch is attached and the module's class has not changed since."""
    return _BRANCHED.is_outermost(module)


def misled(module: nn.Module) -> str | None:
    """Return what replaced the module's ``forward`` and may bypass the class's; None if nothing."""
    return unled(module, type(module))


def branch_of(module: nn.Module) -> Addition:
    """Return the addition of a branched module; see :func:`attach`."""
    own = vars(module)
    return Addition(own[_DOWN], own[_UP], own[_GATE], own[_DENSE])


def calls_of(module: nn.Module) -> Calls:
    """Return the record of a branched module's calls."""
    calls = vars(module)[_CALLS]
    assert isinstance(calls, Calls)
    return calls


def _methods(plain: Any) -> dict[str, Any]:
    kind = kind_of(plain)
    assert kind is not None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain.forward(self, *args, **kwargs)
        calls = getattr(self, _CALLS, None)
        if calls is None:  # a caller kept this function after the branch was detached
            return result
        if not torch.compiler.is_compiling():
            calls.called = True
        x = args[0] if args else next(iter(kwargs.values()))
        if self._klora_down is not None:
            gate = self._klora_gate
            add = kind.adding(plain.forward, result)
            result = add(self, x, result, self._klora_down, self._klora_up, gate)
        if self._klora_dense is not None:
            result = kind.dense(self, x, result, self._klora_dense)
        return result

    makes_weight = plain.__getattr__ is not nn.Module.__getattr__

    def weight(self: Any) -> Any:
        own = self.__dict__
        if not torch.compiler.is_compiling() and _CALLS in own:
            own[_CALLS].read = True
        if makes_weight or "weight" not in own["_parameters"]:
            raise AttributeError("weight")  # Python then asks __getattr__
        return own["_parameters"]["weight"]

    return {"forward": forward, "weight": property(weight)}


#: One subclass per class of leaf for the life of the process, as compiled code relies on it.
_BRANCHED = Overlay(_methods, passes=False)
