"""Changing what one object does, and nothing else: a class of its own under the same name.

The object's ``__class__`` becomes a subclass of what it was. Its ``__dict__`` and the class that
other objects share stay untouched. Several such classes may lie on one object, and each can be
taken off in its turn or retired in any order. This is the one way in which klora changes a leaf
(`leaf`), a scheduler or a pipeline instance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

_OVERLAY = "_klora_overlay"


class Overlay:
    """What one owner puts over the classes of objects.

    Args:
        make: the class an object has -> the attributes of the class over it; asked once for each
            class, so that objects of one class share one over it.
        makes_plain: whether ``type(thing)(...)`` makes a thing that nothing lies over. It then
            needs methods of its own to be copied: Python copies by ``type(thing).__new__``.

    Attributes:
        active: until it is retired.
    """

    def __init__(self, make: Callable[[type], dict[str, Any]], *, makes_plain: bool = True) -> None:
        self.active = True
        self._make = make
        self._makes_plain = makes_plain
        self._classes: dict[type, type] = {}

    def put_on(self, thing: Any) -> None:
        """Give ``thing`` a class of this overlay; twice is once."""
        if self.is_on(thing):
            return
        plain = type(thing)
        if plain not in self._classes:
            self._classes[plain] = self._class_over(plain)
        thing.__class__ = self._classes[plain]

    def is_on(self, thing: Any) -> bool:
        """Whether ``thing``, or what it is a copy of, was given a class by this overlay."""
        return any(vars(cls).get(_OVERLAY) is self for cls in type(thing).__mro__)

    def is_outermost(self, thing: Any) -> bool:
        """Whether it was given one, and nothing has changed its class since."""
        return vars(type(thing)).get(_OVERLAY) is self

    def take_off(self, thing: Any) -> None:
        """Give ``thing`` back the class it had, where this overlay is the outermost on it."""
        if self.is_outermost(thing):
            thing.__class__ = type(thing).__bases__[0]
            _uncover(thing)

    def retire(self, things: Iterable[Any]) -> None:
        """Stop for good, and give these things back the class they had.

        Where another overlay lies over it, the class stays until that one goes.
        """
        self.active = False
        for thing in things:
            _uncover(thing)

    def _class_over(self, plain: Any) -> type:
        def new(_: type, *args: Any, **kwargs: Any) -> Any:
            """``type(thing)(...)`` makes a thing of its own, over which nothing lies."""
            return plain(*args, **kwargs)

        return type(
            plain.__name__,
            (plain,),
            {
                "__module__": plain.__module__,
                "__qualname__": plain.__qualname__,
                "__doc__": plain.__doc__,
                **({"__new__": new} if self._makes_plain else {}),
                _OVERLAY: self,
                **self._make(plain),
            },
        )


def plain_twin(thing: Any, plain: type) -> Any:
    """An object of class ``plain`` that shares its attributes with ``thing``."""
    twin: Any = object.__new__(plain)
    vars(twin).update(vars(thing))
    return twin


def _uncover(thing: Any) -> None:
    """Take retired overlays off ``thing``, from the outermost to the first that is active."""
    while (overlay := vars(type(thing)).get(_OVERLAY)) is not None and not overlay.active:
        thing.__class__ = type(thing).__bases__[0]
