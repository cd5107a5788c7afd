"""Leading those who call a module's ``forward`` by way of the instance to that of its class.

Hooks of accelerate and diffusers replace ``module.forward`` on the instance and keep what was there
to call it: a method of the class that the module had then. A module that is given another class is
therefore still run by the old one's ``forward``. :func:`lead` puts the new one in its place, in
each place where such hooks keep it. What keeps it elsewhere :func:`unled` finds.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from types import MethodType
from typing import Any

from torch import nn

#: Attributes of a module that hold its ``forward``: the instance's own, and accelerate's.
_OWN = ("forward", "_old_forward")

#: Where a registry of hooks on a module lists them, and what in each of them may be a forward.
_REFERENCES, _HELD = "_fn_refs", ("forward", "original_forward")


#: What :func:`lead` took out of a place, by the place and the name in it.
Kept = dict[tuple[int, str], Any]


def lead(module: nn.Module, old: type, new: type, kept: Kept) -> None:
    """Let all who keep ``old.forward`` of a module to call it keep ``new.forward``.

    Args:
        kept: what was there comes in here, and comes back from here where ``new`` was before.
    """
    before, after = _function(old), _function(new)
    for place, name in _places(module):
        if _is_method(found := place[name], module, before):
            known = kept.pop((id(place), name), None)
            led = known if _is_method(known, module, after) else MethodType(after, module)
            kept[id(place), name], place[name] = found, led


def unled(module: nn.Module, cls: type) -> str | None:
    """What has replaced ``module.forward`` without keeping that of ``cls``; None if nothing has.

    Args:
        module: whose ``forward`` may have been replaced on the instance.
        cls: its class.
    """
    replaced = vars(module).get("forward")
    if replaced is None:
        return None
    function = _function(cls)
    if any(_is_method(place[name], module, function) for place, name in _places(module)):
        return None
    inner = getattr(replaced, "__func__", None) or getattr(replaced, "func", None) or replaced
    kind = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{getattr(inner, '__module__', '?')}.{kind}"


def _places(module: nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str]]:
    own = vars(module)
    yield from ((own, name) for name in _OWN if name in own)
    for registry in list(own.values()):
        for reference in (
            vars(registry).get(_REFERENCES, ()) if hasattr(registry, "__dict__") else ()
        ):
            held = vars(reference)
            yield from ((held, name) for name in _HELD if name in held)


def _function(cls: Any) -> Any:
    """The function ``forward`` of a class."""
    return cls.forward


def _is_method(value: Any, module: nn.Module, function: Any) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is function
