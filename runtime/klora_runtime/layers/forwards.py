"""Redirection of hooks that hold a module's old ``forward`` to that of its new class.

Hooks of accelerate and diffusers replace ``module.forward`` on the instance and keep the previous
method, which belongs to the class that the module had then. So do other programs that put an object
around a layer (ComfyUI's *Load LoRA (Bypass)*). If the module gets another class, they still call
the old class's ``forward``. :func:`lead` replaces it wherever such hooks and objects keep it;
:func:`unled` finds replacements that keep it elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from types import MethodType
from typing import Any

from torch import nn

#: Attributes of a module instance that may hold its ``forward``; the second is accelerate's.
_OWN = ("forward", "_old_forward")

#: Attribute of a hook registry that lists the hooks, and attributes of a hook with a ``forward``.
_REFERENCES, _HELD = "_fn_refs", ("forward", "original_forward")


#: Methods that :func:`lead` replaced, by place and name.
Kept = dict[tuple[int, str], Any]


def lead(module: nn.Module, old: type, new: type, kept: Kept) -> None:
    """Replace ``old.forward`` of a module by ``new.forward`` wherever a hook keeps it.

    Args:
        kept: gets the replaced methods; when a later call leads back, it puts them back.
    """
    before, after = _function(old), _function(new)
    for place, name in _places(module):
        if _is_method(found := place[name], module, before):
            known = kept.pop((id(place), name), None)
            led = known if _is_method(known, module, after) else MethodType(after, module)
            kept[id(place), name], place[name] = found, led


def unled(module: nn.Module, cls: type) -> str | None:
    """Return what replaced ``module.forward`` without keeping that of ``cls``; None if nothing did.

    Args:
        module: a module whose ``forward`` may have been replaced on the instance.
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
    yield from _around(module)


def _around(module: nn.Module) -> Iterator[tuple[MutableMapping[str, Any], str]]:
    """Yield where objects around a module keep its ``forward``, from the outermost inwards.

    Such an object replaced ``module.forward`` by a method of its own, and may be around another.
    """
    found, seen = vars(module).get("forward"), {id(module)}
    while isinstance(found, MethodType) and id(found.__self__) not in seen:
        seen.add(id(found.__self__))
        held = getattr(found.__self__, "__dict__", {})
        names = [name for name in _HELD if name in held]
        yield from ((held, name) for name in names)
        found = held[names[0]] if names else None


def _function(cls: Any) -> Any:
    """Return the function ``forward`` of a class."""
    return cls.forward


def _is_method(value: Any, module: nn.Module, function: Any) -> bool:
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is function
